"""Checks before the queue."""
