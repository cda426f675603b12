"""The command line: one file per command. `main` runs it."""

from dist_ssn.cli.entry import main

__all__ = ["main"]
