"""What would fail later, found before the queue."""
