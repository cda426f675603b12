"""A search for the caller's own model: the checks before it, and its random state."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from dist_ssn.engines import World
from dist_ssn.errors import UserError
from dist_ssn.mapping_search.methods import METHODS, method_steps
from dist_ssn.mapping_search.own_job import Loss, OwnJob, adamw, check_loss, read_batches, require_dense
from dist_ssn.mapping_search.run import AUTO, check_method, check_options, find_plan
from dist_ssn.mapping_search.setting import Options, Setting, Wanted, read_options
from dist_ssn.mapping_search.trials import Line
from dist_ssn.model.specs import Specs, find_specs
from dist_ssn.plan import Plan
from dist_ssn.plan.budget import Budget, resolve_budget
from dist_ssn.plan.rules import parse_morph
from dist_ssn.plan.slots import LARGEST
from dist_ssn.torch_private import inside_compiled
from dist_ssn.train.ranks.raise_together import raise_together

_KNOWN = (*(name for name in METHODS if name != "manual"), AUTO)


def run(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    budget: Budget,
    *,
    method: str,
    seed: int,
    morph: str,
    select: dict[str, Any],
    optimizer: Callable[[nn.Module], Optimizer] | None,
    steps: int,
    held_out: int,
    report: Callable[[Line], None] | None,
    options: dict[str, Any],
) -> Plan:
    """Does what `dist_ssn.search` documents.

    Args:
        model: as there.
        loss: as there.
        batches: as there.
        budget: as there.
        method: as there.
        seed: as there.
        morph: as there.
        select: include and exclude, as there.
        optimizer: as there.
        steps: as there.
        held_out: as there.
        report: as there.
        options: as there.
    """
    require_dense(model)
    model = inside_compiled(model)
    chosen = _check(method, {"seed": seed, "steps": steps, "held_out": held_out}, options)
    parse_morph(morph)
    world = _world(model)

    def prepare() -> tuple[Specs, list[Any], list[Any]]:
        specs = find_specs(model, **select)
        resolve_budget(budget, specs)
        return specs, *read_batches(batches, *_needed(method, chosen, steps, held_out), method)

    # Neither a loader's order nor dropout depends on random numbers that were drawn before, or changes those that come after.
    with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
        torch.manual_seed(seed)
        specs, train, kept = raise_together(prepare, world.device)
        how = {"optimizer": optimizer or adamw, "steps": steps, "seed": seed, "select": select, "world": world}
        job = OwnJob(model, loss, train, kept, **how)
        setting = Setting(job, world, specs, Wanted(budget, morph=morph, seed=seed), chosen)
        setting = dataclasses.replace(setting, specs=setting.agree(specs))
        raise_together(lambda: check_loss(job, [weight.name for weight in specs.weights]), world.device)
        return find_plan(setting, method, report or (lambda _: None))


def _check(method: str, numbers: Mapping[str, int], options: Mapping[str, Any]) -> Options:
    """The options, checked with the method's name and the given whole numbers."""
    if "trials" in options:
        raise UserError(
            "search: trials belongs to a recipe's search, which can be resumed; report= gets each trial here"
        )
    chosen = read_options(options)
    check_method(method, _KNOWN)
    check_options(method, options)
    for name, value in numbers.items():
        least = 0 if name == "seed" else 1
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST:
            raise UserError(f"search: {name} must be a whole number of at least {least}, got {value!r:.60}")
    return chosen


def _needed(method: str, options: Options, steps: int, held_out: int) -> tuple[int, int]:
    """Numbers of batches to train on and to hold out."""
    if method == AUTO:
        return max(steps, options.short_steps or 0), held_out
    return max(1, method_steps(method, options, steps)), 0


def _world(model: nn.Module) -> World:
    """This process, on the model's device.

    Raises:
        UserError: several processes were started, but they have no process group, so that each would find another plan.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), 0, device)
    if (count := os.environ.get("WORLD_SIZE", "1")) not in ("1", ""):
        raise UserError(
            f"search: WORLD_SIZE is {count}, and each process would find a plan of its own: call "
            "torch.distributed.init_process_group() first, so that all ranks search together"
        )
    return World(0, 1, 0, device)
