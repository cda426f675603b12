"""Bytes of local updates, before anything is trained: of a vector, of a round, of a run. Pure arithmetic.

Letter: n = workers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dist_ssn.comm.ledger import RING_BYTES
from dist_ssn.errors import UserError
from dist_ssn.model.specs import Specs
from dist_ssn.plan import Plan
from dist_ssn.sharing.bank import banks_of
from dist_ssn.sync import routes
from dist_ssn.sync.buffers import is_averaged
from dist_ssn.sync.codecs import find_codec
from dist_ssn.sync.reports import REPORT_BYTES
from dist_ssn.sync.trained import plain_ones

FP32_BYTES = 4
_UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_LIMIT = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-z]+)\s*/\s*(step|s)\s*")


@dataclass(frozen=True)
class Vector:
    """The trained parameters of a model, as local updates send them.

    Args:
        values: number of all of them.
        plain: number of gains, coefficients, biases and norms, which have slices of their own, of at least 4 bits.
        buffers: number of elements of floating-point buffers but those of banks, which are averaged when a run ends.
        buffer_bytes: bytes of all buffers but those of banks, which DDP hands out in each step where gradients are averaged.
    """

    values: int
    plain: int
    buffers: int = 0
    buffer_bytes: int = 0


@dataclass(frozen=True)
class Sent:
    """Bytes of one worker, per round or step.

    Args:
        handed: bytes that it hands to collectives.
        sent: bytes that it must send, by the ring formula.
    """

    handed: float
    sent: float

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.handed + other.handed, self.sent + other.sent)

    def times(self, count: float) -> Sent:
        """`count` times as many."""
        return Sent(count * self.handed, count * self.sent)


def vector_of(model: nn.Module) -> Vector:
    """The vector of a model as it is, shared or dense."""
    plain = plain_ones(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    of_banks = {id(buffer) for bank in banks_of(model) for buffer in bank.buffers()}
    others = [buffer for buffer in model.buffers() if id(buffer) not in of_banks]
    return Vector(
        values=sum(p.numel() for p in trained),
        plain=sum(p.numel() for p in trained if id(p) in plain),
        buffers=sum(buffer.numel() for buffer in others if is_averaged(buffer)),
        buffer_bytes=sum(buffer.nbytes for buffer in others),
    )


def vector_with(plan: Plan, dense: Vector, specs: Specs) -> Vector:
    """The vector that a dense model would have, if it were shared by a plan.

    Args:
        plan: a plan of all weights of `specs`.
        dense: the dense model's.
        specs: its weights.
    """
    parts = sum(group.parameters - group.size for group in plan.groups)
    values = dense.values - specs.numel + plan.parameters
    return Vector(values, dense.plain + parts, dense.buffers, dense.buffer_bytes)


def of_round(vector: Vector, codec: str, workers: int) -> Sent:
    """Bytes of a round: a report, and an exchange of the changes."""
    found = routes.traffic(find_codec(codec), vector.values, vector.plain, workers)
    return Sent(found.packed_bytes, found.sent_bytes) + _report(workers)


def of_every_step(vector: Vector, workers: int) -> Sent:
    """Bytes of a step that averages gradients, by DDP."""
    if workers == 1:
        return Sent(0, 0)
    handed, buffers = FP32_BYTES * vector.values, vector.buffer_bytes
    sent = RING_BYTES["all_reduce"](handed, workers) + RING_BYTES["broadcast"](buffers, workers)
    return Sent(handed + buffers, sent)


def of_hook(buckets: Sequence[Vector], vector: Vector, codec: str, workers: int) -> Sent:
    """Bytes of a step that averages gradients in a codec, by DDP with `dist_ssn.comm_hook`.

    Args:
        buckets: DDP's; "plain" are the values of parameters that the hook does not put into the codec.
        vector: all that is trained.
        codec: name of the codec.
        workers: n.
    """
    if workers == 1:
        return Sent(0, 0)
    buffers = vector.buffer_bytes
    found = Sent(buffers, RING_BYTES["broadcast"](buffers, workers))
    for bucket in buckets:
        way = routes.traffic(find_codec(codec), bucket.values, bucket.plain, workers)
        found += Sent(way.packed_bytes, way.sent_bytes)
    return found


def rounds_of(steps: int, every: int, warmup: int = 0) -> int:
    """Exchanges in a run; the last round may be a short one."""
    warm = min(steps, warmup)
    return warm + -(-(steps - warm) // every)


def of_run(vector: Vector, codec: str, workers: int, steps: int, every: int, warmup: int = 0) -> Sent:
    """Bytes of all steps of a run by a recipe, which synchronizes after its last step, and once more when it ends."""
    if workers == 1:
        return Sent(0, 0)
    rounds = rounds_of(steps, every, warmup)
    is_whole = steps <= warmup or (steps - warmup) % every == 0
    bare = 2 if is_whole else 1  # reports of meetings that had nothing to exchange
    found = of_round(vector, codec, workers).times(rounds) + _report(workers).times(bare)
    if not vector.buffers:
        return found
    buffers = FP32_BYTES * (vector.buffers + 1)
    return found + Sent(buffers, RING_BYTES["all_reduce"](buffers, workers)).times(2)


def _report(workers: int) -> Sent:
    if workers == 1:
        return Sent(0, 0)
    return Sent(REPORT_BYTES, RING_BYTES["all_gather"](REPORT_BYTES, workers))


def parse_limit(text: str) -> float:
    """Bytes per step of a limit such as "20kB/step".

    Raises:
        UserError: the text cannot be read, or is a limit per second.
    """
    match = _LIMIT.fullmatch(text)
    if match is None or match[2] not in _UNITS:
        raise UserError(f"the limit {text!r:.60} cannot be read: give bytes per step, such as 20kB/step or 1.5MB/step")
    if match[3] == "s":
        raise UserError(
            f"the limit {text!r:.60} is per second, and how long a step takes is known only when it is measured: give a limit "
            "per step, such as 20kB/step; dist-ssn plan --cluster says how long a step takes"
        )
    size = float(match[1].replace("_", "")) * _UNITS[match[2]]
    if not size > 0:
        raise UserError(f"the limit {text!r:.60} must be above 0: give bytes per step, such as 20kB/step")
    return size


def shown(size: float) -> str:
    """Bytes as text in the form of a limit, without "/step", rounded up so that it is enough."""
    for unit in ("GB", "MB", "kB"):
        if size >= _UNITS[unit]:
            hundredths = -int(-100 * size // _UNITS[unit])
            return f"{hundredths / 100:.2f}".rstrip("0").rstrip(".") + unit
    return f"{-int(-size // 1)}B"
