"""The account of one rank's communication: operations, bytes and seconds, by collective and purpose.

Letters: S = bytes that one rank hands to a collective; n = ranks in the collective's process group.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dist_ssn.errors import UserError, unknown_choice

PURPOSES = (
    *("gradients", "synchronization", "parameters", "initialization", "checkpoint", "metrics", "buffers", "other"),
)

# Bytes that each rank must send under a bandwidth-optimal algorithm, as a function of S and n.
# For all_gather, S is one rank's own part, so that the whole array has S * n bytes.
# broadcast, reduce and gather are counted as S on every rank, the root included.
# Source: nccl-tests, doc/PERFORMANCE.md.
RING_BYTES: dict[str, Callable[[int, int], float]] = {
    "all_reduce": lambda S, n: S * 2 * (n - 1) / n,
    "reduce_scatter": lambda S, n: S * (n - 1) / n,
    "all_gather": lambda S, n: S * (n - 1),
    "all_to_all": lambda S, n: S * (n - 1) / n,
    "scatter": lambda S, n: S * (n - 1) / n,
    "broadcast": lambda S, n: S,
    "reduce": lambda S, n: S,
    "gather": lambda S, n: S,
    "send": lambda S, n: S,
    "recv": lambda S, n: 0,
    "barrier": lambda S, n: 0,
}


@dataclass(frozen=True)
class Totals:
    """A sum over some rows of a ledger.

    Args:
        operations: collectives issued by this rank (rounds).
        logical_bytes: bytes that this rank handed to them.
        ring_bytes: bytes that this rank must send for them under a bandwidth-optimal algorithm.
        seconds: sum of each operation's time from issue to completion, overlapping ones counted twice; None when some
            operation cannot be timed (CUDA). Operations in flight are not included yet.
        exposed_seconds: seconds that the caller spent waiting; None when this is unknown for some operation.
    """

    operations: int
    logical_bytes: int
    ring_bytes: float
    seconds: float | None
    exposed_seconds: float | None


@dataclass
class Row:
    """Running sums for one collective and one purpose.

    `untimed` and `unexposed` count the operations whose time, or whose waiting time, stays unknown.
    """

    collective: str
    purpose: str
    operations: int = 0
    logical_bytes: int = 0
    ring_bytes: float = 0.0
    seconds: float = 0.0
    exposed_seconds: float = 0.0
    untimed: int = 0
    unexposed: int = 0


def check_purpose(purpose: str) -> str:
    """Returns `purpose` if it is known.

    Raises:
        UserError: the name is not in PURPOSES; the message lists those.
    """
    if purpose not in PURPOSES:
        raise UserError(unknown_choice("purpose", purpose, PURPOSES))
    return purpose


class Ledger:
    """Sums over one rank's collectives; safe to write from several threads."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], Row] = {}
        self._lock = threading.Lock()

    def add(
        self,
        collective: str,
        purpose: str,
        payload: int,
        process_group_size: int,
        *,
        timed: bool = False,
        exposed: bool = False,
    ) -> Row:
        """Books one operation, and returns its row for the times that come later.

        Args:
            collective: a key of RING_BYTES.
            purpose: one of PURPOSES.
            payload: S, in bytes.
            process_group_size: n.
            timed: `add_times` will be called with this operation's seconds.
            exposed: `add_times` will be called with the seconds that the caller waited.

        Raises:
            UserError: the collective or the purpose is unknown.
        """
        key = (collective, check_purpose(purpose))
        if collective not in RING_BYTES:
            raise UserError(unknown_choice("collective", collective, RING_BYTES))
        with self._lock:
            row = self._rows.setdefault(key, Row(*key))
            row.operations += 1
            row.logical_bytes += payload
            row.ring_bytes += RING_BYTES[collective](payload, process_group_size) if process_group_size > 1 else 0
            row.untimed += not timed
            row.unexposed += not exposed
        return row

    def add_times(self, row: Row, *, seconds: float = 0.0, exposed: float = 0.0) -> None:
        """Books seconds from issue to completion, and seconds in which the caller only waited."""
        with self._lock:
            row.seconds += seconds
            row.exposed_seconds += exposed

    def add_wait(self, collective: str, purpose: str, seconds: float) -> None:
        """Books seconds of waiting for operations that were booked before; none were, and there is nothing to book."""
        with self._lock:
            if (row := self._rows.get((collective, check_purpose(purpose)))) is not None:
                row.exposed_seconds += seconds

    def totals(self, purpose: str | None = None) -> Totals:
        """The sum over one purpose, or over everything.

        Raises:
            UserError: the name is not in PURPOSES.
        """
        if purpose is not None:
            check_purpose(purpose)
        with self._lock:
            rows = [row for row in self._rows.values() if purpose in (None, row.purpose)]
            return Totals(
                operations=sum(row.operations for row in rows),
                logical_bytes=sum(row.logical_bytes for row in rows),
                ring_bytes=sum((row.ring_bytes for row in rows), 0.0),
                seconds=None if any(row.untimed for row in rows) else sum((row.seconds for row in rows), 0.0),
                exposed_seconds=None
                if any(row.unexposed for row in rows)
                else sum((row.exposed_seconds for row in rows), 0.0),
            )

    def rows(self) -> list[dict[str, Any]]:
        """One dict per collective and purpose, with the fields of Totals, in a stable order."""
        with self._lock:
            keys = sorted(self._rows, key=lambda key: (PURPOSES.index(key[1]), key[0]))
            return [
                {
                    "purpose": row.purpose,
                    "collective": row.collective,
                    "operations": row.operations,
                    "logical_bytes": row.logical_bytes,
                    "ring_bytes": row.ring_bytes,
                    "seconds": None if row.untimed else row.seconds,
                    "exposed_seconds": None if row.unexposed else row.exposed_seconds,
                }
                for row in (self._rows[key] for key in keys)
            ]


def merged_rows(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of two ledgers as one: sums by collective and purpose; a time that is unknown in one is unknown in the sum."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in (*before, *now):
        key = (row["purpose"], row["collective"])
        if key in rows:
            sums = {
                name: None if value is None or row[name] is None else value + row[name]
                for name, value in rows[key].items()
                if not isinstance(value, str)
            }
            rows[key] = {**rows[key], **sums}
        else:
            rows[key] = dict(row)
    return list(rows.values())
