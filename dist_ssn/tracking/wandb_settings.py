"""Settings of Weights & Biases: the recipe's, and the environment's `WANDB_*`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dist_ssn.errors import UserError, unknown_choice

WANDB_MODES = {"disabled": "disabled", "offline": "offline", "dryrun": "offline", "online": "online", "run": "online"}
"""W&B's name of a mode → our name; "dryrun" is W&B's older name for "offline"."""


class WandbSettings(Protocol):
    """The keys `wandb.*` of a recipe; a class without arguments gives the defaults."""

    @property
    def mode(self) -> str:
        """One of `WANDB_MODES`."""
        ...

    @property
    def project(self) -> str:
        """Project of the run."""
        ...

    @property
    def entity(self) -> str | None:
        """User or team."""
        ...

    @property
    def tags(self) -> Sequence[str]:
        """Tags of the run."""
        ...


class Picture(Protocol):
    """A picture of a finished run."""

    @property
    def file(self) -> str:
        """Name of the PNG file in its folder."""
        ...

    @property
    def caption(self) -> str:
        """One sentence below it."""
        ...


Draw = Callable[[Sequence[dict[str, Any]], Path], Sequence[Picture]]
"""Function (rows of runs, folder) → the pictures that were drawn there."""


def wandb_mode(config: WandbSettings, environment: Mapping[str, str]) -> str:
    """The mode in force: the recipe's if it names one other than the default, else `WANDB_MODE`.

    Raises:
        UserError: `WANDB_MODE` or the recipe has an unknown mode.
    """
    name = config.mode if config.mode != "disabled" else environment.get("WANDB_MODE") or "disabled"
    if name not in WANDB_MODES:
        raise UserError(unknown_choice("W&B mode (wandb.mode, or the environment's WANDB_MODE)", name, WANDB_MODES))
    return WANDB_MODES[name]
