"""Tables of fine-tuning by a generated difference, and by other methods: transfers, memory, bytes, rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.markdown import grid
from benchmarks.result_files import latest, lines_of

MIB = 2**20


def _table(transfer: str) -> str:
    """A row per method, at the learning rate with the best mean over most seeds, and each seed; fewest trained parameters first.

    Lines of the newest pretrained model, by its loss before the fine-tuning.
    """
    every = [line for line in lines_of("transfer") if line.get("transfer", "gpt") == transfer]
    mine = [line for line in every if line["start"] == every[-1]["start"]]
    found = latest(mine, ("method", "seed", "lr"))
    trained = {name: line["trained"] for (name, _, _), line in found.items()}
    accuracy = any("accuracy" in line for line in mine)
    rows = []
    for method in sorted(trained, key=trained.__getitem__):
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for (name, _, lr), line in sorted(found.items()):
            if name == method:
                by_rate.setdefault(lr, []).append(line)
        same = min(by_rate.values(), key=lambda runs: (-len(runs), sum(run["loss"] for run in runs)))
        best, losses = same[0], [line["loss"] for line in same]
        each = f" ({', '.join(f'{loss:.3f}' for loss in losses)})" if len(losses) > 1 else ""
        row = [
            method,
            f"{best['trained']:,}",
            f"{(best['trained'] - best.get('head', 0)) / best['of']:.2%}",
            f"{best['lr']:g}",
            f"{sum(losses) / len(losses):.3f}{each}",
        ]
        rows.append([*row, f"{sum(line['accuracy'] for line in same) / len(same):.1%}"] if accuracy else row)
    share = "of the model, without the head" if accuracy else "of the model"
    heads = ["method", "trained", share, "best learning rate", "validation loss"]
    return grid([*heads, "accuracy"] if accuracy else heads, rows)


def _memory() -> str:
    """Peak of a step, and its parts, method by method."""
    rows = []
    found = latest(lines_of("keep_memory"), ("method",))
    full = found["full",]["peak_bytes"]
    for line in found.values():
        parts = (line[key] / MIB for key in ("optimizer_bytes", "gradient_bytes", "peak_bytes"))
        ratio = f"{line['peak_bytes'] / full:.0%}"
        rows.append([line["method"], f"{line['trained']:,}", *(f"{part:,.0f}" for part in parts), ratio])
    return grid(("method", "trained", "optimizer, MiB", "gradients, MiB", "peak of a step, MiB", "to full"), rows)


def _bytes() -> str:
    """Bytes of whole runs on two hosts, by their devices, beside those of the bank alone."""
    rows = []
    for line in latest(lines_of("keep_bytes"), ("by", "budget", "steps")).values():
        hosts = [
            " and ".join(f"{value / 1e3:,.1f}" for value in line[f"{key}_bytes"]) for key in ("sent", "alone", "beyond")
        ]
        ring = f"{line['ring_bytes'] / 1e3:,.1f}"
        rows.append([line["by"], f"{line['parameters']:,}", str(line["steps"]), ring, *hosts])
    sizes = ("ring formula, kB", "sent by each host, kB", "the bank alone, kB", "beyond it, kB")
    return grid(("by", "bank", "steps", *sizes), rows)


def _rounds() -> str:
    """Losses and bytes with gradients on every step, and in rounds; seeds in parentheses."""
    cells: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for line in latest(lines_of("keep_rounds"), ("method", "workers", "every", "seed")).values():
        cells.setdefault((line["method"], line["workers"], line["every"]), []).append(line)
    rows = []
    for (method, workers, every), lines in cells.items():
        losses = [line["loss"] for line in lines]
        each = f" ({', '.join(f'{loss:.3f}' for loss in losses)})" if len(losses) > 1 else ""
        sent = [f"{lines[0][key] / 1e3:,.1f}" for key in ("bytes_per_synchronization", "sent_bytes")]
        how = "every step" if every == 1 else f"every {every} steps, {lines[0]['codec']}"
        rows.append([method, str(workers), how, *sent, f"{sum(losses) / len(losses):.3f}{each}"])
    return grid(("method", "workers", "synchronized", "kB each time", "kB in the run", "validation loss"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "transfer": lambda: _table("gpt"),
    "transfer-long": lambda: _table("gpt, 10,000 steps"),
    "transfer-wide-resnet": lambda: _table("wide resnet"),
    "transfer-vit": lambda: _table("vit"),
    "keep-memory": _memory,
    "keep-bytes": _bytes,
    "keep-rounds": _rounds,
}
