"""What a report is made from beside summaries: results of benchmarks; and what it does not read, W&B's own log."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from dist_ssn.errors import UserError
from dist_ssn.report import read_rows, report


@pytest.mark.parametrize(
    "given", ["wandb/offline-run-1-x/run-x.wandb", "wandb/offline-run-1-x", "wandb", "wandb/run-2-y"]
)
@pytest.mark.parametrize("finished", [True, False])
def test_wandbs_log_is_one_sentence_that_names_the_runs_folder(tmp_path: Path, given: str, finished: bool) -> None:
    run = tmp_path / "tracked"
    for name in ("offline-run-1-x/run-x.wandb", "run-2-y/run-y.wandb"):
        (run / "wandb" / name).parent.mkdir(parents=True)
        (run / "wandb" / name).write_bytes(b":W&B")
    if finished:
        (run / "summary.json").write_text("{}")
    where = re.escape(str(run)) if finished else "where summary.json and metrics.jsonl lie"
    with pytest.raises(
        UserError, match=rf"W&B's log of a run, which dist-ssn does not read: give the run's folder, {where}$"
    ):
        read_rows([run / given])


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
    assert "1 set of results, from the files that they wrote" in page
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
