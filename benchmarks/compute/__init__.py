"""Time and memory of one process."""
