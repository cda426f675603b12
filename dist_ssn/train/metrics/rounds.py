"""Rounds of local updates in a run's metrics: how far the workers went, and how far they agreed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from dist_ssn.sync.local_updates import LocalUpdates
from dist_ssn.sync.sent import Round


class Rounds:
    """The rounds of this process, since it began.

    Args:
        local: the local updates; None without them.
    """

    def __init__(self, local: LocalUpdates | None) -> None:
        self._all: list[Round] = []
        self._logged = 0
        if local is not None:
            local.on_arrival = self._all.append

    def since_log(self) -> dict[str, float]:
        """Mean norm and agreement of the rounds since the last call; empty if there were none."""
        rounds, self._logged = self._all[self._logged :], len(self._all)
        if not rounds:
            return {}
        return {"change_norm": statistics.fmean(map(_norm, rounds)), **_agreement(rounds)}

    def figures(self) -> dict[str, float]:
        """Agreement, as a mean over all rounds, for the run's row; empty without rounds."""
        return _agreement(self._all)

    def rows(self) -> list[dict[str, Any]]:
        """One dict per round: after which step its changes were sent, their mean norm, agreement, and who was left out."""
        return [
            {
                "step": one.step,
                "change_norm": _norm(one),
                "agreement": one.agreement,
                "left_out": ", ".join(map(str, one.left_out)),
            }
            for one in self._all
        ]


def _norm(one: Round) -> float:
    """Mean norm of the changes that counted."""
    return statistics.fmean(norm for place, norm in enumerate(one.norms) if place not in one.left_out)


def _agreement(rounds: Sequence[Round]) -> dict[str, float]:
    known = [one.agreement for one in rounds if one.agreement is not None]
    return {"agreement": statistics.fmean(known)} if known else {}
