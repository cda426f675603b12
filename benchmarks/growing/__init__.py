"""Growing a bank in the middle of a run: a prototype, and what it brings at equal bytes."""
