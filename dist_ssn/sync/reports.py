"""Reports of the workers at the end of a round: some bytes by which they notice that they no longer do the same."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dist_ssn.errors import UserError

REPORT_BYTES = 8 * 6
"""Bytes of a report on the network: six numbers of float64."""


@dataclass(frozen=True)
class Report:
    """Message of one worker before it sends its change.

    Args:
        step: number of its steps.
        asked: True for a call of `synchronize`, False for the end of a round.
        problem: it cannot take part.
        norm: of its change.
        fingerprint: of its anchor: the halves of a number below 2⁶⁴, which float64 holds.
    """

    step: int
    asked: bool
    problem: bool
    norm: float
    fingerprint: tuple[float, float]


@dataclass(frozen=True)
class Workers:
    """The processes that average their changes; an island counts as one worker.

    Args:
        ranks: of `group`, in its order; this process alone without torch.distributed.
        rank: this process's.
        group: across the islands; None for all processes.
        island: the processes of this process's island; None if it is alone in it.
        device: of the collectives.
        leader: rank that exchanges for the island, whose processes hold the same; None if each process exchanges for itself.
    """

    ranks: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None
    island: dist.ProcessGroup | None
    device: torch.device
    leader: int | None = None

    @property
    def place(self) -> int:
        """This process's place in `ranks`."""
        return self.ranks.index(self.rank)

    @property
    def count(self) -> int:
        """Number of workers."""
        return len(self.ranks)

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The values of all workers, by place in `ranks`; an island's are the mean over its processes."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.island is not None:
            dist.all_reduce(mine, group=self.island)
            mine /= dist.get_world_size(self.island)
        if self.count == 1:
            return [mine.tolist()]
        gathered = [torch.empty_like(mine) for _ in self.ranks]
        dist.all_gather(gathered, mine, group=self.group)
        return torch.stack(gathered).tolist()


def exchange_reports(mine: Report, workers: Workers) -> list[Report]:
    """The reports of all workers, by place; six numbers per worker travel."""
    rows = workers.gather([mine.step, mine.asked, mine.problem, mine.norm * mine.norm, *mine.fingerprint])
    return [
        Report(int(step), bool(asked), problem > 0, math.sqrt(square), (low, high))
        for step, asked, problem, square, low, high in rows
    ]


def require_agreement(reports: Sequence[Report], workers: Workers, problem: str | None) -> None:
    """Checks that all workers can take part, are at the same step, and hold the same anchor. All raise the same kind of error.

    Args:
        reports: of all workers.
        workers: the workers.
        problem: the reason why this process cannot take part; None if it can.

    Raises:
        UserError: a worker cannot take part; their steps differ; or their anchors do, and the message names the ranks.
    """
    if problem is not None:
        raise UserError(problem)
    if unable := [rank for rank, report in zip(workers.ranks, reports, strict=True) if report.problem]:
        raise UserError(
            f"{_names(unable)} cannot take part in the synchronization, for a reason that its own message gives"
        )
    if len({(report.step, report.asked) for report in reports}) > 1:
        found = [
            f"rank {rank} {'calls synchronize()' if report.asked else 'ends a round'} after step {report.step}"
            for rank, report in zip(workers.ranks, reports, strict=True)
        ]
        raise UserError(
            f"the workers are not at the same place: {', '.join(found)}; all must take the same number of optimizer steps (data of "
            "unequal length, or a GradScaler that skips a step on one rank, break this) and call synchronize() at the same steps"
        )
    if odd := _odd([report.fingerprint for report in reports], workers):
        raise UserError(
            f"after step {reports[0].step} the anchor on {_names(odd)} differs from that on the others: another state was loaded "
            "there, or a machine computes wrongly; go on from the last checkpoint"
        )


FACTS = (
    "the settings of local updates",
    "the trained parameters",
    "the names, shapes or dtypes of parameters and buffers",
    "the plans",
    "the kept values",
)
"""Facts that must be the same on all workers."""


def require_same(facts: Sequence[object], workers: Workers, failure: Exception | None) -> None:
    """Checks that all workers begin with the same `FACTS`, by 32 bits of each.

    Args:
        facts: a value for each of `FACTS`, whose text is compared; empty if there is a failure.
        workers: the workers.
        failure: the error of this process, so that no other waits for it.

    Raises:
        UserError: another worker has failed; or the facts differ, and the message names the ranks.
        Exception: this process has failed.
    """
    sums = [zlib.crc32(str(fact).encode()) for fact in facts] if failure is None else [0] * len(FACTS)
    rows = workers.gather([failure is not None, *sums])
    if failure is not None:
        raise failure
    if unable := [rank for rank, row in zip(workers.ranks, rows, strict=True) if row[0]]:
        raise UserError(f"{_names(unable)} cannot begin local updates, for a reason that its own message gives")
    for place, name in enumerate(FACTS, 1):
        if odd := _odd([row[place] for row in rows], workers):
            raise UserError(
                f"{name} on {_names(odd)} differ from those on the others: give all workers the same before local updates begin"
            )


def _odd(values: Sequence[object], workers: Workers) -> list[int]:
    usual, _ = Counter(values).most_common(1)[0]
    return [rank for rank, value in zip(workers.ranks, values, strict=True) if value != usual]


def _names(ranks: Sequence[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}"
