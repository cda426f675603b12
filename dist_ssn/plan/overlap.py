"""Overlap settings: how a bank's gradient is sent while backward still computes, and in which pieces. Pure arithmetic.

The gradient of a bank that all layers read is final only at the very end of backward, after the first layer. The settings:

    "none"         the gradient is sent in one piece when it is final. With `mapping: depth:N` there are N banks, each final when
                   the backward of its first layer is done: DDP's own overlap, for any engine.
    "segments:N"   N equal stretches of the bank, each sent when the backward of its first layer is done.
    "sums:N"       the whole bank N times: the sum over the last layers is sent while earlier layers compute.
    "delay"        all gradients are sent while the *next* step computes, and are used one step late. "delay:L" sets the
                   strength of the correction, 0 for none (see `engines/overlap/delay.py`).

Letters: B elements in a bank, N pieces.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dist_ssn.errors import PlanError, unknown_choice
from dist_ssn.plan.rules import reach
from dist_ssn.plan.slots import Group, Slot

KINDS = ("none", "segments", "sums", "delay")
COMPRESSIONS = ("none", "fp16")
DEFAULT_PIECES = {"segments": 4, "sums": 2}
CORRECTION = 1.0
"""Default strength of the correction of a delayed gradient."""
MAX_PIECES = 1000
LEAST_BUCKET, MOST_BUCKET = 2**16, 25 * 2**20
"""Bytes that justify a message of their own (5 ms at 100 Mbit/s), and bytes that justify sending before backward ends."""
MERGE_RATIO = 16
"""A bank that is this many times smaller than the largest one, and below LEAST_BUCKET, is sent with other gradients."""


def least_alone(banks: Sequence[int]) -> float:
    """Smallest size of a bank that is sent by itself; smaller ones are sent with other gradients.

    Args:
        banks: bytes of each bank.
    """
    return min(LEAST_BUCKET, max(banks, default=0) / MERGE_RATIO)


@dataclass(frozen=True)
class Overlap:
    """An overlap setting: a kind of `KINDS`, pieces per bank, and the strength of a delay's correction."""

    kind: str = "none"
    pieces: int = 1
    correction: float = 0.0


@dataclass(frozen=True)
class Piece:
    """A stretch of a bank's gradient, from `start` to `end`, sent when the backward of all `slots` (indices) is done."""

    start: int
    end: int
    slots: frozenset[int]


def parse_overlap(text: str | Overlap) -> Overlap:
    """Parses an overlap setting: "none", "segments", "segments:4", "sums:2", "delay", "delay:0.5".

    Raises:
        PlanError: an unknown kind, or a number that is out of range.
    """
    if isinstance(text, Overlap):
        return text
    kind, colon, number = text.partition(":")
    if kind not in KINDS:
        raise PlanError(unknown_choice("overlap", kind, KINDS))
    if kind == "none" and not colon:
        return Overlap()
    if kind in DEFAULT_PIECES:
        if not colon:
            return Overlap(kind, DEFAULT_PIECES[kind])
        if re.fullmatch("[0-9]{1,4}", number) and 2 <= int(number) <= MAX_PIECES:
            return Overlap(kind, int(number))
        raise PlanError(f"overlap {text!r}: {kind}:N sends a bank in N pieces, with N from 2 to {MAX_PIECES}")
    if kind == "delay":
        if not colon:
            return Overlap(kind, correction=CORRECTION)
        try:
            strength = float(number)
        except ValueError:
            strength = math.nan
        if 0 <= strength < math.inf:
            return Overlap(kind, correction=strength)
    raise PlanError(f"overlap {text!r}: write none, or delay:L with L the strength of the correction, 0 or more")


def check_compress(compress: str, overlap: Overlap) -> None:
    """Checks a compression of gradients.

    Raises:
        PlanError: it is unknown, or the overlap setting sends banks by themselves, without compression.
    """
    if compress not in COMPRESSIONS:
        raise PlanError(unknown_choice("compression", compress, COMPRESSIONS))
    if compress != "none" and overlap.kind != "none":
        raise PlanError(
            f"compress {compress!r} goes with overlap 'none' only: banks that are sent in pieces or late are not compressed"
        )


def pieces_of(group: Group, overlap: Overlap) -> tuple[Piece, ...]:
    """The pieces of a bank's gradient, in the order in which they are sent: backward begins with the last weights."""
    all_slots = frozenset(range(len(group.slots)))
    if overlap.kind == "segments":
        count = min(overlap.pieces, group.size)
        bounds = [group.size * i // count for i in range(count + 1)]
        pieces = [
            Piece(
                start, end, frozenset(i for i, slot in enumerate(group.slots) if _reads(slot, group.size, start, end))
            )
            for start, end in itertools.pairwise(bounds)
        ]
        return tuple(sorted(pieces, key=lambda piece: (-min(piece.slots, default=len(all_slots)), piece.start)))
    if overlap.kind == "sums":
        before = list(itertools.accumulate((slot.numel for slot in group.slots), initial=0))
        cuts = [group.numel * i // overlap.pieces for i in reversed(range(overlap.pieces))]
        parts = [frozenset(i for i in all_slots if before[i] >= cut) for cut in cuts]
        return tuple(Piece(0, group.size, slots) for slots in dict.fromkeys(parts) if slots)
    return (Piece(0, group.size, all_slots),)


def _reads(slot: Slot, bank: int, start: int, end: int) -> bool:
    """True if the slot reads some of the bank's elements from `start` to `end`; "hash" may read any."""
    length = bank if slot.morph == "hash" else min(bank, reach(slot, bank))
    first = slot.start
    return (first < end and start < first + length) or (first < end + bank and start + bank < first + length)


def bucket_bytes(banks: Sequence[int], own: int) -> int | None:
    """Bytes at which DDP should close a bucket; None for DDP's own choice (25 MiB, the first one 1 MiB).

    DDP fills a bucket in the order in which gradients become final, and sends it when its last gradient is final. So:
    - no bank: DDP's choice.
    - one bank: it is final at the very end of backward, and no compute is left to overlap it with. All gradients go into one
      bucket, because the number of rounds counts on a slow network; except that many own parameters may be sent earlier.
    - several banks: each closes a bucket when it is final, so that the banks of late layers are sent while the backward of early
      layers runs. Own parameters, and banks below `least_alone`, are sent with them.

    Args:
        banks: bytes of each bank.
        own: bytes of all other gradients.
    """
    if not banks:
        return None
    least = least_alone(banks)
    alone = [bank for bank in banks if bank >= least]
    if len(alone) == 1:
        return MOST_BUCKET if own > MOST_BUCKET else sum(banks) + own
    return max(LEAST_BUCKET, min(alone))
