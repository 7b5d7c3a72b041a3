"""Models: files, architecture, memory, download."""
