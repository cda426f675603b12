"""Summaries of another form, or cut: one sentence each, and whole runs beside them are reported."""

from __future__ import annotations

import copy
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dist_ssn.errors import UserError
from dist_ssn.report import draw, read_rows, report
from tests.test_report.test_report import row, written

WHOLE = {
    "rows": [row("a", 400, validation_accuracy=0.5)],
    "seconds": 9.0,
    "ring_bytes_by_purpose": {"gradients": 1000},
    "ledger": [{"purpose": "gradients", "seconds": 1.0, "exposed_seconds": 0.5}],
    "prediction": [{"figure": "ms", "predicted": 1.0, "measured": 2.0, "off": -0.5}],
}


def first(content: dict[str, Any]) -> dict[str, Any]:
    return content["rows"][0]


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str | None]] = {
    "rows null": (lambda c: c.update(rows=None), "rows is null, not a list"),
    "rows an object": (lambda c: c.update(rows={}), "rows is an object, not a list"),
    "row null": (lambda c: c.update(rows=[None]), "row 0 has no name"),
    "history of pairs": (lambda c: first(c).update(history=[[0, 1.0]]), r"history\[0\] is a list, expected an object"),
    "history text": (lambda c: first(c).update(history="none"), "history is 'none', expected a list"),
    "history object": (lambda c: first(c).update(history={"step": 1}), "history is an object, expected a list"),
    "no bytes": (lambda c: first(c)["history"][1].pop("ring_bytes"), r"history\[1\]: ring_bytes is missing"),
    "no loss": (lambda c: first(c)["history"][1].pop("validation_loss"), "validation_loss is missing"),
    "step text": (lambda c: first(c)["history"][0].update(step="1"), "step is '1', expected a number"),
    "seconds null": (lambda c: first(c)["history"][0].update(seconds=None), "seconds is null, expected a number"),
    "endless": (lambda c: first(c).update(ms_per_step=float("inf")), "ms_per_step is inf, expected a number"),
    "long": (lambda c: first(c).update(parameters=10**400), "parameters is 1000.*, expected a number"),
    "true": (lambda c: first(c).update(parameters=True), "parameters is True, expected a number"),
    "accuracy": (lambda c: first(c).update(validation_accuracy="high"), "validation_accuracy is 'high'"),
    "missing": (lambda c: first(c).pop("total_bytes"), "total_bytes is missing, expected a number"),
    "history null": (lambda c: first(c).update(history=None), None),
    "no history": (lambda c: first(c).pop("history"), None),
    "no evaluation": (lambda c: [p.update(validation_loss=None) for p in first(c)["history"]], None),
    "some seconds": (lambda c: first(c)["history"][0].pop("seconds"), None),
    "ledger null": (lambda c: c.update(ledger=None, prediction=None, ring_bytes_by_purpose=None, seconds=None), None),
    "odd facts": (lambda c: c.update(ledger=[1], prediction=[[1]], ring_bytes_by_purpose=[1], seconds="x"), None),
    "facts in the row": (lambda c: (first(c).update(seconds=5, prediction=7), c.pop("seconds")), None),
    "markup": (lambda c: first(c).update(name="[/] $x^$ _\\alpha"), None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_form_is_one_sentence_or_a_report(tmp_path: Path, name: str) -> None:
    change, sentence = CHANGES[name]
    content = copy.deepcopy(WHOLE)
    change(content)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/summary.json").write_text(json.dumps(content))
    if sentence is None:
        assert report([tmp_path / "a"], tmp_path / "page", Console(file=io.StringIO()))
        return
    with pytest.raises(UserError, match=sentence) as caught:
        report([tmp_path / "a"], tmp_path / "page")
    assert "\n" not in str(caught.value) and str(tmp_path / "a/summary.json") in str(caught.value)
    written(tmp_path / "whole", row("whole", 100))
    console = Console(file=io.StringIO(), width=200, record=True)
    report([tmp_path], tmp_path / "page", console)
    said = console.export_text()
    assert f"left out: {tmp_path}/a/summary.json" in said and "whole" in said
    assert "Left out: " in (tmp_path / "page/index.html").read_text(encoding="utf-8")


ODD = st.sampled_from([None, True, -1, 0, 1e999, 10**400, "", "x", [], {}, [[]], [{}], {"a": []}, float("nan")])


@settings(max_examples=150, deadline=None)
@given(number=st.integers(0, 2**32), odd=ODD)
def test_any_value_changed_is_an_error_of_ours_or_a_table(
    tmp_path_factory: pytest.TempPathFactory, number: int, odd: object
) -> None:
    content, chance = copy.deepcopy(WHOLE), random.Random(number)
    place: Any = content
    while True:
        key = chance.choice(sorted(place)) if isinstance(place, dict) else chance.randrange(len(place))
        if not isinstance(place[key], dict | list) or chance.random() < 0.2:
            break
        place = place[key]
    place[key] = odd
    folder = tmp_path_factory.mktemp("run")
    (folder / "summary.json").write_text(json.dumps(content))
    try:
        report([folder], None, Console(file=io.StringIO()))
        draw(read_rows([folder]), folder) if number % 10 == 0 else None
    except UserError as error:
        assert "\n" not in str(error)


def test_whole_runs_are_reported_beside_cut_and_foreign_ones(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    written(runs / "whole", row("whole", 100))
    for name, file, text in (
        ("cut", "summary.json", '{"rows": [{"na'),
        ("foreign", "summary.json", '{"accuracy": 1}'),
        ("twice", "summary.json", json.dumps({"rows": [row("t", 1)]}).replace('"name"', '"name": "u", "name"')),
        ("latin", "summary.json", "é"),
        ("going", "metrics.jsonl", "{}"),
        ("wandb", "offline-run-1-x/run-x.wandb", ":W&B"),
    ):
        (runs / name / file).parent.mkdir(parents=True)
        (runs / name / file).write_bytes(text.encode("latin-1"))
    console = Console(file=io.StringIO(), width=250, record=True)
    report([runs], None, console)
    said = console.export_text()
    assert "whole" in said
    for name in ("cut", "foreign", "twice", "latin"):
        assert f"left out: {runs}/{name}/summary.json is not a summary of runs" in said
    assert f"left out: {runs}/going has no summary.json, so its run has not ended" in said
    console = Console(file=io.StringIO(), width=250, record=True)
    report([runs / "wandb", runs / "cut", runs / "whole"], None, console)  # as a shell makes it of runs/*
    said = console.export_text()
    assert "left out" in said and "W&B's log of a run" in said and "whole" in said
    (runs / "trials.jsonl").write_text("no measurement")  # beside whole runs, in their folder
    console = Console(file=io.StringIO(), width=250, record=True)
    report([runs], None, console)
    said = console.export_text()
    assert f"left out: {runs}/trials.jsonl, line 1 is not a measurement" in said and "whole" in said
    with pytest.raises(UserError, match=r"there is no summary\.json in .*nowhere"):
        report([runs / "whole", runs / "nowhere"])
    with pytest.warns(UserWarning, match=r"left out: .*cut/summary\.json is not a summary of runs"):
        assert [found["name"] for found in read_rows([runs / "cut", runs / "whole"])] == ["whole"]
    with pytest.raises(UserError, match=r"cut/summary\.json is not a summary of runs"):
        report([runs / "cut"])


@pytest.mark.parametrize("sent", [0, 100])
def test_a_run_on_one_process_has_no_pictures_of_a_network(tmp_path: Path, sent: int) -> None:
    content = {**WHOLE, "rows": [row("a", sent)]}
    (tmp_path / "summary.json").write_text(json.dumps(content))
    pictures = draw(read_rows([tmp_path]), tmp_path / "page")
    files = [picture.file for picture in pictures]
    of_network = {"loss_against_bytes.png", "loss_at_10_mbit.png", "loss_at_100_mbit.png", "loss_at_1000_mbit.png"}
    assert set(files) == {"loss_against_steps.png", "loss_against_seconds.png"} | (of_network if sent else set())
    contents = [(tmp_path / "page" / file).read_bytes() for file in files]
    assert len(set(contents)) == len(contents)
    assert all("begins at the run's first evaluation, not at step 0" in picture.caption for picture in pictures)
