"""Search for the weights that should share a bank: `dist_ssn.search` for your own model, `dist-ssn search` for a recipe.

Source: Plummer et al. 2022, "Neural Parameter Allocation Search", arXiv 2006.10598: *where* to share is found, not set by hand.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from dist_ssn.model.selectors import Selector
    from dist_ssn.plan import Plan
    from dist_ssn.plan.budget import Budget
    from dist_ssn.train.recipe.schema import Recipe

__all__ = ["search", "search_recipe"]


def search(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    budget: Budget,
    *,
    method: str = "auto",
    seed: int = 0,
    morph: str = "auto",
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    optimizer: Callable[[nn.Module], Optimizer] | None = None,
    steps: int = 200,
    held_out: int = 8,
    report: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> Plan:
    """Finds a plan for your own model, loss and data, by short training runs; `share(model, plan=plan)` takes it.

    Neither the model nor torch's random state changes. Each short run trains one deep copy of the model, so a search takes the
    memory of the model once more, and that of a training step. The batches that it needs are read once, in their order, and kept
    until it ends: 1 for weights-free, random and network, `short_steps` for pretrain (100) and gradients (24), `steps` + `held_out`
    for auto. For one seed the plan is the same in every run on one machine, except with network and max_seconds, which measure
    time.

    In a process group all ranks call it, each with batches of its own; all get the same plan.

    Args:
        model: dense, on its device, initialized as for training.
        loss: loss(model, batch) → mean loss of the batch, a scalar tensor. It calls the model that it is passed, a copy, moves the
            batch to the device, and leaves the batch as it is.
        batches: a DataLoader, a list, or any iterable, also an endless one.
        budget: see `share`.
        method: "weights-free", "pretrain", "gradients", "network", "random", or "auto", which compares several in short runs.
        seed: of the plan and of everything drawn in the short runs, such as a loader's order and dropout.
        morph: see `make_plan`; a name.
        include: see `make_plan`.
        exclude: see `make_plan`.
        optimizer: model → optimizer of the short runs; None: AdamW over `parameter_groups(model, lr=1e-3)`.
        steps: number of steps of the longest short run.
        held_out: number of batches of the validation loss (auto).
        report: called on rank 0 with each trial of auto, a dictionary, and at the end with {"kind": "found", "note": …}.
        options: fields of `dist_ssn.mapping_search.setting.Options` but trials: groups, short_steps, templates, split, cluster,
            max_steps (default: `steps`), max_seconds.

    Returns:
        The plan.

    Raises:
        UserError: an unknown method or option, a loss that is no scalar or has no gradient, too few batches, or a budget too small
            for one trial.
        ShareError: the model is shared already, cannot be copied, or has nothing to share.
        BudgetError: see `make_plan`.
    """
    from dist_ssn.mapping_search.own import run  # torch, scikit-learn and the training loop are needed only here

    select = {"include": include, "exclude": exclude}
    how = {"method": method, "seed": seed, "morph": morph, "optimizer": optimizer, "steps": steps, "held_out": held_out}
    return run(model, loss, batches, budget, select=select, report=report, options=options, **how)


def search_recipe(
    recipe: Recipe, method: str = "auto", *, output: str | os.PathLike[str] | None = None, **options: Any
) -> Plan:
    """Finds a plan for a recipe's model, data and budget, in one process or on all ranks that a launcher started.

    Args:
        recipe: with a budget (share.budget); the search replaces its mapping.
        method: a key of `dist_ssn.mapping_search.methods.METHODS`, or "auto", which compares several in short runs.
        output: the plan's JSON file, which `share.plan` reads; None: not written.
        options: fields of `dist_ssn.mapping_search.setting.Options`: groups, short_steps, max_steps, max_seconds, trials, …

    Returns:
        The plan. Every rank returns the same one.

    Raises:
        UserError: an unknown method or option, a dense recipe, a budget too small for one trial, or a recipe that cannot be
            trained.
    """
    from dist_ssn.mapping_search.run import run  # torch, scikit-learn and the training loop are needed only here

    return run(recipe, method, output, options)
