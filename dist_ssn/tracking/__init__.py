"""Outputs of a run's metrics: always JSON lines, optionally the terminal and W&B."""

from __future__ import annotations

from dist_ssn.tracking.tracker import (
    Console,
    JsonLines,
    Tracker,
    Trackers,
    build_tracker,
    check_wandb,
    jsonable,
    set_aside,
)

__all__ = [
    "Console",
    "JsonLines",
    "Tracker",
    "Trackers",
    "build_tracker",
    "check_wandb",
    "jsonable",
    "set_aside",
]
