"""What each way to overlap communication leaves exposed: a plan's messages, laid over a measured backward. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dist_ssn.cost.fabric import Fabric
from dist_ssn.cost.network import Sent, exposed_seconds
from dist_ssn.cost.timeline import Timeline
from dist_ssn.plan import Group, Plan
from dist_ssn.plan.overlap import Overlap, bucket_bytes, least_alone, pieces_of

NUMBER = 4
"""Bytes of a number: gradients travel in fp32."""
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""Bytes at which DDP closes its first bucket and the others, where nobody says."""


@dataclass(frozen=True)
class Message:
    """Gradients that travel together: bytes, and the weights and own parameters that they wait for."""

    payload: int
    waits_for: frozenset[str]


@dataclass(frozen=True)
class Exposure:
    """What one step costs, as means over processes and steps.

    Args:
        rounds: collectives; payload: bytes that a process hands to them.
        exposed: seconds that a process waits after its own backward; step: seconds of the whole step.
    """

    rounds: int
    payload: int
    exposed: float
    step: float


def messages_of(plan: Plan | None, own: Mapping[str, int], overlap: Overlap, timeline: Timeline) -> list[Message]:
    """What the DDP engine sends in a step, in order.

    Args:
        plan: of a shared model; None for a dense one.
        own: parameter → numbers, of all that the plan has not.
    """
    groups = plan.groups if plan is not None else ()
    banks = [Message(NUMBER * group.size, _names(group)) for group in groups]
    # Autograd hands out a bank's own gradient first, and then those of its coefficients and gains.
    parts = [Message(NUMBER * (group.parameters - group.size), _names(group)) for group in groups]
    parts += [Message(NUMBER * numbers, frozenset({name})) for name, numbers in own.items()]
    if overlap.kind == "delay":
        return [_joined([*banks, *parts])]
    apart: list[Message] = []
    if overlap.kind in ("segments", "sums"):
        least = least_alone([bank.payload for bank in banks])
        for group in reversed([group for group in groups if NUMBER * group.size >= least]):
            apart += [
                Message(NUMBER * (piece.end - piece.start), _names(group, piece.slots))
                for piece in pieces_of(group, overlap)
            ]
        banks = [bank for bank in banks if bank.payload < least]
    limit = bucket_bytes([bank.payload for bank in banks], sum(part.payload for part in parts))
    ordered = sorted([*banks, *parts], key=lambda message: float(_ready(message, timeline).mean()))
    return apart + list(_buckets(ordered, limit))


def _names(group: Group, slots: Sequence[int] | frozenset[int] | None = None) -> frozenset[str]:
    return frozenset(group.slots[i].name for i in (range(len(group.slots)) if slots is None else slots))


def _joined(messages: Sequence[Message]) -> Message:
    return Message(sum(m.payload for m in messages), frozenset().union(*(m.waits_for for m in messages)))


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
    """[steps]: when the slowest process has the message's last gradient."""
    times = [timeline.ready[name] for name in message.waits_for if name in timeline.ready]
    return np.max([time.max(axis=1) for time in times], axis=0) if times else timeline.end.max(axis=1)


def predict(messages: Sequence[Message], overlap: Overlap, timeline: Timeline, fabric: Fabric) -> Exposure:
    """Lays a step's messages over each measured step.

    gloo's receiver says that it is ready before a round's bytes leave, which is a latency more for each round. Of two messages
    one asks while the other travels, so only a message that is alone waits for it (docs/results/cost.md).
    """
    seconds = [fabric.all_reduce_seconds(message.payload) for message in messages]
    if len(seconds) == 1 and fabric.algorithm == "ring":  # NCCL asks nobody
        seconds[0] += fabric.all_reduce_seconds(0)
    drag = 2 * (fabric.processes - 1) * timeline.drag
    # A delayed message has the whole next step to travel in.
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
