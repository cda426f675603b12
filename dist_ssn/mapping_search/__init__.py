"""Search for the weights that should share a bank: `dist_ssn.search(recipe)` and `dist-ssn search`.

Source: Plummer et al. 2022, "Neural Parameter Allocation Search", arXiv 2006.10598: *where* to share is found, not set by hand.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_ssn.plan import Plan
    from dist_ssn.train.recipe.schema import Recipe

__all__ = ["search"]


def search(
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
