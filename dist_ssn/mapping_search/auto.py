"""`auto`: successive halving over mappings, methods, numbers of groups and morphs, on short runs; resumable."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from dist_ssn.errors import BudgetError, RecipeError, UserError
from dist_ssn.mapping_search.halving import LEAST_STEPS, Candidate, candidates, rungs_of, schedule
from dist_ssn.mapping_search.methods import METHODS, method_steps
from dist_ssn.mapping_search.setting import OutOfTime, Setting
from dist_ssn.mapping_search.short import ShortRun
from dist_ssn.mapping_search.trials import Line, Trials
from dist_ssn.plan import Plan

_MARGIN = 0.8
"""Fraction of the seconds that is planned; the rest is for a machine that slows down."""
_CALIBRATION = 4
_ASK_EVERY = 4
"""Steps between two checks of the clock, which all ranks must make together."""

Report = Callable[[Line], None]


def auto(setting: Setting, trials: Trials, report: Report = lambda _: None) -> tuple[Plan, str]:
    """The best plan of the search, and a summary of the trials in words.

    Args:
        setting: job, weights and options.
        trials: the trials of an earlier, killed search of the same job; new ones are added.
        report: called with each trial, including those of the earlier search.

    Raises:
        UserError: the budget is too small for one trial.
    """
    return _Auto(setting, trials, report).run()


class _Auto:
    def __init__(self, setting: Setting, trials: Trials, report: Report):
        self.setting, self.trials, self.report = setting, trials, report
        self.began = time.monotonic()
        self.before = sum(float(line.get("seconds", 0)) for line in trials.lines)  # of the search that was killed
        self.plans: dict[Candidate, Plan] = {}

    def run(self) -> tuple[Plan, str]:
        wanted = candidates(self.setting.wanted.morph)
        most = self.setting.job.steps
        count, first = self._schedule(wanted, most)
        alive = wanted[:count]
        best: list[tuple[float, Candidate]] = []
        tried = 0
        try:
            alive = self._planned(alive)
            for place, (kept, steps) in enumerate(rungs_of(len(alive), first, most)):
                rung: list[tuple[float, Candidate]] = []
                for candidate in alive[:kept]:
                    try:
                        rung.append((self._trial(candidate, place, steps), candidate))
                    except OutOfTime:
                        best = best or rung  # in a rung that was cut short, not every candidate has a result
                        raise
                    tried += 1
                best = sorted(rung, key=lambda pair: pair[0])
                alive = [candidate for _, candidate in best]
        except OutOfTime:
            best = sorted(best, key=lambda pair: pair[0])
        if not best:
            raise UserError(
                f"search: max_seconds={self.setting.options.max_seconds:g} was over before the first trial ended: give more"
            )
        loss, winner = best[0]
        if loss == math.inf:
            raise RecipeError("search: every trial diverged: try a lower learning rate")
        chosen = f"{winner.mapping} with morph {winner.morph}"
        return self.plans[winner], f"{chosen}: loss {loss:.4f}, best of {len(self.plans)} plans in {tried} trials"

    # ------------------------------------------------------------ the budget

    def _schedule(self, wanted: list[Candidate], most: int) -> tuple[int, int]:
        options = self.setting.options
        costs = {name: method_steps(name, options, most) for name in METHODS}
        if options.max_seconds is None:
            return schedule(wanted, options.max_steps or most, most, costs)
        known = self.trials.find(kind="schedule", max_seconds=options.max_seconds)
        if known is None:
            pace, overhead = self._calibrate()
            steps = max(0, int(_MARGIN * self._left() / pace))
            steps, overhead = self.setting.agree((steps, math.ceil(overhead / pace)))
            count, first = schedule(wanted, steps, most, costs, overhead)
            known = {"candidates": count, "first": first}
            self._note(kind="schedule", max_seconds=options.max_seconds, **known)
        return known["candidates"], known["first"]

    def _calibrate(self) -> tuple[float, float]:
        """Seconds of a step, and of a trial besides its steps (building the model, and the evaluation)."""
        start = time.monotonic()
        run = ShortRun(self.setting.job, self.setting.world, self.setting.plan("auto"), LEAST_STEPS)
        run.step()
        run.validation_loss()
        ready = time.monotonic()
        run.run(_CALIBRATION)
        return (time.monotonic() - ready) / _CALIBRATION, ready - start

    def _left(self) -> float:
        """Seconds of the budget that are left, by rank 0's clock; infinite if the budget is one of steps."""
        limit = self.setting.options.max_seconds
        if limit is None:
            return math.inf
        return self.setting.agree(limit - self.before - (time.monotonic() - self.began))

    def _go_on(self) -> Callable[[], bool]:
        if self.setting.options.max_seconds is None:
            return lambda: True
        asked = 0

        def go_on() -> bool:
            nonlocal asked
            asked += 1
            return asked % _ASK_EVERY != 1 or self._left() > 0

        return go_on

    # ------------------------------------------------------------ plans and trials

    def _planned(self, wanted: list[Candidate]) -> list[Candidate]:
        """The candidates that have a plan at this budget, each plan once."""
        found: dict[str, Candidate] = {}
        first: UserError | None = None
        for candidate in wanted:
            try:
                plan = self.setting.plan(self._mapping(candidate), candidate.morph)
            except (
                BudgetError,
                RecipeError,
            ) as error:  # a budget too small for the number of groups; a short run that diverged
                first = first or error
                self.report({"kind": "left out", **self._shown(candidate), "reason": str(error)})
                continue
            if plan.fingerprint not in found:
                found[plan.fingerprint] = candidate
                self.plans[candidate] = plan
        if first is not None and not found:
            raise first
        return list(found.values())

    def _mapping(self, candidate: Candidate) -> str | dict[str, str]:
        if candidate.method not in METHODS:
            return candidate.mapping
        known = self.trials.find(kind="mapping", mapping=candidate.mapping)
        if known is None:
            if self._left() <= 0:
                raise OutOfTime
            start = time.monotonic()
            options = dataclasses.replace(self.setting.options, groups=candidate.groups)
            found = METHODS[candidate.method](dataclasses.replace(self.setting, options=options, go_on=self._go_on()))
            known = {"weights": found.mapping, "note": found.note, "steps": found.steps}
            known = self._note(
                kind="mapping", mapping=candidate.mapping, seconds=time.monotonic() - start, **self.setting.agree(known)
            )
        return known["weights"]

    def _trial(self, candidate: Candidate, rung: int, steps: int) -> float:
        """Validation loss after `steps` steps; infinite if training diverged."""
        plan = self.plans[candidate]
        line = self.trials.find(kind="trial", plan=plan.fingerprint, steps=steps)
        if line is None:
            go_on = self._go_on()
            if self._left() <= 0:
                raise OutOfTime
            start = time.monotonic()
            run = ShortRun(self.setting.job, self.setting.world, plan, steps)
            if not run.run(steps, go_on):
                raise OutOfTime
            loss = run.validation_loss()
            line = self._note(
                kind="trial",
                **self._shown(candidate),
                rung=rung,
                steps=steps,
                loss=loss if math.isfinite(loss) else None,
                seconds=time.monotonic() - start,
                plan=plan.fingerprint,
            )
        self.report({**line, **self._shown(candidate), "rung": rung})
        return math.inf if line["loss"] is None else line["loss"]

    def _shown(self, candidate: Candidate) -> dict[str, Any]:
        banks = len(self.plans[candidate].groups) if candidate in self.plans else None
        return {"mapping": candidate.mapping, "morph": candidate.morph, "banks": banks}

    def _note(self, **values: Any) -> Line:
        return self.trials.add(**values)
