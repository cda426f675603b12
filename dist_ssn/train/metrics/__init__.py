"""Figures of a run: bytes, seconds, and a comparison with their prediction."""
