"""Exposed communication of each overlap setting: a plan's messages, laid over a measured backward. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dist_ssn.cost.fabric import Fabric
from dist_ssn.cost.network import Sent, exposed_seconds
from dist_ssn.cost.timeline import Timeline
from dist_ssn.plan import Group, Plan
from dist_ssn.plan.overlap import Overlap, bucket_bytes, least_alone, pieces_of
from dist_ssn.sync.codecs import SLICE
from dist_ssn.sync.rounds import FP32_BYTES, Vector

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""Bytes at which DDP closes its first bucket and the others, by default."""


@dataclass(frozen=True)
class Message:
    """Gradients that are sent together.

    Args:
        payload: bytes.
        waits_for: the weights and own parameters that they wait for.
        small: number of those elements whose parameter is smaller than a codec's slice.
    """

    payload: int
    waits_for: frozenset[str]
    small: int = 0

    @property
    def vector(self) -> Vector:
        """The values that a communication hook sends for it."""
        return Vector(self.payload // FP32_BYTES, self.small)


@dataclass(frozen=True)
class Exposure:
    """Cost of one step, as means over processes and steps.

    Args:
        rounds: number of collectives.
        payload: bytes that a process hands to them.
        exposed: seconds that a process waits after its own backward.
        step: seconds of the whole step.
    """

    rounds: int
    payload: int
    exposed: float
    step: float


def messages_of(plan: Plan | None, own: Mapping[str, int], overlap: Overlap, timeline: Timeline) -> list[Message]:
    """The messages that the DDP engine sends in a step, in order.

    Args:
        plan: of a shared model; None for a dense one.
        own: name → number of elements, of each trainable parameter outside of the plan.
        overlap: the overlap setting.
        timeline: orders the messages.
    """
    groups = plan.groups if plan is not None else ()
    banks = [_message([group.size], _names(group)) for group in groups]
    # Autograd hands out a bank's own gradient first, and then those of its coefficients and gains.
    parts = [_message(_parts(group), _names(group)) for group in groups]
    parts += [_message([numel], frozenset({name})) for name, numel in own.items()]
    if overlap.kind == "delay":
        return [_joined([*banks, *parts])]
    apart: list[Message] = []
    if overlap.kind in ("segments", "sums"):
        least = least_alone([bank.payload for bank in banks])
        for group in reversed([group for group in groups if FP32_BYTES * group.size >= least]):
            apart += [
                Message(FP32_BYTES * (piece.end - piece.start), _names(group, piece.slots))
                for piece in pieces_of(group, overlap)
            ]
        banks = [bank for bank in banks if bank.payload < least]
    limit = bucket_bytes([bank.payload for bank in banks], sum(part.payload for part in parts))
    ordered = sorted([*banks, *parts], key=lambda message: float(_ready(message, timeline).mean()))
    return apart + list(_buckets(ordered, limit))


def _names(group: Group, slots: Sequence[int] | frozenset[int] | None = None) -> frozenset[str]:
    return frozenset(group.slots[i].name for i in (range(len(group.slots)) if slots is None else slots))


def _parts(group: Group) -> list[int]:
    """Sizes of a bank's parameters other than the bank."""
    own = (sum(getattr(slot, name) for slot in group.slots) for name in ("coefficients", "gains", "differences"))
    return [group.projection_parameters, *own]


def _message(sizes: Sequence[int], waits_for: frozenset[str]) -> Message:
    """Parameters of these sizes."""
    return Message(FP32_BYTES * sum(sizes), waits_for, sum(size for size in sizes if size < SLICE))


def _joined(messages: Sequence[Message]) -> Message:
    waits_for = frozenset().union(*(m.waits_for for m in messages))
    return Message(sum(m.payload for m in messages), waits_for, sum(m.small for m in messages))


def _buckets(messages: Sequence[Message], limit: int | None) -> Iterator[Message]:
    """DDP's buckets: closed when they reach `limit` bytes, or DDP's own limits."""
    limits = iter([FIRST_BUCKET] if limit is None else [])
    bucket: list[Message] = []
    most = next(limits, limit or BUCKET)
    for message in messages:
        bucket.append(message)
        if sum(m.payload for m in bucket) >= most:
            yield _joined(bucket)
            bucket, most = [], next(limits, limit or BUCKET)
    if sum(m.payload for m in bucket):
        yield _joined(bucket)


def _ready(message: Message, timeline: Timeline) -> np.ndarray:
    """Moment at which the slowest process has the message's last gradient, in seconds: [steps]."""
    times = [timeline.ready[name] for name in message.waits_for if name in timeline.ready]
    return np.max([time.max(axis=1) for time in times], axis=0) if times else timeline.end.max(axis=1)


def predict(
    messages: Sequence[Message],
    overlap: Overlap,
    timeline: Timeline,
    fabric: Fabric,
    seconds: Sequence[float] | None = None,
) -> Exposure:
    """Lays a step's messages over each measured step.

    gloo's receiver announces that it is ready before a round's bytes leave, which adds a latency to each round. With two or
    more messages, one announcement overlaps another message's bytes, so only a single message waits for it
    (docs/results/cost.md).

    Args:
        messages: in their order.
        overlap: the overlap setting.
        timeline: the measured steps.
        fabric: the processes and their links.
        seconds: of each message, if it is no all-reduce.
    """
    if seconds is None:
        seconds = [fabric.all_reduce_seconds(message.payload) for message in messages]
        if len(seconds) == 1 and fabric.algorithm == "ring":  # NCCL has no such announcement
            seconds[0] += fabric.all_reduce_seconds(0)
    drag = 2 * (fabric.processes - 1) * timeline.drag
    # A delayed message is sent during the whole next step.
    starts = [
        np.zeros(len(timeline.end)) if overlap.kind == "delay" else _ready(message, timeline) for message in messages
    ]
    exposed = np.empty_like(timeline.end)
    for step, process in np.ndindex(exposed.shape):
        sent = [Sent(float(start[step]), time, drag) for start, time in zip(starts, seconds, strict=True)]
        exposed[step, process] = exposed_seconds(sent, float(timeline.end[step, process]))
    return Exposure(
        rounds=len(messages),
        payload=sum(message.payload for message in messages),
        exposed=float(exposed.mean()),
        step=float((timeline.end + exposed).mean()),
    )
