"""Faults, and how runs survive them."""
