"""Reports of the workers at the end of a round: some bytes by which they notice that they no longer do the same."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dist_ssn.errors import UserError
from dist_ssn.sync.fingerprints import halves

REPORT_BYTES = 8 * 6
"""Bytes of a report on the network: six numbers of float64."""
CALLS = ("ends a round", "calls synchronize()", "enters anchored()")
"""What a worker does when it sends a report."""
ROUND, SYNCHRONIZE, ANCHORED = range(len(CALLS))


@dataclass(frozen=True)
class Report:
    """Message of one worker before it sends its change.

    Args:
        step: number of its steps.
        call: what it does, as a place in `CALLS`.
        problem: it cannot take part.
        norm: of its change.
        fingerprint: of its anchor and of the parameters that nobody averages: the halves of a number below 2⁶⁴.
    """

    step: int
    call: int
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
    rows = workers.gather([mine.step, mine.call, mine.problem, mine.norm * mine.norm, *mine.fingerprint])
    return [
        Report(int(step), int(call), problem > 0, math.sqrt(square), (low, high))
        for step, call, problem, square, low, high in rows
    ]


def require_agreement(
    reports: Sequence[Report], workers: Workers, problem: str | None, anchor: int, others: Mapping[str, int]
) -> None:
    """Checks that all workers can take part, are at the same step, and hold the same values. All raise the same kind of error.

    Args:
        reports: of all workers. In `anchored` their steps may differ.
        workers: the workers.
        problem: the reason why this process cannot take part; None if it can.
        anchor: fingerprint of this process's anchor alone.
        others: name → a number that stands for the values of a parameter that nobody averages.

    Raises:
        UserError: a worker cannot take part; their steps differ; or their values do, and the message names the ranks.
    """
    if problem is not None:
        raise UserError(problem)
    if unable := [rank for rank, report in zip(workers.ranks, reports, strict=True) if report.problem]:
        raise UserError(
            f"{_names(unable)} cannot take part in the synchronization, for a reason that its own message gives"
        )
    if len({(report.call, report.call != ANCHORED and report.step) for report in reports}) > 1:
        found = [
            f"rank {rank} {CALLS[report.call]} after step {report.step}"
            for rank, report in zip(workers.ranks, reports, strict=True)
        ]
        raise UserError(
            f"the workers are not at the same place: {', '.join(found)}; all must take the same number of optimizer steps (data of "
            "unequal length, a GradScaler that skips a step on one rank, or a state loaded on one rank only break this) and call "
            "synchronize() and anchored() together"
        )
    if odd := _odd([report.fingerprint for report in reports], workers):
        step = f"after step {reports[0].step}"
        anchors = workers.gather(halves(anchor))  # only in this case, so that a report stays as short as it is
        if odd_anchors := _odd([tuple(row) for row in anchors], workers):
            raise UserError(
                f"{step} the anchor on {_names(odd_anchors)} differs from that on the others: another state was loaded there, "
                "values were set there before the first forward, the outer optimizer was changed there, or a machine computes "
                "wrongly; go on from the last checkpoint"
            )
        raise UserError(
            f"{step} {_different(others, workers)} on {_names(odd)} differs from that on the others, and no LocalUpdates "
            "averages it: give each optimizer a LocalUpdates of its own; make values that follow the model, such as a teacher's, "
            "buffers, which are averaged, or keep them outside of the model that LocalUpdates gets"
        )


def _different(sums: Mapping[str, int], workers: Workers) -> str:
    """The first name whose sum differs between the workers."""
    names = workers.gather([zlib.crc32(" ".join(sums).encode())])
    if names.count(names[0]) < len(names):
        return "a parameter that not all workers have"
    rows = workers.gather([half for value in sums.values() for half in halves(value)])
    different = (name for at, name in enumerate(sums) if len({tuple(row[2 * at : 2 * at + 2]) for row in rows}) > 1)
    return next(different, "a parameter")


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
