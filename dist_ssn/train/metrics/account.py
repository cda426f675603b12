"""The account of a run: its counters, which checkpoints keep, the cost of its steps, and its summary."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from dist_ssn.comm import CommMeter
from dist_ssn.comm.ledger import merged_rows
from dist_ssn.engines import World
from dist_ssn.errors import CheckpointError
from dist_ssn.tracking import jsonable
from dist_ssn.train.metrics.clock import Clock
from dist_ssn.train.recipe.schema import Recipe

_NUMBER = (int, float)
OF_STEPS = ("gradients", "synchronization", "parameters", "buffers")
"""Purposes of what training sends."""
OF_WAITING = ("gradients", "synchronization")
"""Purposes whose waiting time counts."""


@dataclass
class Counters:
    """Counters of a run, which a checkpoint keeps as JSON."""

    step: int = 0
    seconds: float = 0.0  # in steps: without evaluation and checkpoints
    best: float | None = None  # lowest validation loss
    stale: int = 0  # evaluations since then
    history: list[dict[str, Any]] = field(default_factory=list)
    ledger: list[dict[str, Any]] = field(default_factory=list)  # of the processes before this one
    per_step: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def from_json(run: Mapping[str, Any], path: Path, step: int) -> Counters:
        """The counters in a checkpoint.

        Args:
            run: the content, as `Account.to_json` wrote it.
            path: of the checkpoint, for the message.
            step: of the checkpoint.

        Raises:
            CheckpointError: no training run wrote `run` into the checkpoint of that step.
        """
        kinds = {"step": int, "seconds": _NUMBER, "stale": int, "history": list, "ledger": list, "per_step": dict}
        odd = sorted(run.keys() ^ {part.name for part in fields(Counters)}) or [
            name for name, kind in kinds.items() if not isinstance(run[name], kind)
        ]
        if not odd and not (run["best"] is None or isinstance(run["best"], _NUMBER)):
            odd = ["best"]
        if not odd and not all(isinstance(part, dict) for part in (*run["history"], *run["ledger"])):
            odd = ["history or ledger"]
        if not odd and run["step"] != step:
            odd = ["step"]
        if odd:
            raise CheckpointError(
                f"the checkpoint {path} was not written by dist_ssn's train ({odd[0]} has another form)"
            )
        try:
            sum(row["ring_bytes"] for row in merged_rows(run["ledger"], run["ledger"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint {path} was not written by dist_ssn's train (its ledger: {type(error).__name__} {error})"
            ) from None
        return Counters(**run)


class Account:
    """Cost of a run's steps so far, in bytes and seconds."""

    def __init__(self, meter: CommMeter, clock: Clock) -> None:
        self.meter, self.clock = meter, clock
        self.counters = Counters()
        self._after_first_step = (0, 0.0)

    def first_step_is_over(self) -> None:
        """Marks the end of a process's first step. It sends more than the others, so `per_step` leaves it out."""
        self._after_first_step = self.step_bytes()

    def step_bytes(self) -> tuple[int, float]:
        """Logical and ring bytes of all steps of this process."""
        totals = [self.meter.ledger.totals(purpose) for purpose in OF_STEPS]
        return sum(part.logical_bytes for part in totals), sum(part.ring_bytes for part in totals)

    def per_step(self) -> dict[str, float]:
        """Bytes and milliseconds of a step of this process; those of the process before it if it has made no step."""
        steps = len(self.clock.times)
        if not steps:
            return self.counters.per_step
        logical, ring = self.step_bytes()
        if steps > 1:
            logical, ring = logical - self._after_first_step[0], ring - self._after_first_step[1]
        counted = max(1, steps - 1)
        return {
            "bytes_per_step_logical": round(logical / counted),
            "bytes_per_step_ring": round(ring / counted),
            "ms_per_step": 1000 * self.clock.median(),
        }

    def exposed_per_step(self) -> dict[str, float]:
        """Milliseconds that a step of this process has waited for gradients and changes; empty if that was not measured."""
        exposed, steps = self.exposed_seconds(), len(self.clock.times)
        return {} if exposed is None or not steps else {"exposed_ms_per_step": 1000 * exposed / steps}

    def exposed_seconds(self) -> float | None:
        """Seconds that this process has waited for gradients and changes; None if that was not measured."""
        parts = [self.meter.ledger.totals(purpose).exposed_seconds for purpose in OF_WAITING]
        return None if None in parts else sum(part for part in parts if part is not None)

    def waiting(self) -> float | None:
        """Share of this process's time in steps in which it waited for gradients and changes; None if that was not measured."""
        exposed, seconds = self.exposed_seconds(), sum(self.clock.times)
        return None if exposed is None or not seconds else min(1.0, exposed / seconds)

    def ledger(self) -> list[dict[str, Any]]:
        """Rows of the ledger, summed over this process and those before it."""
        return merged_rows(self.counters.ledger, self.meter.ledger.rows())

    def ring_bytes(self) -> int:
        """Ring bytes that this rank has sent since the run began."""
        return round(sum(entry["ring_bytes"] for entry in self.ledger()))

    def to_json(self) -> dict[str, Any]:
        """The counters for a checkpoint, from which another process resumes."""
        return jsonable(asdict(replace(self.counters, ledger=self.ledger(), per_step=self.per_step())))

    def summary(self, row: Mapping[str, Any], recipe: Recipe, world: World) -> dict[str, Any]:
        """The content of `summary.json`."""
        ledger = self.ledger()
        by_purpose: dict[str, int] = {}
        for entry in ledger:
            by_purpose[entry["purpose"]] = by_purpose.get(entry["purpose"], 0) + round(entry["ring_bytes"])
        return {
            "rows": [row],
            "ring_bytes_by_purpose": by_purpose,
            "ledger": ledger,
            "best_validation_loss": self.counters.best,
            "steps": self.counters.step,
            "stopped_early": self.counters.step < recipe.steps,
            "seconds": self.counters.seconds,
            "world_size": world.world_size,
            "device": str(world.device),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "recipe": json.loads(recipe.to_json()),
        }
