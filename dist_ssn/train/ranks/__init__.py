"""Coordination of the ranks of a run: agreement on the next action, failing together, stopping together."""
