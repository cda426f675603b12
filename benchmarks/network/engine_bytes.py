"""Bytes that each engine sends per step and keeps per rank, dense and shared, beside the theory.

python -m benchmarks.network.engine_bytes [--ranks 2 4]     # all engines; writes results/engine_bytes/
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import dist_ssn
from benchmarks.result_files import ResultFile
from dist_ssn.comm import CommMeter
from dist_ssn.engines import engine_class, init_world
from dist_ssn.plan.overlap import parse_overlap
from dist_ssn.train.models.gpt import build_gpt
from dist_ssn.train.optim import state_bytes
from testing.launch import ENGINES, LAUNCHES, launch

BUDGET, WARM_UP, STEPS = 0.1, 3, 3
HOOKS: dict[str, tuple[Callable[[], Any], Callable[..., Any]]] = {
    "ddp, fp16 hook": (lambda: None, default_hooks.fp16_compress_hook),
    "ddp, PowerSGD hook": (
        lambda: powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=1
        ),
        powerSGD_hook.powerSGD_hook,
    ),
}
"""PyTorch's own communication hooks, as further columns. Its bf16 hook does not run on CPU."""
STEP_PURPOSES = ("gradients", "parameters", "buffers", "other")


def measure(column: str, budget: float | None, rank: int, world_size: int) -> dict[str, Any]:
    """Bytes of a step after the first two, and bytes of the optimizer state on this rank."""
    torch.manual_seed(0)
    model = build_gpt(vocabulary=256, layers=4, width=128, heads=4, context=32)
    if budget is not None:
        dist_ssn.share(model, budget)
    trainable = sum(p.numel() for p in model.parameters())
    plan = dist_ssn.shared_plan(model)
    banks = 0 if plan is None else sum(group.size for group in plan.groups)
    # One bucket: PowerSGD's later rounds are started by gloo's threads, in any order of the buckets.
    kind, options = ENGINES.get(column, ("ddp", {"bucket_mb": 64}))
    cls = engine_class(kind)
    model = cls.prepare(model)
    optimizer = torch.optim.AdamW(dist_ssn.parameter_groups(model), lr=1e-3)
    engine = cls(model, optimizer, **options)
    if column in HOOKS and isinstance(engine.model, DistributedDataParallel):
        state, hook = HOOKS[column]
        engine.model.register_comm_hook(state(), hook)
    tokens = torch.randint(0, 256, (2, 32))

    def steps(count: int) -> None:
        for _ in range(count):
            with engine.accumulating(True):
                engine.backward(engine.model(tokens).square().mean())
            engine.step()

    steps(WARM_UP)
    with CommMeter() as meter:
        steps(STEPS)
    rows = [row for row in meter.ledger.rows() if row["purpose"] in STEP_PURPOSES]
    return {
        **{"engine": column, "budget": budget, "ranks": world_size, "rank": rank},
        **{"trainable": trainable, "banks": banks},
        "logical_bytes": sum(row["logical_bytes"] for row in rows) / STEPS,
        "ring_bytes": sum(row["ring_bytes"] for row in rows) / STEPS,
        "rounds": {f"{row['purpose']}: {row['collective']}": row["operations"] / STEPS for row in rows},
        "optimizer_bytes": state_bytes(optimizer),
    }


def theory(column: str, trainable: int, ranks: int, banks: int = 0) -> float:
    """Bytes on the wire of one step in fp32, by the ring formula.

    An all-reduce of everything, or its two halves: reduce-scatter, then all-gather (Rajbhandari et al. 2020, section 7). DeepSpeed
    (0.19) does the first half of stages 1 and 2 by an all-reduce, unless configured otherwise (use_multi_rank_bucket_allreduce).
    PowerSGD leaves vectors as they are, and a bank is one.

    Args:
        column: An engine and its options.
        trainable: Number of trainable parameters.
        ranks: Number of ranks.
        banks: Number of those parameters that are in banks.
    """
    halves = {"zero-1": 3, "zero-2": 3, "ddp, fp16 hook": 1}.get(column, 2)
    if "sums" in column:  # each bank as often as there are partial sums
        trainable += (parse_overlap(column.split()[1]).pieces - 1) * banks
    return halves * (ranks - 1) / ranks * 4 * trainable


def workers(columns: list[str]) -> Iterator[dict[str, Any]]:
    with init_world(device="cpu") as world:
        for column in columns:
            for budget in (None, BUDGET):
                yield measure(column, budget, world.rank, world.world_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--worker", nargs="+", choices=[*ENGINES, *HOOKS], help="be one of the processes of these engines"
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        for line in workers(arguments.worker):
            if line["rank"] == 0:
                print(json.dumps(line), flush=True)
        return
    results = ResultFile("engine_bytes")
    names = (
        "ranks",
        "engine",
        "sent: dense",
        "shared",
        "shared / theory",
        "dense : shared",
        "optimizer: dense",
        "shared",
    )
    table = Table(*names)
    for ranks in arguments.ranks:
        for columns in (*LAUNCHES, tuple(HOOKS)):
            found = launch(columns, ranks, "benchmarks.network.engine_bytes")
            for line in found:
                results.add(line)
            for column in columns:
                dense, shared = (line for line in found if line["engine"] == column)
                over_theory = shared["ring_bytes"] / theory(column, shared["trainable"], ranks, shared["banks"])
                ratio = dense["ring_bytes"] / shared["ring_bytes"]
                bytes_ = [f"{line[key]:,.0f}" for key in ("ring_bytes", "optimizer_bytes") for line in (dense, shared)]
                table.add_row(str(ranks), column, *bytes_[:2], f"{over_theory:.3f}", f"{ratio:.2f}", *bytes_[2:])
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
