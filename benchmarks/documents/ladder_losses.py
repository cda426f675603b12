"""Writes the losses that the planner expects of a combination of rungs, from the lines of `results/ladder/`.

    python -m benchmarks.documents.ladder_losses [--results FOLDER]

For each task, kind of model, budget, period and codec: the loss at the best of the learning rates and outer optimizers that were
tried with the first seed, as a mean over all seeds of that setting, over the loss of the dense model on every step. Writes
dist_ssn/sync/ladder_losses.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.result_files import RESULTS
from dist_ssn.sync.losses import DENSE, FILE, FORMAT

Line = Mapping[str, Any]
NAMES = {
    "gpt": "a GPT with 2 layers of width 64",
    "lstm": "an LSTM with 2 layers of width 64",
    "wrn": "a Wide ResNet 10-1",
}
"""Tasks whose losses were tuned: at least three learning rates for each kind of model."""


def rows_of(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """Lines of one task → a row per kind, budget, period and codec, without `over_dense`."""
    cells: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        cells.setdefault((line["kind"], line["budget"], line["every"], line["codec"]), []).append(line)
    rows = []
    for (kind, budget, every, codec), mine in sorted(cells.items(), key=str):
        settings: dict[tuple[Any, ...], list[Line]] = {}
        for line in mine:
            settings.setdefault((line["lr"], *line["outer"]), []).append(line)
        first = {key: [line for line in some if line["seed"] == 0] for key, some in settings.items()}
        tuned = {key: some[0]["validation_loss"] for key, some in first.items() if some}
        best = min(tuned, key=lambda key: tuned[key])
        losses = [line["validation_loss"] for line in settings[best]]
        row = {"kind": kind, "budget": budget, "every": every, "codec": codec, "loss": statistics.fmean(losses)}
        rows.append({**row, "seeds": len(losses), "settings": len(tuned), "lr": best[0], "outer": list(best[1:])})
    return rows


def content_of(lines: Iterable[Line]) -> dict[str, Any]:
    """The content of the file."""
    tasks: dict[str, Any] = {}
    all_lines = list(lines)
    for name, model in NAMES.items():
        mine = [line for line in all_lines if line["task"] == name]
        rows = rows_of(mine)
        dense = next(row["loss"] for row in rows if (row["kind"], row["every"], row["codec"]) == (DENSE, 1, "none"))
        longest = max(line["steps"] for line in mine)
        described = f"{model}, {longest:,} steps, {mine[0]['workers']} workers"
        for row in rows:
            row["over_dense"] = round(row["loss"] / dense, 5)
            row["loss"] = round(row["loss"], 5)
        tasks[name] = {"described": described, "rows": rows}
    return {"format": FORMAT, "command": "python -m benchmarks.documents.ladder_losses", "tasks": tasks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "ladder", help="folder with the lines")
    arguments = parser.parse_args()
    files = sorted(arguments.results.glob("*.jsonl"))
    lines = [json.loads(text) for file in files for text in file.read_text(encoding="utf-8").splitlines()]
    content = content_of(lines)
    FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for name, task in content["tasks"].items():
        print(f"{name}: {len(task['rows'])} combinations, {task['described']}")


if __name__ == "__main__":
    main()
