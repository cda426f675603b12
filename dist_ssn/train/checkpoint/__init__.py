"""Checkpoints: snapshots of a run, written in the background, atomic, and free of pickled code."""
