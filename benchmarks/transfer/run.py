"""Fine-tunes small pretrained models by many methods: full, PEFT's adapters, and generated differences.

A transfer (transfers.py) trains its model first. Each method then gets the same steps, batches and schedule on other data, at its
own best learning rate: from the one in its table (methods.py), the search goes by factors of 3 in the direction that improves,
until it gets worse. Further seeds (--near) take the learning rate that is best for seed 0 and its two neighbours; the table has
the one with the best mean. One line per run in results/transfer/; what is there is not measured again, so that a stopped run can
go on (--minutes stops it). Another processor may end with another pretrained model, in the last digits: lines belong together
whose loss before the fine-tuning is equal.

python -m benchmarks.transfer.run --transfer gpt --methods "full" "LoRA r=1" "keep 1%"
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from benchmarks.result_files import ResultFile, chosen
from benchmarks.transfer.transfers import TRANSFERS, Transfer
from dist_ssn.train.data import Task

MOST = 6
"""Largest number of learning rates that are tried for a method and seed."""


def optimizer_of(trained: list[nn.Parameter], steps: int, lr: float) -> tuple[Optimizer, LRScheduler]:
    """AdamW with cosine to a tenth, and a tenth of the steps as warm-up; nothing decays."""
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=steps // 10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - steps // 10, lr / 10)
    return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [steps // 10])


def fit(model: nn.Module, task: Task, steps: int, batch: int, lr: float, seed: int) -> None:
    """Trains what is not frozen; see `optimizer_of`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = optimizer_of(trained, steps, lr)
    model.train()
    for step in range(steps):
        inputs, targets = task.batch(seed * 10_000 + step, batch)
        task.loss(model(inputs), targets).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def validation(model: nn.Module, task: Task, batch: int, batches: int) -> dict[str, float]:
    """Means over the held-out data: loss in nats (of text: per byte), and of images the accuracy."""
    model.eval()
    sums = [task.metrics(model(x), y) for x, y in task.validation(batch, limit=batches)]
    count = sum(entry["count"].item() for entry in sums)
    return {key: sum(entry[key].item() for entry in sums) / count for key in sums[0] if key != "count"}


def pretrained(name: str, transfer: Transfer, folder: Path) -> nn.Module:
    """The model, trained on its first data; kept in a file, because it takes longest. Its head is drawn anew."""
    task = transfer.before()
    file = folder / f"{name.replace(' ', '-').replace(',', '')}-{transfer.pretraining_steps}.pt"
    torch.manual_seed(0)
    model = transfer.build(task)
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        fit(model, task, transfer.pretraining_steps, transfer.batch, transfer.pretraining_lr, 0)
        print(f"pretrained: {validation(model, task, transfer.batch, transfer.evaluated)}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    if transfer.head is not None:
        torch.manual_seed(0)
        head: Any = model.get_submodule(transfer.head)
        head.reset_parameters()
    return model


def measure(
    base: nn.Module, start: float, name: str, transfer: Transfer, task: Task, method: str, lr: float, seed: int
) -> dict[str, Any]:
    """One run: the validation loss before (`start`) and after, and the number of trained parameters."""
    torch.manual_seed(seed)
    model = transfer.methods[method][0](copy.deepcopy(base))
    begin = time.process_time()
    fit(model, task, transfer.steps, transfer.batch, lr, seed)
    seconds = time.process_time() - begin
    return {
        "transfer": name,
        "method": method,
        "lr": lr,
        "seed": seed,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "head": sum(p.numel() for p in base.get_submodule(transfer.head).parameters()) if transfer.head else 0,
        "of": sum(p.numel() for p in base.parameters()),
        "start": start,
        **validation(model, task, transfer.batch, transfer.evaluated),
        "cpu_seconds": round(seconds, 2),
        "pretraining_steps": transfer.pretraining_steps,
        "pretraining_lr": transfer.pretraining_lr,
        "steps": transfer.steps,
    }


def search(loss_at: Callable[[int], float]) -> int:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transfer", choices=list(TRANSFERS), default="gpt")
    parser.add_argument("--methods", nargs="*", help="which methods; all")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="seeds of batches, banks and adapters")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs") / "transfer", help="where the pretrained model is kept"
    )
    parser.add_argument(
        "--near", action="store_true", help="no search: the rate that is best for seed 0, and its neighbours"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no run begins after so long")
    arguments = parser.parse_args()
    began, name, transfer = time.monotonic(), arguments.transfer, TRANSFERS[arguments.transfer]
    methods = chosen(parser, arguments.methods or list(transfer.methods), transfer.methods)
    torch.set_num_threads(1)
    results = ResultFile("transfer")
    base, task = pretrained(name, transfer, arguments.folder), transfer.after()
    start = validation(base, task, transfer.batch, transfer.evaluated)["loss"]
    mine = [line for line in results.lines() if (line.get("transfer", "gpt"), line["start"]) == (name, start)]
    done = {(line["method"], line["seed"], line["lr"]): line["loss"] for line in mine}

    def loss_of(method: str, seed: int, lr: float) -> float:
        if (method, seed, lr) not in done:
            if time.monotonic() - began > 60 * arguments.minutes:
                raise SystemExit("there is no time for more: start the same command again")
            results.add(line := measure(base, start, name, transfer, task, method, lr, seed))
            print(f"{method}, seed {seed}, lr {lr:g}: {line['loss']:.4f} ({line['trained']:,})", flush=True)
            done[method, seed, lr] = line["loss"]
        return done[method, seed, lr]

    for seed in arguments.seeds:
        for method in methods:
            if arguments.near:
                tried = sorted((lr, loss) for (other, zero, lr), loss in done.items() if (other, zero) == (method, 0))
                best = min(range(len(tried)), key=lambda place: tried[place][1])
                for lr, _ in tried[max(0, best - 1) : best + 2]:
                    loss_of(method, seed, lr)
                continue
            first = transfer.methods[method][1]
            search(lambda exponent, m=method, s=seed, f=first: loss_of(m, s, float(f"{f * 10 ** (exponent / 2):.1g}")))


if __name__ == "__main__":
    main()
