"""What each engine sends in a step and keeps on a process, by its algorithm. Pure arithmetic.

Letters: N numbers that are trained (banks, and the model's own parameters), n processes. All in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dist_ssn.cost.fabric import Fabric

NUMBER = 4
HALVES = {"ddp": 2, "mpi": 2, "zero-0": 2, "zero-1": 3, "zero-2": 3, "zero-3": 2, "fsdp": 2}
"""Halves of an all-reduce (a reduce-scatter, an all-gather) of everything, in a step. DeepSpeed (0.19) does the first half of
stages 1 and 2 by an all-reduce. Stage 3 and FSDP2 gather a bank once in a step, since they keep it until backward has read it."""
PARTED = {
    **{"zero-1": ("optimizer",), "zero-2": ("optimizer", "gradient")},
    **{"zero-3": ("optimizer", "gradient", "parameters"), "fsdp": ("optimizer", "gradient", "parameters")},
}
"""What a process keeps only its part of, between two steps (Rajbhandari et al. 2020, section 5)."""


@dataclass(frozen=True)
class Footprint:
    """One engine's, per process.

    Args:
        wire_bytes: sent in a step, by the ring formula
        seconds: that this takes on the network, if nothing is hidden
        parameters, gradient, optimizer: bytes kept between two steps (the gradient: when it is whole)
    """

    engine: str
    wire_bytes: float
    seconds: float
    parameters: float
    gradient: float
    optimizer: float

    @property
    def kept(self) -> float:
        return self.parameters + self.gradient + self.optimizer


def footprint(engine: str, numbers: int, fabric: Fabric, moments: int = 2, compress: str = "none") -> Footprint:
    """What `engine` (of HALVES) costs to train so many numbers.

    Args:
        moments: numbers that the optimizer keeps for each (AdamW 2, SGD with momentum 1).
        compress: of `plan.overlap.COMPRESSIONS`, for ddp.
    """
    n = fabric.processes
    payload = NUMBER * numbers / (2 if compress == "fp16" else 1)
    part: Callable[[str], float] = lambda what: 1 / n if what in PARTED.get(engine, ()) else 1.0  # noqa: E731
    return Footprint(
        engine,
        wire_bytes=HALVES[engine] * (n - 1) / n * payload,
        seconds=HALVES[engine] / 2 * fabric.all_reduce_seconds(payload),
        parameters=part("parameters") * NUMBER * numbers,
        gradient=part("gradient") * NUMBER * numbers,
        optimizer=part("optimizer") * moments * NUMBER * numbers,
    )
