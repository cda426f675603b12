"""Every engine gives what plain autograd gives in one process on the same global batch (benchmarks/network/parity.py, smaller)."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.network.parity import MODELS, VARIANTS, is_equal
from testing.launch import LAUNCHES, launch

_NEEDS = {"zero-0": "deepspeed", "mpi": "mpi4py"}


@pytest.mark.distributed
@pytest.mark.parametrize("columns", LAUNCHES, ids=" ".join)
@pytest.mark.parametrize(
    ("ranks", "models", "variants"),
    [
        (1, ["gpt"], ["accumulation"]),
        (2, list(MODELS), list(VARIANTS)),
        (4, ["gpt", "lstm"], ["plain", "accumulation"]),
    ],
    ids=["1 rank", "2 ranks", "4 ranks"],
)
def test_an_engine_does_what_one_process_does(
    columns: tuple[str, ...], ranks: int, models: list[str], variants: list[str]
) -> None:
    package = _NEEDS.get(columns[0])
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'dist_ssn[all]'")
    found = launch(columns, ranks, "benchmarks.network.parity", "--models", *models, "--variants", *variants)
    assert len(found) == len(columns) * len(models) * len(variants)
    assert [cell for cell in found if not is_equal(cell)] == []
