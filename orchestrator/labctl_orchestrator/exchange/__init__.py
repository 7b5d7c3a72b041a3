"""What goes out of a workspace, and what comes in: queries, exports, bundles, the files that a person names."""
