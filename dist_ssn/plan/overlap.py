"""How a bank's gradient may travel while backward still computes: options as text, and the pieces it is sent in. Pure arithmetic.

A bank that all layers read is final only when backward has come to the first of them, at its very end. The ways out:

    "none"         the bank travels in one piece when it is final. With `mapping: depth:N` there are N banks, each final when
                   its own first reader is: DDP's own overlap, for any engine.
    "segments:N"   N equal stretches of the bank, each sent when its first reader's backward is done.
    "sums:N"       the whole bank N times: what the last layers have added to it travels while earlier ones compute.
    "delay"        all gradients travel while the *next* step computes, which uses those of the step before. "delay:L" sets the
                   strength of the correction, 0 for none (see `engines/delay.py`).

Letters: B numbers in a bank, N pieces.
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
"""Strength of the correction of a delayed gradient, where the user does not say."""
MAX_PIECES = 1000
LEAST_BUCKET, MOST_BUCKET = 2**16, 25 * 2**20
"""Bytes that are worth a round of their own (5 ms at 100 Mbit/s), and bytes that are worth sending before backward ends."""
RIDES_ALONG = 16
"""A bank that many times smaller than the largest one, and below LEAST_BUCKET, has no message of its own."""


def least_alone(banks: Sequence[int]) -> float:
    """Bytes from which on a bank travels by itself, of banks of so many bytes: smaller ones ride with other gradients."""
    return min(LEAST_BUCKET, max(banks, default=0) / RIDES_ALONG)


@dataclass(frozen=True)
class Overlap:
    """A way to send gradients: a kind of `KINDS`, pieces per bank, and the strength of a delay's correction."""

    kind: str = "none"
    pieces: int = 1
    correction: float = 0.0


@dataclass(frozen=True)
class Piece:
    """A stretch of a bank's gradient that is sent when the backward of all its `slots` (indices in the group) is done."""

    start: int
    end: int
    slots: frozenset[int]


def parse_overlap(text: str | Overlap) -> Overlap:
    """Reads "none", "segments", "segments:4", "sums:2", "delay", "delay:0.5".

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
    """Whether gradients can travel compressed so.

    Raises:
        PlanError: nobody knows it, or the banks would be left out of it, since they travel by themselves.
    """
    if compress not in COMPRESSIONS:
        raise PlanError(unknown_choice("compression", compress, COMPRESSIONS))
    if compress != "none" and overlap.kind != "none":
        raise PlanError(
            f"compress {compress!r} goes with overlap 'none' only: banks that travel in pieces or late are not compressed"
        )


def pieces_of(group: Group, overlap: Overlap) -> tuple[Piece, ...]:
    """The pieces of a bank's gradient, in the order in which they are sent: backward comes to the last weights first."""
    everyone = frozenset(range(len(group.slots)))
    if overlap.kind == "segments":
        count = min(overlap.pieces, group.size)
        bounds = [group.size * i // count for i in range(count + 1)]
        pieces = [
            Piece(
                start, end, frozenset(i for i, slot in enumerate(group.slots) if _reads(slot, group.size, start, end))
            )
            for start, end in itertools.pairwise(bounds)
        ]
        return tuple(sorted(pieces, key=lambda piece: (-min(piece.slots, default=len(everyone)), piece.start)))
    if overlap.kind == "sums":
        before = list(itertools.accumulate((slot.numel for slot in group.slots), initial=0))
        cuts = [group.numel * i // overlap.pieces for i in reversed(range(overlap.pieces))]
        parts = [frozenset(i for i in everyone if before[i] >= cut) for cut in cuts]
        return tuple(Piece(0, group.size, slots) for slots in dict.fromkeys(parts) if slots)
    return (Piece(0, group.size, everyone),)


def _reads(slot: Slot, bank: int, start: int, end: int) -> bool:
    """Whether the slot reads some of the bank's numbers from `start` to `end`; "hash" may read any."""
    length = bank if slot.morph == "hash" else min(bank, reach(slot, bank))
    first = slot.start
    return (first < end and start < first + length) or (first < end + bank and start + bank < first + length)


def bucket_bytes(banks: Sequence[int], own: int) -> int | None:
    """Bytes at which DDP should close a bucket; None for DDP's own choice (25 MiB, the first one 1 MiB).

    DDP fills a bucket in the order in which gradients become final, and sends it when its last one is. So:
    - no bank: DDP's choice.
    - one bank: it is final at the very end of backward, and nothing is left to overlap it with. Everything goes into one bucket:
      one round per step, which is what counts on a slow network; but for many own parameters, which may go earlier.
    - several banks: each closes a bucket when it is final, so that the banks of late layers travel while the backward of early
      layers runs. Own parameters ride along, and so do banks below `least_alone`, which count as such.

    Args:
        banks: bytes of each bank; own: bytes of all other gradients.
    """
    if not banks:
        return None
    least = least_alone(banks)
    alone = [bank for bank in banks if bank >= least]
    if len(alone) == 1:
        return MOST_BUCKET if own > MOST_BUCKET else sum(banks) + own
    return max(LEAST_BUCKET, min(alone))
