"""Bytes and time on emulated networks."""
