"""Bytes that each engine sends in a step and keeps on a process, by its algorithm. Pure arithmetic.

Letters: N trainable parameters (of banks, and the model's own), n processes. All in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dist_ssn.cost.fabric import Fabric

FP32_BYTES = 4
HALVES = {"ddp": 2, "mpi": 2, "zero-0": 2, "zero-1": 3, "zero-2": 3, "zero-3": 2, "fsdp": 2}
"""Halves of an all-reduce (a reduce-scatter, an all-gather) of everything, in a step. DeepSpeed (0.19) does the first half of
stages 1 and 2 by an all-reduce. Stage 3 and FSDP2 gather a bank once in a step, since they keep it until backward has read it."""
PARTITIONED = {
    **{"zero-1": ("optimizer",), "zero-2": ("optimizer", "gradient")},
    **{"zero-3": ("optimizer", "gradient", "parameters"), "fsdp": ("optimizer", "gradient", "parameters")},
}
"""State that is partitioned over the processes between two steps (Rajbhandari et al. 2020, section 5)."""


@dataclass(frozen=True)
class Footprint:
    """One engine's communication and memory, per process.

    Args:
        engine: of HALVES.
        wire_bytes: bytes sent in a step, by the ring formula.
        seconds: time on the network, if nothing is hidden.
        parameters: bytes of parameters kept between two steps.
        gradient: bytes of the gradient, when it is complete.
        optimizer: bytes of optimizer state kept between two steps.
    """

    engine: str
    wire_bytes: float
    seconds: float
    parameters: float
    gradient: float
    optimizer: float

    @property
    def kept(self) -> float:
        """Bytes of parameters, gradient and optimizer state."""
        return self.parameters + self.gradient + self.optimizer


def footprint(engine: str, parameters: int, fabric: Fabric, moments: int = 2, compress: str = "none") -> Footprint:
    """Communication and memory of an engine.

    Args:
        engine: of HALVES.
        parameters: N.
        fabric: the processes and their links.
        moments: values of optimizer state per parameter (AdamW 2, SGD with momentum 1).
        compress: of `plan.overlap.COMPRESSIONS`, for ddp.
    """
    n = fabric.processes
    payload = FP32_BYTES * parameters / (2 if compress == "fp16" else 1)
    part: Callable[[str], float] = lambda what: 1 / n if what in PARTITIONED.get(engine, ()) else 1.0  # noqa: E731
    return Footprint(
        engine,
        wire_bytes=HALVES[engine] * (n - 1) / n * payload,
        seconds=HALVES[engine] / 2 * fabric.all_reduce_seconds(payload),
        parameters=part("parameters") * FP32_BYTES * parameters,
        gradient=part("gradient") * FP32_BYTES * parameters,
        optimizer=part("optimizer") * moments * FP32_BYTES * parameters,
    )
