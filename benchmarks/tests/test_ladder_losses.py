"""The planner's table of losses."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.documents.ladder_losses import NAMES, content_of, rows_of
from benchmarks.result_files import lines_of
from dist_ssn.sync.losses import FILE


def line(loss: float, **changes: Any) -> dict[str, Any]:
    base = {"kind": "bank", "budget": 0.25, "every": 16, "codec": "int4", "lr": 0.1, "outer": [0.7, 0.6], "seed": 0}
    return base | {"validation_loss": loss, "workers": 4, "steps": 100} | changes


def test_the_best_setting_of_the_first_seed_over_all_of_its_seeds() -> None:
    lines = [
        line(2.0),
        line(1.5, lr=0.2),
        line(1.7, lr=0.2, seed=1),
        line(1.0, lr=0.1, seed=1),
        line(1.9, outer=[1.0, 0.0]),
    ]
    (row,) = rows_of(lines)
    assert row["loss"] == 1.6 and (row["lr"], row["outer"]) == (0.2, [0.7, 0.6])
    assert (row["seeds"], row["settings"]) == (2, 3)


def test_losses_are_over_that_of_dense_on_every_step() -> None:
    dense = {"kind": "dense", "budget": None, "every": 1, "codec": "none", "outer": [1.0, 0.0]}
    lines = [
        one | {"task": name} for name in NAMES for one in (line(3.0), line(2.0, **dense), line(2.5, lr=0.3, **dense))
    ]
    for task in content_of(lines)["tasks"].values():
        assert [row["over_dense"] for row in task["rows"]] == [1.5, 1.0]
        assert task["described"].endswith("100 steps, 4 workers")


def test_the_file_is_that_of_the_lines() -> None:
    lines = lines_of("ladder")
    if {line["task"] for line in lines} >= set(NAMES):
        said = "run python -m benchmarks.documents.ladder_losses, for there are new lines"
        assert json.loads(FILE.read_text()) == content_of(lines), said
