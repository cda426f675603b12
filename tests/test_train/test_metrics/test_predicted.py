"""A run is told beside what was said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dist_ssn.errors import RecipeError
from dist_ssn.report import report
from dist_ssn.train.loop import train
from dist_ssn.train.metrics.predicted import comparison
from dist_ssn.train.recipe.prediction_file import alternative_of
from dist_ssn.train.recipe.read import load_recipe

SAID = {"bytes_per_step_logical": 1000, "exposed_ms_per_step": 5.0, "ms_per_step": 40.0}
QUICK = ["--data.name=digits", "--model=wide_resnet", '--model_args={"depth": 10, "width": 1}', "--steps=3"]
QUICK += ["--batch_size=8", "--evaluate_every=3", "--evaluate_batches=1", "--share.budget=20%"]


def prediction(path: Path, content: Any = None) -> str:
    path.write_text(
        json.dumps({"ways": [{"way": "none", **SAID}, {"way": "dense", **SAID}]} if content is None else content)
    )
    return str(path)


@pytest.mark.parametrize(
    ("budget", "mapping", "overlap", "way"),
    [
        (None, "auto", "none", "dense"),
        (None, "auto", "segments:4", "dense"),
        (0.1, "auto", "none", "none"),
        (0.1, "auto", "sums:2", "sums:2"),
        (0.1, "depth:4", "none", "depth:4"),
        (0.1, "depth:4", "delay", "delay"),
    ],
)
def test_the_way_is_the_recipes(budget: Any, mapping: str, overlap: str, way: str) -> None:
    assert alternative_of(budget, mapping, overlap) == way


def test_only_what_was_measured_is_compared() -> None:
    rows = comparison(SAID, {"ms_per_step": 50.0, "bytes_per_step_logical": 0})
    assert rows == [{"figure": "ms_per_step", "predicted": 40.0, "measured": 50.0, "off": pytest.approx(-0.2)}]


def test_a_run_tells_it_in_every_file(tmp_path: Path) -> None:
    said = prediction(tmp_path / "said.json")
    result = train(load_recipe(None, [*QUICK, f"--predicted={said}", f"--output={tmp_path}"]), progress=False)
    summary = json.loads((result.folder / "summary.json").read_text())
    (row,) = [row for row in summary["prediction"] if row["figure"] == "ms_per_step"]
    assert row["measured"] == result.row["ms_per_step"]
    assert row["off"] == pytest.approx(40.0 / row["measured"] - 1)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["rows"] for line in lines if line.get("table") == "prediction"] == [summary["prediction"]]
    report([result.folder], tmp_path / "page", Console(quiet=True))
    assert "Predicted and measured" in (tmp_path / "page" / "report.md").read_text()


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        ({}, [], 'it has no list of "ways"'),
        ([1], [], 'it has no list of "ways"'),
        ({"ways": [{"way": "dense"}]}, [], "it says nothing of 'none', only of dense"),
        ({"ways": [{"way": "none", **SAID, "ms_per_step": "1"}]}, [], "its ms_per_step of 'none' is '1', not a number"),
        (None, ["--engine.name=fsdp"], "predicted goes with the engine ddp or mpi, not with fsdp"),
    ],
)
def test_what_is_no_prediction_is_one_sentence(tmp_path: Path, content: Any, more: list[str], said: str) -> None:
    path = prediction(tmp_path / "said.json", content)
    with pytest.raises(RecipeError) as caught:
        train(load_recipe(None, [*QUICK, f"--predicted={path}", f"--output={tmp_path}", *more]), progress=False)
    assert said in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"predicted must be what dist-ssn plan .* printed, but .*none\.json"):
        train(load_recipe(None, [*QUICK, f"--predicted={tmp_path}/none.json", f"--output={tmp_path}"]), progress=False)
