"""Figures of a run: bytes, seconds, and what was predicted."""
