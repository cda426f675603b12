"""Synchronization of workers that train apart: local updates and islands, codecs with error feedback, and exchanges of changes."""
