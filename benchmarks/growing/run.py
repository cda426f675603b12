"""Measures growing: loss of a bank that grows three times in the middle of a run, beside constant banks of as many bytes.

    python -m benchmarks.growing.run constants ways growing seeds      # resumable: measured cells stay
    python -m benchmarks.growing.run --table

One process, one thread, AdamW, one cosine over the whole run. Bytes are those of the gradients: four for each trained parameter and
step. Lines lie in results/growing/.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.growing.cells import SUITES, TASKS, Cell, identity, recipe_of
from benchmarks.growing.tiling import carry_moments, grown, likeness
from benchmarks.result_files import ResultFile, chosen
from dist_ssn.comm import CommMeter
from dist_ssn.engines import World
from dist_ssn.train.build import build
from dist_ssn.train.evaluate import evaluate
from dist_ssn.train.models import build_model
from dist_ssn.train.optim import build_optimizer, build_schedule, fast_forward
from dist_ssn.train.recipe.schema import Recipe

WATCHED = 50
"""Number of steps after growing whose `likeness` is averaged."""


def run(wanted: Cell) -> Cell:
    """Trains one cell in this process. Returns it with its losses, bytes and, of a bank that grows, how alike the copies pull."""
    torch.set_num_threads(1)
    began, recipe, world = time.process_time(), recipe_of(wanted), World(0, 1, 0, torch.device("cpu"))
    task, model = build(recipe, world)
    optimizer, schedule = _optimizer(model, recipe)
    history, alike, sent = [], [], 0
    for step in range(recipe.steps):
        if step == wanted["grow_at"]:
            former, former_optimizer = model, optimizer
            model = grown(former, build_model(recipe.model, recipe.model_args, task))
            optimizer, schedule = _optimizer(model, recipe)
            carry_moments(model, optimizer, former, former_optimizer, wanted["moments"])
            fast_forward(schedule, step)
        inputs, targets = task.batch(step, recipe.batch_size)
        task.loss(model(inputs), targets).backward()
        if wanted["grow_at"] is not None and 0 <= step - wanted["grow_at"] < WATCHED:
            alike.append(likeness(model))
        sent += 4 * _trained(model)
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm or float("inf"))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % recipe.evaluate_every == 0 or step + 1 == recipe.steps:
            found = evaluate(model, task, recipe, world, CommMeter(), torch.autocast("cpu", enabled=False))
            history.append({"step": step + 1, "bytes": sent, "validation_loss": found["validation_loss"]})
    measured = {"steps": recipe.steps, "parameters": _trained(model), **history[-1], "history": history}
    measured["likeness"] = statistics.mean(alike) if alike else None
    measured.pop("step")
    return {**wanted, **measured, "seconds": time.process_time() - began}


def _optimizer(model: nn.Module, recipe: Recipe) -> tuple[Optimizer, LambdaLR]:
    optimizer = build_optimizer(model, recipe.optimizer)
    for group in optimizer.param_groups:
        group["fused"] = True  # small tensors: a kernel per tensor and operation costs more than the mathematics
    return optimizer, build_schedule(optimizer, recipe.schedule, recipe.steps)


def _trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def table(results: ResultFile) -> Table:
    """One row per cell, by bytes."""
    made = Table("task", "budget", "grows at", "moments", "lr", "seed", "parameters", "MB", "loss", "likeness")
    for line in sorted(results.lines(), key=lambda line: (line["task"], line["bytes"], line["lr"], line["seed"])):
        grows = (
            ("", "", "")
            if line["grow_at"] is None
            else (str(line["grow_at"]), line["moments"], f"{line['likeness']:.3f}")
        )
        settings = (line["task"], f"{line['budget']:g}", *grows[:2], f"{line['lr']:g}", str(line["seed"]))
        figures = (f"{line['parameters']:,}", f"{line['bytes'] / 1e6:.1f}", f"{line['validation_loss']:.4f}")
        made.add_row(*settings, *figures, grows[2])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", help=f"what to measure: {', '.join(SUITES)}")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS), help="only these")
    parser.add_argument("--only", nargs="*", default=[""], metavar="TEXT", help="cells whose identity has one of these")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further cell after this time")
    parser.add_argument("--table", action="store_true", help="print what is measured so far")
    arguments = parser.parse_args()
    results, began = ResultFile("growing"), time.monotonic()
    for suite in chosen(parser, arguments.suites, SUITES):
        for task in arguments.tasks:
            for wanted in SUITES[suite](task, results.lines()):
                late, name = time.monotonic() - began > 60 * arguments.minutes, identity(wanted)
                asked = any(text in name for text in arguments.only)
                if late or not asked or name in {identity(line) for line in results.lines()}:
                    continue
                line = run(wanted)
                results.add({**line, "commit": results.provenance["commit"]})
                print(f"  {line['validation_loss']:.4f}  {line['seconds']:.0f} s  {name}", flush=True)
    if arguments.table or not arguments.suites:
        Console(width=160).print(table(results))


if __name__ == "__main__":
    main()
