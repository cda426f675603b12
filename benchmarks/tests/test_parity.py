"""Every engine gives what plain autograd gives in one process on the same global batch (benchmarks/network/parity.py, smaller)."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.network.parity import MODELS, VARIANTS, cells, is_equal, spread
from testing.launch import LAUNCHES, launch, results_of
from testing.ranks import run_ranks

_NEEDS = {"zero-0": "deepspeed", "mpi": "mpi4py"}


WORLDS: dict[int, tuple[list[str], list[str]]] = {
    1: (["gpt"], ["accumulation"]),
    2: (list(MODELS), list(VARIANTS)),
    4: (["gpt", "lstm"], ["plain", "accumulation"]),
}
"""Ranks → models and variants."""


@pytest.mark.parametrize("columns", LAUNCHES, ids=" ".join)
@pytest.mark.parametrize("ranks", WORLDS)
def test_the_cells_cover_what_they_promise(columns: tuple[str, ...], ranks: int) -> None:
    """Every engine meets every model and every variant; together the engines of a launch meet most pairs of these."""
    models, variants = WORLDS[ranks]
    chosen = spread(list(columns), models, variants)
    for column in columns:
        mine = [(model, variant) for engine, model, variant in chosen if engine == column]
        assert ({model for model, _ in mine}, {variant for _, variant in mine}) == (set(models), set(variants))
    pairs = {(model, variant) for _, model, variant in chosen}
    assert len(pairs) == min(len(columns), len(models)) * len(variants)


@pytest.mark.distributed
@pytest.mark.parametrize("columns", LAUNCHES, ids=" ".join)
@pytest.mark.parametrize("ranks", WORLDS)
def test_an_engine_does_what_one_process_does(columns: tuple[str, ...], ranks: int) -> None:
    package = _NEEDS.get(columns[0])
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'dist_ssn[all]'")
    models, variants = WORLDS[ranks]
    chosen = spread(list(columns), models, variants)
    if columns[0].startswith("mpi"):
        given = ("--models", *models, "--variants", *variants)
        found = launch(columns, ranks, "benchmarks.network.parity", *given, "--spread")
    else:
        found = run_ranks(results_of, ranks, cells, list(columns), models, variants, chosen, timeout=170)[0]
    assert {(one["engine"], one["model"], one["variant"]) for one in found} == chosen
    assert len(found) == len(columns) * len(variants)
    assert [cell for cell in found if not is_equal(cell)] == []
