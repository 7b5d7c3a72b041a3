"""Measured runs compared: metrics, intervals, verdicts."""
