"""Weights & Biases. The only file that imports wandb."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_ssn.errors import UserError
from dist_ssn.tracking.wandb_settings import Draw, WandbSettings


class WandbTracker:
    """A W&B run with the metrics as history, the plan and the ledger as tables, and at the end the report's plots as pictures.

    The environment's `WANDB_PROJECT`, `WANDB_ENTITY`, `WANDB_DIR`, `WANDB_NAME`, `WANDB_TAGS` and `WANDB_RUN_ID` replace settings
    that the recipe leaves at their defaults. Without `WANDB_DIR`, the files are in the run's own folder.

    Args:
        config: settings of W&B.
        mode: "offline" or "online".
        folder: the run's.
        name: the run's.
        recipe: the run's recipe, as W&B shows it.
        resume: continue the W&B run that was started in `folder`, if there was one.
        draw: draws the pictures that W&B gets at the end; None: no pictures.

    Raises:
        UserError: W&B does not start.
    """

    def __init__(
        self,
        config: WandbSettings,
        mode: str,
        folder: Path,
        *,
        name: str,
        recipe: Mapping[str, Any],
        resume: bool,
        draw: Draw | None = None,
    ) -> None:
        import wandb

        remembered = folder / "wandb_id"
        run_id = os.environ.get("WANDB_RUN_ID") or (
            remembered.read_text(encoding="utf-8") if resume and remembered.exists() else None
        )
        try:
            self._run = wandb.init(
                mode="offline" if mode == "offline" else "online",
                project=_chosen(config, "project", "WANDB_PROJECT"),
                entity=_chosen(config, "entity", "WANDB_ENTITY"),
                tags=_chosen(config, "tags", "WANDB_TAGS") or None,
                name=None if "WANDB_NAME" in os.environ else name,
                dir=None if "WANDB_DIR" in os.environ else str(folder),
                config=dict(recipe),
                id=run_id,
                resume="allow" if run_id else None,
            )
        except wandb.Error as error:
            raise UserError(
                f"W&B did not start in mode {mode!r} ({error}): correct that, or set wandb.mode to offline or disabled"
            ) from error
        remembered.write_text(self._run.id, encoding="utf-8")
        self._table, self._image, self._draw_rows = wandb.Table, wandb.Image, draw

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs the metrics of one step."""
        self._run.log(dict(values), step=step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Logs a table."""
        columns: list[Any] = list(rows[0]) if rows else ["nothing was sent"]
        self._run.log({name: self._table(columns=columns, data=[[row[column] for column in columns] for row in rows])})

    def close(self, row: Mapping[str, Any] | None) -> None:
        """Ends the W&B run, with the run's row as its summary and with the report's plots."""
        if row is not None:
            self._run.summary.update({key: value for key, value in row.items() if key != "history"})
            self._draw(row)
        self._run.finish(exit_code=int(row is None))

    def _draw(self, row: Mapping[str, Any]) -> None:
        if self._draw_rows is None or all(point["validation_loss"] is None for point in row["history"]):
            return
        with tempfile.TemporaryDirectory() as folder:  # W&B keeps a copy
            pictures = self._draw_rows([dict(row)], Path(folder))
            images = {
                picture.file: self._image(f"{folder}/{picture.file}", caption=picture.caption) for picture in pictures
            }
            self._run.log({f"report/{Path(file).stem}": image for file, image in images.items()})


def _chosen(config: WandbSettings, field: str, variable: str) -> Any:
    """The recipe's value if it differs from the default; else None if the environment has one, which wandb then reads."""
    value, default = getattr(config, field), getattr(type(config)(), field)
    return None if value == default and os.environ.get(variable) else value
