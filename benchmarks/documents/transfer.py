"""Table of a transfer: fine-tuning by a generated difference, and by other methods."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.markdown import grid
from benchmarks.result_files import latest, lines_of


def transfer() -> str:
    """A row per method, at the learning rate that is best for seed 0; every seed is shown; fewest trained parameters first."""
    found = latest(lines_of("transfer"), ("method", "seed", "lr"))
    trained = {name: line["trained"] for (name, _, _), line in found.items()}
    rows = []
    for method in sorted(trained, key=trained.__getitem__):
        runs = [line for (name, _, _), line in found.items() if name == method]
        best = min((line for line in runs if line["seed"] == 0), key=lambda line: line["loss"])
        same = sorted((line for line in runs if line["lr"] == best["lr"]), key=lambda line: line["seed"])
        losses = [line["loss"] for line in same]
        each = f" ({', '.join(f'{loss:.3f}' for loss in losses)})" if len(losses) > 1 else ""
        rows.append(
            [
                method,
                f"{best['trained']:,}",
                f"{best['trained'] / best['of']:.2%}",
                f"{best['lr']:g}",
                f"{sum(losses) / len(losses):.3f}{each}",
            ]
        )
    return grid(("method", "trained", "of the model", "best learning rate", "validation loss"), rows)


TABLES: dict[str, Callable[[], str]] = {"transfer": transfer}
