"""Cost of checkpoints, and runs that continue on another number of ranks.

    python -m benchmarks.compute.checkpoints --what size      # bytes of a checkpoint, shared against dense
    python -m benchmarks.compute.checkpoints --what time      # seconds that a step loses to checkpoints in the background
    python -m benchmarks.compute.checkpoints --what ranks     # 4 → 2 → 3 ranks against one number of ranks all along

Writes results/checkpoints/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import dist_ssn
from benchmarks.result_files import ResultFile
from dist_ssn.engines import Engine, engine_class
from dist_ssn.train.checkpoint import store as checkpoint
from dist_ssn.train.checkpoint.snapshot import take
from dist_ssn.train.checkpoint.writer import Writer
from dist_ssn.train.models.gpt import build_gpt

BUDGETS = (0.02, 0.1, 0.25, 0.5)
SIZES: dict[str, Any] = {"vocabulary": 256, "layers": 6, "width": 256, "heads": 4, "context": 64}
PAIRS, PER_MINUTE = 12, 60.0
COMMON = {
    "model": "gpt",
    "model_args": '{"layers": 2, "width": 64, "heads": 4, "context": 32}',
    "data.limit": 400_000,
    "share.budget": "10%",
    "optimizer.lr": 1e-3,
    "schedule.name": "constant",
    "batch_size": 24,
    "evaluate_every": 10,
    "evaluate_batches": 2,
    "threads": 1,
}


def trained(budget: float | None) -> Engine:
    """A model after one step, so that its optimizer has all its tensors."""
    torch.manual_seed(0)
    model = build_gpt(**SIZES)
    if budget is not None:
        dist_ssn.share(model, budget)
    engine = engine_class("ddp")(model, torch.optim.AdamW(dist_ssn.parameter_groups(model), lr=1e-3))
    step(engine)
    return engine


def step(engine: Engine) -> None:
    tokens = torch.randint(0, 256, (8, 64))
    with engine.accumulating(True):
        engine.backward(torch.nn.functional.cross_entropy(engine.model(tokens).flatten(0, 1), tokens.flatten()))
    engine.step()


def size() -> list[dict[str, Any]]:
    """Size of a checkpoint in bytes, over all its files."""
    sizes: dict[float | None, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for budget in (None, *BUDGETS):
            engine = trained(budget)
            path = checkpoint.save(
                Path(folder) / str(budget),
                step=1,
                engine=engine,
                recipe_json="{}",
                plan=dist_ssn.shared_plan(engine.module),
            )
            sizes[budget] = sum(file.stat().st_size for file in path.iterdir())
    dense = sizes[None]
    return [
        {
            **{"what": "size", "budget": budget, "bytes": sizes[budget], "dense_bytes": dense},
            **{"ratio": sizes[budget] / dense, "bound": budget + 0.02},
        }
        for budget in BUDGETS
    ]


def seconds(budget: float | None = 0.1) -> list[dict[str, Any]]:
    """Seconds of steps that begin with a checkpoint, and of as many steps without one, in turn."""
    engine = trained(budget)
    plan = dist_ssn.shared_plan(engine.module)
    steps = 12  # long enough for a write to end
    lost, stopped = [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(Path(folder), keep=2)
        for number in range(PAIRS + 1):
            times = []
            for saves in (number % 2 == 0, number % 2 == 1):
                began = time.perf_counter()
                if saves:
                    snapshot = take(step=number, engine=engine, recipe_json="{}", plan=plan)
                    assert snapshot is not None
                    writer.start(snapshot)
                    stopped.append(time.perf_counter() - began)
                for _ in range(steps):
                    step(engine)
                times.append((saves, time.perf_counter() - began))
                writer.wait()
            if number:  # the first pair warms up
                by = dict(times)
                lost.append(by[True] - by[False])
    median = statistics.median(lost)
    return [
        {
            **{"what": "time", "budget": budget, "pairs": PAIRS, "steps": steps},
            "snapshot_ms": 1000 * statistics.median(stopped[1:]),
            "lost_ms": 1000 * median,
            "lost_ms_min": 1000 * min(lost),
            "lost_ms_max": 1000 * max(lost),
            "share_at_one_per_minute": median / PER_MINUTE,
            "worst_share_at_one_per_minute": max(lost) / PER_MINUTE,
        }
    ]


def train_on(ranks: int, steps: int, folder: str, name: str, resume: bool) -> dict[str, float]:
    """Trains a part of a run. Returns step → validation loss of the whole run so far."""
    settings = {**COMMON, "name": name, "steps": steps, "output": folder, "checkpoint.resume": str(resume).lower()}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
    command = [
        *torchrun,
        "-m",
        "dist_ssn.cli",
        "train",
        "--no-progress",
        *(f"--{key}={value}" for key, value in settings.items()),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([sys.executable, *command], env=environment, check=True)
    row = json.loads((Path(folder) / name / "summary.json").read_text())["rows"][0]
    return {str(point["step"]): point["validation_loss"] for point in row["history"]}


def ranks() -> list[dict[str, Any]]:
    """Trains 20 steps on each number of ranks, and 60 steps on one number of ranks, and compares them."""
    parts = (4, 2, 3)
    with tempfile.TemporaryDirectory() as folder:
        whole = train_on(4, 60, folder, "whole", False)
        for number, count in enumerate(parts, 1):
            found = train_on(count, 20 * number, folder, "parts", number > 1)
    differences = {step: abs(found[step] - loss) / loss for step, loss in whole.items()}
    assert found.keys() == whole.keys()
    return [
        {
            "what": "ranks",
            "ranks": parts,
            "losses": found,
            "undisturbed": whole,
            "largest_difference": max(differences.values()),
        }
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {"size": size, "time": seconds, "ranks": ranks}
    parser.add_argument("--what", nargs="+", choices=known, default=list(known))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = ResultFile("checkpoints")
    for what in arguments.what:
        for line in known[what]():
            results.add(line)
            print(json.dumps(line))


if __name__ == "__main__":
    main()
