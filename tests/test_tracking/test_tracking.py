"""Trackers: JSON lines that survive a kill, a console that is quiet where nobody looks, and a real W&B run offline."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from dist_ssn.errors import UserError
from dist_ssn.files import write_whole
from dist_ssn.tracking import Console, JsonLines, check_wandb, set_aside
from dist_ssn.tracking.tracker import wandb_mode
from dist_ssn.train.recipe.sections import WandbConfig

ROW = {
    "name": "small",
    "parameters": 1200,
    "validation_loss": 1.5,
    "bytes_per_step_ring": 4800,
    "total_bytes": 2e6,
    "ms_per_step": 12.5,
    "history": [],
}
EVALUATION = {"validation_loss": 1.5, "train_loss": 1.6, "samples_per_second": 640.0, "ring_bytes": 2e6, "seconds": 3.0}


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- JSON lines


def test_lines_are_json_even_for_what_json_lacks(tmp_path: Path) -> None:
    tracker = JsonLines(tmp_path / "deep" / "metrics.jsonl")
    tracker.log(1, {"loss": math.nan, "nested": (1, {"worst": -math.inf})})
    # Readable before anything is closed: a kill must lose nothing.
    assert records(tmp_path / "deep" / "metrics.jsonl") == [{"step": 1, "loss": None, "nested": [1, {"worst": None}]}]
    tracker.table("plan", [{"weight": "a"}])
    tracker.close(None)
    assert records(tmp_path / "deep" / "metrics.jsonl")[1] == {"table": "plan", "rows": [{"weight": "a"}]}


def test_going_on_keeps_what_was_before_the_checkpoint_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    odd = b'[1]\n7\n{"step": "2"}\n\xff\xfe\n'
    path.write_bytes(
        b'{"step": 1}\n{"table": "plan", "rows": []}\n{"step": 2}\n' + odd + b'{"step": 3}\n{"step": 2, "cut'
    )
    tracker = JsonLines(path, resume_step=2)
    tracker.log(3, {})
    tracker.close(None)
    assert records(path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    JsonLines(path).close(None)
    assert path.read_text() == ""


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the metrics to .*give another folder"):
        JsonLines(tmp_path / "file" / "metrics.jsonl")
    with pytest.raises(UserError, match="cannot write"):
        write_whole(tmp_path / "file" / "summary.json", "{}")


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    tracker = JsonLines(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left on device; free some disk space and resume"):
        tracker.log(1, {})


def test_former_runs_are_set_aside_one_by_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert set_aside(run) is None
    for number in (1, 2):
        run.mkdir()
        assert set_aside(run) is None, "an empty folder is no run"
        (run / "metrics.jsonl").write_text(str(number))
        assert set_aside(run) == tmp_path / "old" / f"run.{number}"
        assert not run.exists()
    assert [(tmp_path / "old" / f"run.{n}" / "metrics.jsonl").read_text() for n in (1, 2)] == ["1", "2"]


# ---------------------------------------------------------------- the console


def printed(terminal: bool, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)  # refuses what it cannot show
    console = Console("small", 10, Path("runs/small"), RichConsole(file=stream, force_terminal=terminal, width=140))
    assert console.live == terminal
    console.advance(3, 1.75, 640.0, 0.25)
    console.log(4, {"train_loss": 1.7})
    console.log(5, EVALUATION | {"validation_accuracy": 0.875})
    console.close(ROW)
    stream.seek(0)
    return stream.read()


def test_without_a_terminal_a_line_per_evaluation_and_no_bar() -> None:
    first, last = printed(terminal=False).splitlines()
    assert first == (
        "small: step 5/10 · validation loss 1.5000 · accuracy 87.50% · loss 1.6000 · 640 samples/s · 2.0 MB sent"
    )
    assert last.startswith("small: 1,200 parameters") and last.endswith("runs/small")


def test_on_a_terminal_a_bar_with_loss_speed_and_bytes() -> None:
    text = printed(terminal=True)
    for part in ("3/10", "loss 1.7500", "640 samples/s", "0.25 MB sent/step", "validation loss 1.5000"):
        assert part in text


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_console_of_any_encoding_shows_the_figures(encoding: str, terminal: bool) -> None:
    text = printed(terminal, encoding)
    assert "validation loss 1.5000" in text and "640 samples/s" in text


# ---------------------------------------------------------------- Weights & Biases


def test_the_mode_is_the_recipe_s_if_it_names_one_else_the_environment_s() -> None:
    default, offline = WandbConfig(), WandbConfig(mode="offline")
    assert wandb_mode(default, {}) == "disabled"
    assert wandb_mode(default, {"WANDB_MODE": "offline"}) == "offline"
    assert wandb_mode(default, {"WANDB_MODE": "dryrun"}) == "offline"
    assert wandb_mode(offline, {"WANDB_MODE": "disabled"}) == "offline"
    with pytest.raises(UserError, match=r"WANDB_MODE.*'ofline'.*did you mean 'offline'"):
        wandb_mode(default, {"WANDB_MODE": "ofline"})


def test_a_missing_wandb_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install dist_ssn\[wandb\]"):
        check_wandb(WandbConfig(mode="offline"))


# Its own process: W&B starts threads and a service, which this one would keep.
OFFLINE = """
import sys
from pathlib import Path
from dist_ssn.report import draw
from dist_ssn.tracking import build_tracker
from dist_ssn.train.recipe.sections import WandbConfig
folder, resume = Path(sys.argv[1]), None if sys.argv[2] == "new" else int(sys.argv[2])
config = WandbConfig(mode="offline", project=sys.argv[3])
tracker = build_tracker(config, folder, name="small", recipe={"steps": 2}, console=None, resume_step=resume, draw=draw)
tracker.table("plan", [{"weight": "a.weight", "bank": "all"}])
for step in (1, 2):
    tracker.log(step, {"train_loss": 1.0 / step, "validation_loss": 2.0 / step})
tracker.table("ledger", [{"purpose": "gradients", "ring_bytes": 12.0, "seconds": None}])
history = [{"step": step, "ring_bytes": 6 * step, "seconds": step, "validation_loss": 2.0 / step} for step in (1, 2)]
tracker.close({"name": "small", "validation_loss": 1.0, "history": history})
"""

# A .wandb file is LevelDB's log format after seven bytes: blocks of 32 KiB, in which each piece of a record has its
# checksum (4 bytes), length (2) and kind (1 whole, 2 first, 3 middle, 4 last).
READ = """
import json, struct, sys
from wandb.proto.wandb_internal_pb2 import Record
content, at, record = open(sys.argv[1], "rb").read(), 7, b""
out = {"history": [], "summary": {}}
def values(items):
    return {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
while at + 7 <= len(content):
    if 32768 - at % 32768 < 7:
        at += 32768 - at % 32768
        continue
    length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
    record += content[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):
        parsed, record = Record.FromString(record), b""
        if parsed.WhichOneof("record_type") == "history":
            out["history"].append(values(parsed.history.item))
        if parsed.WhichOneof("record_type") == "summary":
            out["summary"] |= values(parsed.summary.update)
        if parsed.WhichOneof("record_type") == "run":
            out |= {"project": parsed.run.project, "name": parsed.run.display_name, "id": parsed.run.run_id}
print(json.dumps(out))
"""


def wandb_offline(folder: Path, resume: str, project: str, **environment: str) -> None:
    root = Path(__file__).parents[2]
    variables = os.environ | {"PYTHONPATH": str(root), "WANDB_SILENT": "true"} | environment
    command = [sys.executable, "-c", OFFLINE, str(folder), resume, project]
    subprocess.run(command, env=variables, check=True, timeout=150)


def what_wandb_wrote(run: Path) -> dict[str, Any]:
    (file,) = run.glob("run-*.wandb")
    done = subprocess.run([sys.executable, "-c", READ, str(file)], check=True, timeout=150, capture_output=True)
    return json.loads(done.stdout)


@pytest.mark.processes
def test_an_offline_run_holds_history_plan_and_ledger_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    wandb_offline(tmp_path, "new", "dist_ssn", WANDB_PROJECT="from_the_environment")
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    first = what_wandb_wrote(run)
    assert (first["name"], first["project"]) == ("small", "from_the_environment")
    losses = {row["_step"]: row["validation_loss"] for row in first["history"] if "validation_loss" in row}
    assert losses == {1: 2.0, 2: 1.0}
    assert first["summary"]["validation_loss"] == 1.0
    tables = {path.name.split("_")[0]: json.loads(path.read_text()) for path in run.rglob("*.table.json")}
    assert tables["plan"]["data"] == [["a.weight", "all"]]
    assert (tables["ledger"]["columns"], tables["ledger"]["data"]) == (
        ["purpose", "ring_bytes", "seconds"],
        [["gradients", 12.0, None]],
    )
    pictures = {path.stem.rsplit("_", 2)[0] for path in run.rglob("media/images/report/*.png")}
    assert pictures == {"loss_against_bytes", "loss_against_steps", "loss_against_seconds"}
    # Resumed, it is the same W&B run; the recipe's own project wins; WANDB_DIR says where.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    wandb_offline(tmp_path, "2", "mine", WANDB_PROJECT="from_the_environment", WANDB_DIR=str(elsewhere))
    (run,) = (elsewhere / "wandb").glob("offline-run-*")
    second = what_wandb_wrote(run)
    assert (second["id"], second["project"]) == (first["id"], "mine")
