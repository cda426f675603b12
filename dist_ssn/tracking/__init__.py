"""Where a run's numbers go: JSON lines always, a terminal when somebody looks, W&B by one option."""

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
