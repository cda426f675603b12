"""Fixtures and checks of every test (`testing/fixtures.py`)."""

from testing.fixtures import *  # noqa: F403
