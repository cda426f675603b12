"""Each engine sends the bank and nothing else, gathers it once per step, and keeps its state small.

The measurement is benchmarks/network/engine_bytes.py.
"""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.network.engine_bytes import BUDGET, theory, workers
from dist_ssn.cluster import Link
from dist_ssn.cost.engines import HALVES, footprint
from dist_ssn.cost.fabric import Fabric
from testing.launch import LAUNCHES, launch, results_of
from testing.ranks import run_ranks

LINK = Link(latency_us=100, bandwidth_mbit=1000)
_NEEDS = {"zero-0": "deepspeed", "mpi": "mpi4py"}
TENSORS = 3 + 4 * 8 + 2  # the bank, its coefficients' and gains' tensors; biases and norms of 4 blocks; the last norm


@pytest.mark.distributed
@pytest.mark.parametrize("columns", LAUNCHES, ids=" ".join)
def test_an_engine_sends_what_theory_says(columns: tuple[str, ...]) -> None:
    package = _NEEDS.get(columns[0])
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'dist_ssn[all]'")
    if columns[0].startswith("mpi"):
        found = launch(columns, 2, "benchmarks.network.engine_bytes")
    else:
        found = run_ranks(results_of, 2, workers, list(columns), timeout=170)[0]
    for column in columns:
        dense, shared = (line for line in found if line["engine"] == column)
        told = theory(column, shared["trainable"], 2, shared["banks"])
        assert shared["ring_bytes"] == pytest.approx(told, rel=0.01), column
        if column in HALVES:
            predicted = footprint(column, shared["trainable"], Fabric(2, 1, LINK, LINK)).wire_bytes
            assert shared["ring_bytes"] == pytest.approx(predicted, rel=0.01), column
        if "sums" not in column:
            assert dense["ring_bytes"] / shared["ring_bytes"] >= 0.9 / BUDGET, column
        assert shared["optimizer_bytes"] <= (BUDGET + 0.02) * dense["optimizer_bytes"], column
        gathers = shared["rounds"].get("parameters: all_gather", 0)
        # ZeRO-3 gathers each parameter by itself, all others by group; none is gathered twice.
        assert gathers <= (TENSORS if column == "zero-3" else 2), column
