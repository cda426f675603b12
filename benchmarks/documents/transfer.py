"""Tables of the transfers: fine-tuning by a generated difference, and by other methods."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.markdown import grid
from benchmarks.result_files import latest, lines_of


def _table(transfer: str) -> str:
    """A row per method, at the learning rate that is best for seed 0; every seed is shown; fewest trained parameters first."""
    mine = [line for line in lines_of("transfer") if line.get("transfer", "gpt") == transfer]
    found = latest(mine, ("method", "seed", "lr"))
    trained = {name: line["trained"] for (name, _, _), line in found.items()}
    accuracy = any("accuracy" in line for line in mine)
    rows = []
    for method in sorted(trained, key=trained.__getitem__):
        runs = [line for (name, _, _), line in found.items() if name == method]
        best = min((line for line in runs if line["seed"] == 0), key=lambda line: line["loss"])
        same = sorted((line for line in runs if line["lr"] == best["lr"]), key=lambda line: line["seed"])
        losses = [line["loss"] for line in same]
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


TABLES: dict[str, Callable[[], str]] = {
    "transfer": lambda: _table("gpt"),
    "transfer-long": lambda: _table("gpt, 10,000 steps"),
    "transfer-wide-resnet": lambda: _table("wide resnet"),
    "transfer-vit": lambda: _table("vit"),
}
