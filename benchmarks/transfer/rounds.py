"""Fine-tuning by several workers: gradients on every step, beside rounds of 16 steps whose changes travel in 4 bits.

    python -m benchmarks.transfer.rounds [--workers 4] [--seeds 0 1]

The first transfer (transfers.py). Each worker has as many samples in a step as one process has there, and the learning rate is the
one that was best for one process. Workers are processes on this machine. Bytes: what a worker sends after the start, by the ring
formula. Writes results/keep_rounds/; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dist_ssn
from benchmarks.result_files import ResultFile, chosen, lines_of
from benchmarks.transfer.run import optimizer_of, pretrained, validation
from benchmarks.transfer.transfers import TRANSFERS
from dist_ssn.comm import CommMeter
from testing.ranks import run_ranks

NAME, EVERY, CODEC = "gpt", 16, "int4"
METHODS = ["keep 1%", "LoRA r=1", "keep 5%", "LoRA r=5"]


def best_rate(method: str) -> float:
    """The learning rate that was best for one process and seed 0."""
    mine = [line for line in lines_of("transfer") if line.get("transfer", NAME) == NAME and line["seed"] == 0]
    return min((line["loss"], line["lr"]) for line in mine if line["method"] == method)[1]


def train(rank: int, workers: int, method: str, every: int, lr: float, seed: int, folder: str) -> dict[str, Any]:
    """One worker: the loss at the end, and the bytes that it sent after the start."""
    transfer = TRANSFERS[NAME]
    base, task = pretrained(NAME, transfer, Path(folder)), transfer.after()
    torch.manual_seed(seed)
    model = transfer.methods[method][0](base)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = optimizer_of(trained, transfer.steps, lr)
    with CommMeter() as meter:
        local = dist_ssn.LocalUpdates(model, optimizer, every=every, codec=CODEC) if every > 1 else None
        wrapped: nn.Module = DistributedDataParallel(model) if local is None else model
        start = meter.ledger.totals().ring_bytes
        model.train()
        for step in range(transfer.steps):
            inputs, targets = task.batch(seed * 10_000 + step, transfer.batch * workers, rank, workers)
            task.loss(wrapped(inputs), targets).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if local is not None:
            local.synchronize()
            local.close()
        sent = meter.ledger.totals().ring_bytes - start
    rounds = -(-transfer.steps // every)
    return {
        "loss": validation(model, task, transfer.batch, transfer.evaluated)["loss"],
        "trained": sum(p.numel() for p in trained),
        "synchronizations": rounds,
        "sent_bytes": sent,
        "bytes_per_synchronization": sent / rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no run begins after so long")
    parser.add_argument("--folder", default="runs/transfer", help="where the pretrained model is kept")
    arguments = parser.parse_args()
    began, results = time.monotonic(), ResultFile("keep_rounds")
    done = {(line["method"], line["workers"], line["every"], line["seed"]) for line in results.lines()}
    pretrained(NAME, TRANSFERS[NAME], Path(arguments.folder))
    for seed in arguments.seeds:
        for method in chosen(parser, arguments.methods, TRANSFERS[NAME].methods):
            for every in (1, EVERY):
                cell = {"method": method, "workers": arguments.workers, "every": every, "seed": seed}
                if tuple(cell.values()) in done:
                    continue
                if time.monotonic() - began > 60 * arguments.minutes:
                    raise SystemExit("there is no time for more: start the same command again")
                lr = best_rate(method)
                found = run_ranks(train, arguments.workers, method, every, lr, seed, arguments.folder, timeout=500)
                assert len({line["loss"] for line in found}) == 1, "the workers end with different models"
                results.add({**cell, "codec": CODEC if every > 1 else "none", "lr": lr, **found[0]})
                print(cell, f"{found[0]['loss']:.4f}, {found[0]['bytes_per_synchronization']:,.0f} bytes", flush=True)


if __name__ == "__main__":
    main()
