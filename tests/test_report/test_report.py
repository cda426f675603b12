"""Tables and plots: right numbers, read from files; what cannot be read is one sentence."""

from __future__ import annotations

import importlib
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from dist_ssn.errors import UserError
from dist_ssn.report import (
    human_bytes,
    human_number,
    plot_loss_against_bytes,
    plot_loss_against_steps,
    read_rows,
    report,
    summary_table,
)
from dist_ssn.report.coefficients import read_coefficients
from dist_ssn.sharing.bank import Bank
from dist_ssn.train.loop import train
from dist_ssn.train.recipe.read import load_recipe

BLUE, VERMILION = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def row(name: str, per_step: int, loss: float | None = 1.5, **more: Any) -> dict[str, Any]:
    history = [
        {"step": step, "ring_bytes": per_step * step, "seconds": step / 5, "validation_loss": 1.5 + 10 / step}
        for step in (10, 20, 40)
    ]
    return {
        "name": name,
        "parameters": per_step // 4,
        "optimizer_bytes": 2 * per_step,
        "bytes_per_step_logical": per_step,
        "bytes_per_step_ring": per_step,
        "total_bytes": 40 * per_step,
        "ms_per_step": 181.23,
        "validation_loss": loss,
        "history": history,
        **more,
    }


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"rows": rows}))
    return folder


def shown(rows: list[dict[str, Any]], width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(summary_table(rows))
    return stream.getvalue()


def has_colour(path: Path, colour: tuple[int, int, int]) -> bool:
    pixels = np.round(imread(path)[..., :3] * 255).astype(int)
    return bool((np.abs(pixels - np.array(colour)).max(axis=-1) <= 2).sum() > 100)


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize(
    ("count", "number", "in_bytes"),
    [
        (0, "0", "0 B"),
        (7, "7", "7 B"),
        (999, "999", "999 B"),
        (1000, "1 k", "1 kB"),
        (999_499, "999 k", "999 kB"),
        (999_600, "1 M", "1 MB"),
        (1_262_000, "1.26 M", "1.26 MB"),
        (4.04e9, "4.04 G", "4.04 GB"),
        (5e15, "5e+03 T", "5e+03 TB"),
    ],
)
def test_numbers_for_people(count: float, number: str, in_bytes: str) -> None:
    assert (human_number(count), human_bytes(count)) == (number, in_bytes)


def test_the_table_has_every_figure_and_fits_eighty_columns() -> None:
    rows = [row("shared 10%", 520_000), row("dense twin", 5_040_000), row("equal-parameter dense", 530_000, loss=None)]
    lines = shown(rows).splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    cells = next(line for line in lines if line.startswith("shared 10%"))
    for cell in ("130 k", "1.04 MB", "520 kB", "20.8 MB", "9.7×", "181", "1.5000"):
        assert cell in cells
    assert "–" in next(line for line in lines if line.startswith("equal-parameter"))


def test_accuracy_gets_a_column_where_there_is_one() -> None:
    assert "accuracy" not in shown([row("text", 4)])
    assert "87.50%" in shown([row("text", 4), row("images", 4, validation_accuracy=0.875)], width=100)


def test_a_single_process_sends_nothing_and_is_compared_with_nothing() -> None:
    alone = row("alone", 4) | {"bytes_per_step_logical": 0, "bytes_per_step_ring": 0, "total_bytes": 0}
    assert "–" in shown([alone]) and "0 B" in shown([alone])


# ---------------------------------------------------------------- the plots


def test_plots_are_pictures_with_a_line_for_each_run(tmp_path: Path) -> None:
    runs = [row("shared", 100_000), row("dense", 1_000_000)]
    for plot in (plot_loss_against_bytes, plot_loss_against_steps):
        path = plot(runs, tmp_path / "plots" / f"{plot.__name__}.png")
        height, width = imread(path).shape[:2]
        assert (height, width) == (675, 1125)
        assert has_colour(path, BLUE) and has_colour(path, VERMILION)
        single = plot(runs[:1], tmp_path / "single.png")
        assert has_colour(single, BLUE) and not has_colour(single, VERMILION)


def test_runs_that_have_sent_nothing_have_no_place_on_an_axis_of_bytes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of the runs \(alone\) has evaluations with several processes"):
        plot_loss_against_bytes([row("alone", 0)], tmp_path / "plot.png")
    mixed = plot_loss_against_bytes([row("alone", 0), row("two", 1000)], tmp_path / "plot.png")
    assert has_colour(mixed, VERMILION) and not has_colour(mixed, BLUE)
    with pytest.raises(UserError, match="cannot write the plot"):
        plot_loss_against_steps([row("two", 1000)], mixed / "below_a_file.png")


# ---------------------------------------------------------------- the report


def test_a_report_from_folders_files_and_folders_of_folders(tmp_path: Path) -> None:
    one = written(tmp_path / "runs" / "one", row("one", 1000))
    written(tmp_path / "runs" / "two", row("two", 2000))
    written(tmp_path / "runs" / "old" / "one.1", row("former", 1000))
    assert [found["name"] for found in read_rows([tmp_path / "runs"])] == ["one", "two"]
    assert [found["name"] for found in read_rows([one / "summary.json", one, tmp_path / "runs"])] == ["one", "two"]
    stream = io.StringIO()
    files = report([tmp_path / "runs"], tmp_path / "plots", Console(file=stream, width=100))
    plots = ["loss_against_bytes.png", "loss_against_steps.png", "loss_against_seconds.png"]
    assert [file.name for file in files] == [*plots, "index.html", "report.md"]
    assert all(file.is_file() for file in files)
    assert "one" in stream.getvalue() and str(files[0]) in stream.getvalue()
    assert report([one], None, Console(file=stream)) == []
    alone = written(tmp_path / "alone", row("alone", 0))
    assert [file.name for file in report([alone], tmp_path, Console(file=stream))] == [
        *plots[1:],
        "index.html",
        "report.md",
    ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no summary.json in .*: give the folder of a finished run"),
        ('{"rows": [', "is not a summary of runs"),
        ('{"row": []}', "is not a summary of runs .KeyError"),
        ("[]", "is not a summary of runs .TypeError"),
        ('{"rows": []}', "there are no runs to report"),
        ('{"rows": [{"parameters": 5}]}', "row 0 has no name"),
        (json.dumps({"rows": [row("a", 4) | {"total_bytes": "many"}]}), "row 0 .a.: total_bytes is 'many', expected a"),
    ],
)
def test_what_is_no_summary_is_told(tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        read_rows([tmp_path])


@pytest.mark.parametrize("morph", ["wavg", "mask", "offset"])
def test_coefficients_are_those_of_the_trained_model(tmp_path: Path, morph: str) -> None:
    sizes = {"layers": 1, "width": 16, "heads": 2, "context": 16}
    settings = ["steps=3", "output=runs", f"share.morph={morph}", "share.budget=60%", "evaluate_batches=1"]
    recipe = load_recipe(None, [*settings, f"model_args={json.dumps(sizes)}", f"output={tmp_path}", "name=a"])
    model = train(recipe, progress=False).model
    wanted = {
        slot.name: bank.coefficients[start : start + slot.coefficients].detach().numpy()
        for bank in model.modules()
        if isinstance(bank, Bank) and bank.coefficients is not None
        for slot, start in zip(
            bank.group.slots,
            itertools.accumulate((slot.coefficients for slot in bank.group.slots), initial=0),
            strict=False,
        )
        if slot.coefficients
    }
    found = read_coefficients(tmp_path / "a")
    assert found.keys() == wanted.keys() and bool(found) == (morph != "offset")
    for name, values in wanted.items():
        assert np.array_equal(found[name], values)
    stream = io.StringIO()
    files = report([tmp_path / "a"], tmp_path / "page", Console(file=stream, width=200))
    drawn = {path.name for path in files if path.name.startswith("coefficients")}
    assert drawn == ({"coefficients_a.png"} if found else set())
    assert ("coefficients of a" in stream.getvalue()) == bool(found)
    for values in found.values():
        assert f"{values[0]:.2f}" in stream.getvalue()


def test_coefficients_of_a_damaged_checkpoint(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", row("a", 400))
    assert read_coefficients(folder) == {}
    checkpoint = folder / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    for plan in ("[]", "no json"):
        (checkpoint / "plan.json").write_text(plan)
        with pytest.raises(UserError, match=r"the coefficients in .*step-00000003 cannot be read"):
            read_coefficients(folder)
    stream = io.StringIO()
    assert report([folder], console=Console(file=stream, width=200)) == []
    assert "left out: the coefficients in" in stream.getvalue() and "run" in stream.getvalue()
    (checkpoint / "plan.json").write_text("null")
    assert read_coefficients(folder) == {}


def test_coefficients_of_two_runs_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [written(tmp_path / number / "a", row("a", 400)) for number in ("1", "2")]
    module = importlib.import_module("dist_ssn.report.compare")  # its package's attribute of that name is the function
    monkeypatch.setattr(module, "read_coefficients", lambda folder: {"w": np.ones(3)})
    files = report(folders, tmp_path / "page", Console(file=io.StringIO()))
    assert {path.name for path in files if "coef" in path.name} == {"coefficients_a.png", "coefficients_a-2.png"}
