"""One recipe with every engine: a run that changes engine and number of ranks at each checkpoint ends where DDP alone does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_ssn.train.loop import train
from dist_ssn.train.recipe.read import load_recipe
from testing.ranks import run_ranks

pytestmark = pytest.mark.distributed
RECIPE = """
name: run
model: gpt
model_args: {layers: 2, width: 16, heads: 2, context: 16}
data: {name: text}
share: {budget: 20%, mapping: "depth:2"}
optimizer: {name: adamw, lr: 1.0e-3}
schedule: {name: constant}
batch_size: 6
evaluate_every: 100
evaluate_batches: 4
checkpoint: {every: 2, resume: true}
"""


def _train(rank: int, world_size: int, folder: str, settings: list[str]) -> dict[str, Any]:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    return train(load_recipe(Path(folder) / "recipe.yaml", settings), progress=False).row


def run(folder: Path, engine: str, ranks: int, steps: int, *more: str, name: str = "run") -> dict[str, Any]:
    """The row of a run; MPI's launcher starts its processes by the command line (test_launchers.py does so with all)."""
    settings = [f"--output={folder}", f"--name={name}", f"--engine.name={engine}", f"--steps={steps}", *more]
    if engine != "mpi":
        return run_ranks(_train, ranks, str(folder), settings)[0]
    start = [str(Path(sys.executable).with_name("mpirun")), "-launcher", "fork", "-n", str(ranks), sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*start, "-m", "dist_ssn.cli", "train", "--config", str(folder / "recipe.yaml"), *settings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:6000]
    return json.loads((folder / name / "summary.json").read_text())["rows"][0]


@pytest.mark.timeout(480)  # six starts, of three processes some
def test_a_run_changes_its_engine_at_every_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="pip install 'dist_ssn[deepspeed]'")
    pytest.importorskip("mpi4py", reason="pip install 'dist_ssn[mpi]'")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    alone = run(tmp_path, "ddp", 1, 10, name="alone")
    chain: list[tuple[str, int, tuple[str, ...]]] = [
        ("mpi", 2, ()),
        ("deepspeed", 3, ("--engine.stage=3",)),
        ("fsdp", 3, ()),
        ("deepspeed", 2, ("--engine.stage=2",)),
        ("ddp", 1, ()),
    ]
    for place, (engine, ranks, more) in enumerate(chain):
        row = run(tmp_path, engine, ranks, 2 * place + 2, *more)
        assert row["parameters"] == alone["parameters"], engine
        if engine == "mpi":
            assert row["bytes_per_step_logical"] == 4 * row["parameters"]
    assert row["validation_loss"] == pytest.approx(alone["validation_loss"], rel=1e-5)
