"""What a report is made from beside summaries: W&B's offline runs, and results of benchmarks."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dist_ssn.errors import UserError
from dist_ssn.report import read_rows, report

RUN = """
import sys
from dist_ssn.train.loop import train
from dist_ssn.train.recipe_file import load_recipe
keys = ["--data.name=digits", "--model=wide_resnet", '--model_args={"depth": 10, "width": 1}', "--share.budget=20%", "--steps=4"]
keys += ["--batch_size=8", "--evaluate_every=2", "--evaluate_batches=1"]
keys += ["--wandb.mode=offline", "--name=tracked", f"--output={sys.argv[1]}"]
train(load_recipe(None, keys), progress=False)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was tracked offline."""
    pytest.importorskip("wandb")
    path = tmp_path_factory.mktemp("runs")
    variables = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    variables |= {"PYTHONPATH": str(Path(__file__).parents[2]), "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", RUN, str(path)], env=variables, check=True, timeout=150)
    return path / "tracked"


def log_of(folder: Path) -> Path:
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return file


def test_wandbs_row_is_that_of_the_summary(folder: Path) -> None:
    (wanted,) = read_rows([folder])
    for path in (log_of(folder), log_of(folder).parent, folder / "wandb"):
        (row,) = read_rows([path])
        for key in ("name", "parameters", "optimizer_bytes", "bytes_per_step_ring", "total_bytes", "validation_loss"):
            assert row[key] == wanted[key], key
        assert not [key for key in row if key.startswith("_")]  # W&B's own, which change until the very end
        assert [point["step"] for point in row["history"]] == [2, 4]
        assert row["history"] == wanted["history"]


def test_both_make_the_same_page(folder: Path, tmp_path: Path) -> None:
    for number, path in enumerate((folder, folder / "wandb")):
        report([path], tmp_path / str(number), Console(quiet=True))
    first, second = ((tmp_path / name / "loss_against_steps.png").read_bytes() for name in "01")
    assert first == second


def test_a_log_that_is_cut_short_is_a_row_or_a_sentence(folder: Path, tmp_path: Path) -> None:
    content = log_of(folder).read_bytes()
    (whole,) = read_rows([log_of(folder)])
    cut, rows, sentences = tmp_path / "run-cut.wandb", 0, 0
    for length in range(0, len(content), max(1, len(content) // 50)):
        cut.write_bytes(content[:length])
        try:
            assert read_rows([cut]) == [whole]  # only what comes after the run's own summary is missing
            rows += 1
        except UserError as error:
            assert "run-cut.wandb" in str(error) and ("has not ended" in str(error) or "is not a W&B" in str(error))
            sentences += 1
    assert rows and sentences
    damaged = bytearray(content)
    damaged[len(content) // 5] ^= 1  # nothing is read from there on
    cut.write_bytes(damaged)
    with pytest.raises(UserError, match="has not ended"):
        read_rows([cut])


def test_what_is_no_log_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    file = tmp_path / "run-x.wandb"
    file.write_text("hello")
    with pytest.raises(
        UserError, match=r"run-x.wandb is not a W&B offline run of dist-ssn train \(it begins with b'hell'"
    ):
        read_rows([file])
    monkeypatch.setattr("dist_ssn.report.offline.MOST", 4)
    with pytest.raises(UserError, match="it has 5 bytes, and at most 4 are read"):
        read_rows([file])
    monkeypatch.setitem(sys.modules, "wandb.proto.wandb_internal_pb2", None)
    with pytest.raises(UserError, match=r"wandb is not installed.*pip install dist_ssn\[wandb\]"):
        read_rows([file])


LINES = [
    {"commit": "abc", "engine": "ddp", "sent": 1.5, "hosts": [1, 2]},
    {"commit": "abc", "engine": "mpi", "sent": None, "hosts": [3, 4]},
]


def test_results_are_a_table(tmp_path: Path) -> None:
    results = tmp_path / "bytes"
    results.mkdir()
    (results / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (results / "b.jsonl").write_text(json.dumps({**LINES[0], "engine": "<b>", "extra": 7}) + "\n")
    console = Console(record=True, width=120, file=io.StringIO())
    written = report([results], tmp_path / "page", console)
    assert [path.name for path in written] == ["index.html", "report.md"]
    page = (tmp_path / "page" / "index.html").read_text()
    assert "3 measurements (commit: abc)" in page and "&lt;b&gt;" in page and "<b>" not in page
    assert "1 set of results, from the files that they left" in page
    assert "ddp" in console.export_text() and "hosts" not in page
    assert "| mpi | – | – |" in (tmp_path / "page" / "report.md").read_text()


@pytest.mark.parametrize("text", ["[1]", "{", "", "[" * 100_000], ids=["list", "broken", "empty", "deep"])
def test_a_line_that_is_no_measurement_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(f'{{"a": 1}}\n{text}\n')
    with pytest.raises(UserError, match=r"x.jsonl, line 2 is not a measurement: expected a JSON object"):
        report([file])


def test_no_measurements_and_too_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("")
    with pytest.raises(UserError, match=r"there are no measurements in"):
        report([file])
    with pytest.raises(UserError, match=r"there is no summary.json in .* or results of a benchmark"):
        report([tmp_path / "nothing"])
    file.write_text('{"a": 1}\n')
    monkeypatch.setattr("dist_ssn.report.results.MOST", 3)
    with pytest.raises(UserError, match=r"x.jsonl has 9 bytes, and at most 3 are read"):
        report([file])
