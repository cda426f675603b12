"""Fine-tunes a small GPT from Python's source to English documentation: full, PEFT's adapters, and generated differences.

The GPT is trained on the standard library's source first. Each method then gets the same steps, batches and schedule on pydoc's
topics, at its own best learning rate: from the one in METHODS, the search goes by factors of 3 in the direction that improves,
until it gets worse. Further seeds (--best) take the learning rate that is best for seed 0. One line per run in
results/transfer/.

python -m benchmarks.transfer.run --methods "full" "LoRA r=1" "keep 1%"
"""

from __future__ import annotations

import argparse
import copy
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.result_files import ResultFile, chosen
from benchmarks.transfer.methods import METHODS
from dist_ssn.train.data import Task, load_task
from dist_ssn.train.models import build_model
from dist_ssn.train.recipe.sections import DataConfig

CONTEXT, BATCH, EVALUATED = 64, 8, 16
ARGUMENTS = {"layers": 2, "width": 128, "heads": 4, "context": CONTEXT}
SETTING = {"pretraining_steps": 1000, "steps": 120, "pretraining_lr": 3e-3}
MOST = 6
"""Largest number of learning rates that are tried for a method and seed."""


def fit(model: nn.Module, task: Task, steps: int, lr: float, seed: int) -> None:
    """AdamW with cosine to a tenth, and a tenth of the steps as warm-up; nothing decays."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=steps // 10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - steps // 10, lr / 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [steps // 10])
    model.train()
    for step in range(steps):
        inputs, targets = task.batch(seed * 10_000 + step, BATCH)
        task.loss(model(inputs), targets).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def validation(model: nn.Module, task: Task) -> float:
    """Mean loss in nats per byte over the first batches of the held-out text."""
    model.eval()
    losses = [task.loss(model(x), y).item() for x, y in task.validation(BATCH, limit=EVALUATED)]
    return sum(losses) / len(losses)


def pretrained(folder: Path) -> nn.Module:
    """The GPT, trained on the standard library's source; kept in a file, because it takes longest."""
    file = folder / f"gpt-{'-'.join(map(str, SETTING.values()))}.pt"
    library = Path(sysconfig.get_paths()["stdlib"])
    task = load_task(DataConfig(name="text", path=str(library / "*.py")), context=CONTEXT, seed=0)
    torch.manual_seed(0)
    model = build_model("gpt", ARGUMENTS, task)
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model
    fit(model, task, int(SETTING["pretraining_steps"]), SETTING["pretraining_lr"], 0)
    print(f"pretrained: {validation(model, task):.4f} nats per byte on held-out source", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model


def measure(base: nn.Module, task: Task, method: str, lr: float, seed: int) -> dict[str, Any]:
    """One run: the validation loss before and after, and the number of trained parameters."""
    torch.manual_seed(seed)
    model = METHODS[method][0](copy.deepcopy(base))
    begin = time.process_time()
    fit(model, task, int(SETTING["steps"]), lr, seed)
    seconds = time.process_time() - begin
    return {
        "method": method,
        "lr": lr,
        "seed": seed,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "of": sum(p.numel() for p in base.parameters()),
        "start": validation(base, task),
        "loss": validation(model, task),
        "cpu_seconds": round(seconds, 2),
        **SETTING,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="which methods")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="seeds of batches, banks and adapters")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs") / "transfer", help="where the pretrained GPT is kept"
    )
    parser.add_argument("--best", action="store_true", help="no search: the learning rate that is best for seed 0")
    arguments = parser.parse_args()
    methods = chosen(parser, arguments.methods, METHODS)
    torch.set_num_threads(1)
    results = ResultFile("transfer")
    base = pretrained(arguments.folder)
    topics = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    task = load_task(DataConfig(name="text", path=str(topics)), context=CONTEXT, seed=0)
    done = {(line["method"], line["seed"], line["lr"]): line["loss"] for line in results.lines()}
    for seed in arguments.seeds:
        for method in methods:
            if arguments.best:
                lr = min((loss, lr) for (name, number, lr), loss in done.items() if (name, number) == (method, 0))[1]
                results.add(line := measure(base, task, method, lr, seed))
                print(f"{method}, seed {seed}, lr {lr:g}: {line['loss']:.4f}", flush=True)
                continue

            def loss_at(exponent: int, method: str = method, seed: int = seed) -> float:
                lr = float(f"{METHODS[method][1] * 10 ** (exponent / 2):.1g}")
                if (method, seed, lr) not in done:
                    line = measure(base, task, method, lr, seed)
                    results.add(line)
                    print(f"{method}, seed {seed}, lr {lr:g}: {line['loss']:.4f} ({line['trained']:,})", flush=True)
                    done[method, seed, lr] = line["loss"]
                return done[method, seed, lr]

            search(loss_at)


def search(loss_at: Any) -> int:
    """The whole number with the least loss, found by going down from 0; at most MOST are tried."""
    losses = {0: loss_at(0), 1: loss_at(1)}
    way = 1 if losses[1] < losses[0] else -1
    best = max(0, way)
    while len(losses) < MOST:
        losses[best + way] = loss_at(best + way)
        if not losses[best + way] < losses[best]:
            break
        best += way
    return best


if __name__ == "__main__":
    main()
