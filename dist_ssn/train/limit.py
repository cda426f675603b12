"""`sync.limit`: the combination of budget, period and codec whose bytes per step are within a limit.

What a recipe gives is kept: share.budget (or a plan), sync.every, and a sync.codec other than none. The rest is chosen from the
ladder below: of the combinations that keep the limit, the one with the least expected loss, of equal ones the one that sends most.
A loss is expected from measurements, assuming that more bytes are no worse (`dist_ssn.sync.losses`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dist_ssn.engines.world.join import processes_of_job
from dist_ssn.errors import RecipeError, UserError
from dist_ssn.model.specs import find_specs
from dist_ssn.plan import make_plan
from dist_ssn.sync.losses import BANK, CODECS, DENSE, reference
from dist_ssn.sync.rounds import Sent, Vector, of_every_step, of_run, parse_limit, shown, vector_of, vector_with
from dist_ssn.train.build import share_as
from dist_ssn.train.data import data_hints
from dist_ssn.train.models import build_model
from dist_ssn.train.recipe.schema import Recipe
from dist_ssn.train.recipe.sections import SyncConfig

BUDGETS = (None, 0.5, 0.25, 0.1, 0.05)
"""Budgets to choose from; None is dense."""
PERIODS = (None, 4, 16, 50)
"""Values of sync.every to choose from; None: gradients are averaged on every step."""


@dataclass(frozen=True)
class Option:
    """A combination that a recipe allows.

    Args:
        budget: as in share.budget; None is dense, or what the recipe gives.
        every: as in sync.every.
        codec: as in sync.codec.
        sent: bytes that a process sends in a step, on average over a run.
        loss: at most this much is expected of the loss over that of the dense model on every step; None if nothing is known.
    """

    budget: float | None
    every: int | None
    codec: str
    sent: float
    loss: float | None


def within_limit(recipe: Recipe, processes: int | None = None) -> tuple[Recipe, list[str]]:
    """The recipe with what its sync.limit chooses, and a sentence that says so; a recipe without a limit is returned as it is.

    Nothing is sent, and no data is read.

    Args:
        recipe: a recipe.
        processes: number of processes; None: of this job.

    Raises:
        RecipeError: nothing keeps the limit; the sentence gives the least that could be kept.
    """
    if recipe.sync.limit is None:
        return recipe, []
    limit, n = parse_limit(recipe.sync.limit), processes_of_job() if processes is None else processes
    if n == 1:
        return recipe, [f"sync.limit {recipe.sync.limit} changes nothing: a single process sends nothing"]
    options = list(options_of(recipe, n))
    kept = [option for option in options if option.sent <= limit]
    if not kept:
        least = min(options, key=lambda option: option.sent)
        raise RecipeError(
            f"sync.limit is {recipe.sync.limit}, and the least that {n} processes send with this recipe is "
            f"{shown(least.sent)}/step ({_named(recipe, least)}): set sync.limit to that or more, {_ways_to_send_less(recipe)}"
        )
    best = min(kept, key=lambda option: (math.inf if option.loss is None else option.loss, -option.sent))
    if best.loss is None:
        why = "it sends the most of those that keep the limit, and no loss of theirs was measured"
    else:
        why = (
            f"the least expected loss of those that keep the limit, at most {best.loss:.3f} times that of the dense model on every "
            f"step, if more bytes are no worse than fewer; measured in {reference(recipe.model).described}"
        )
    share = recipe.share if best.budget is None else dataclasses.replace(recipe.share, budget=best.budget)
    sync = dataclasses.replace(recipe.sync, every=best.every, codec=best.codec)
    said = f"sync.limit {recipe.sync.limit}: {_named(recipe, best)}, {shown(best.sent)} per step and process; {why}"
    return dataclasses.replace(recipe, share=share, sync=sync), [said]


def options_of(recipe: Recipe, processes: int) -> Iterator[Option]:
    """The combinations that a recipe allows, with their bytes."""
    sync = recipe.sync
    codecs = CODECS if sync.codec == "none" else (sync.codec,)
    periods = PERIODS if sync.every is None else (sync.every,)
    only_rounds = sync != SyncConfig(limit=sync.limit)  # other keys of sync are for local updates
    task = reference(recipe.model)
    for budget, kind, known, vector in vectors_of(recipe):
        for every in periods:
            for codec in codecs:
                if every is None and (only_rounds or codec != "none"):
                    continue
                loss = None if kind is None else task.at_most(kind, known, every or 1, _like(codec))
                sent = sent_per_step(vector, recipe, processes, every, codec)
                yield Option(budget, every, codec, sent.sent, loss)


def sent_per_step(vector: Vector, recipe: Recipe, processes: int, every: int | None, codec: str) -> Sent:
    """Bytes of a step, averaged over all steps but one, for a run's summary leaves out its first step."""
    if every is None:
        return of_every_step(vector, processes)
    whole = of_run(vector, codec, processes, recipe.steps, every, recipe.sync.warmup)
    return whole.times(1 / max(1, recipe.steps - 1))


def vectors_of(recipe: Recipe) -> Iterator[tuple[float | None, str | None, float | None, Vector]]:
    """The models that a recipe allows: of a recipe with a budget or a plan, one.

    Yields:
        (budget to set or None, kind of model in the table of losses or None, its share of the weights, its vector).
    """
    share = recipe.share
    hints = data_hints(recipe.data, context=recipe.model_args.get("context"))
    torch.manual_seed(recipe.seed)  # as in training, for a model function that draws random numbers
    model = build_model(recipe.model, recipe.model_args, hints)
    dense = vector_of(model)
    if share.budget is not None or share.plan is not None:
        is_bank = share.control is None
        numel = find_specs(model, share.include, share.exclude).numel
        vector = vector_of(share_as(model, share))
        fraction = 1 - (dense.values - vector.values) / numel
        yield None, BANK if is_bank else None, fraction, vector
        return
    specs = find_specs(model, share.include, share.exclude)
    for budget in BUDGETS:
        if budget is None:
            yield None, DENSE, None, dense
            continue
        try:
            plan = make_plan(specs, budget, mapping=share.mapping, morph=share.morph, seed=share.seed)
        except UserError:  # the model has no plan of that size
            continue
        yield budget, BANK, budget, vector_with(plan, dense, specs)


def _ways_to_send_less(recipe: Recipe) -> str:
    """Settings by which a recipe would send less than all that its limit may choose, in words."""
    sync = recipe.sync
    ways = ["a smaller share.budget"]
    if sync.codec not in ("none", CODECS[-1]):
        ways.append(f"sync.codec {CODECS[-1]}")
    period = PERIODS[-1] if sync.every is None else sync.every
    assert period is not None
    apart = recipe.steps - sync.warmup
    if sync.warmup:
        ways.append("a shorter sync.warmup")
    ways.append("a longer period by sync.every" if period < apart else "more steps")
    return f"{', '.join(ways[:-1])}, or {ways[-1]}"


def _like(codec: str) -> str:
    return "bf16" if codec == "fp16" else codec


def _named(recipe: Recipe, option: Option) -> str:
    """A combination as text."""
    share = recipe.share
    if option.budget is not None:
        size = f"share.budget {option.budget:g}"
    elif share.budget is not None or share.plan is not None:
        size = f"the recipe's own {'share.budget ' + str(share.budget) if share.plan is None else 'share.plan'}"
    else:
        size = "dense"
    if option.every is None:
        return f"{size}, gradients on every step"
    return f"{size}, sync.every {option.every}, sync.codec {option.codec}"
