"""Peak memory of a training step, shared beside dense, by every allocation that torch's CPU allocator reports.

    python -m benchmarks.compute.memory [--models gpt-256 gpt-512 wrn-16-4] [--budgets 0.02 0.1 0.5]
    python -m benchmarks.compute.memory --table

Peak: all memory held after two steps, and the most that a third step (forward, backward, update) adds. Allocations
of libraries below torch (oneDNN's scratch) are not counted, on either side. Writes results/memory/.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import dist_ssn
from benchmarks.compute.step_time import MODELS
from benchmarks.result_files import ResultFile, latest

Line = dict[str, Any]
MIB = 2**20
# The larger GPT is for a GPU's step time.
USUAL = ("gpt-256", "gpt-512", "wrn-16-4")
BUDGETS = (None, 0.02, 0.1, 0.25, 0.5)


def allocations(step: Any) -> list[int]:
    """Bytes of each allocation (negative: a release) while `step` runs, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    found: list[Any] = profiled.profiler.kineto_results.events()
    events = [event for event in found if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


class Training:
    """A model and its optimizer, built and trained under the profiler."""

    def __init__(self, name: str, budget: float | None, generate: str):
        torch.manual_seed(0)
        build, self.inputs, self.targets = MODELS[name]()
        self.model = build() if budget is None else dist_ssn.share(build(), budget, generate=generate)
        self.optimizer = torch.optim.AdamW(dist_ssn.parameter_groups(self.model), lr=1e-3)
        self.gradient_bytes = 0

    def step(self) -> None:
        F.cross_entropy(self.model(self.inputs).flatten(0, -2), self.targets.flatten()).backward()
        gradients = (parameter.grad for parameter in self.model.parameters())
        self.gradient_bytes = sum(gradient.nbytes for gradient in gradients if gradient is not None)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def optimizer_bytes(self) -> int:
        entries = (value for state in self.optimizer.state.values() for value in state.values())
        return sum(value.nbytes for value in entries if isinstance(value, Tensor))


def measure(name: str, budget: float | None, generate: str) -> Line:
    """Bytes held after two steps, tables of banks included, and the most that a third step adds."""
    made: list[Training] = []

    def begin() -> None:
        made.append(Training(name, budget, generate))
        made[0].step()
        made[0].step()

    held = sum(allocations(begin))
    training = made[0]
    changes = allocations(training.step)
    numbers = sum(parameter.numel() for parameter in training.model.parameters())
    return {
        **{"model": name, "budget": budget, "generate": generate, "parameters": numbers, "held_bytes": held},
        **{"optimizer_bytes": training.optimizer_bytes(), "gradient_bytes": training.gradient_bytes},
        **{"peak_bytes": held + max(accumulate(changes), default=0), "left_bytes": sum(changes)},
    }


def table(lines: Iterable[Line]) -> Table:
    """A table with a row per model, budget and mode of generation, beside the dense model."""
    lines = [{"generate": "on_demand", **line} for line in lines]  # before there were two modes
    cells = latest(lines, ("model", "budget", "generate"))
    headings = (
        "model",
        "budget",
        "generate",
        "parameters",
        "optimizer, MiB",
        "gradients, MiB",
        "peak of a step, MiB",
        "to dense",
    )
    shown = Table(*headings)
    for (name, budget, generate), line in sorted(
        cells.items(), key=lambda cell: (cell[0][0], cell[0][1] or 0, cell[0][2])
    ):
        sizes = [f"{line[key] / MIB:.2f}" for key in ("optimizer_bytes", "gradient_bytes", "peak_bytes")]
        ratio = line["peak_bytes"] / cells[name, None, "on_demand"]["peak_bytes"]
        kind = (f"{budget:.0%}", generate) if budget else ("dense", "")
        shown.add_row(name, *kind, f"{line['parameters']:,}", *sizes, f"{ratio:.3f}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=USUAL, choices=list(MODELS))
    parser.add_argument("--budgets", nargs="*", type=float, default=[budget for budget in BUDGETS if budget])
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = ResultFile("memory")
    for name in () if arguments.table else arguments.models:
        results.add(measure(name, None, "on_demand"))
        for budget in arguments.budgets:
            for generate in ("on_demand", "per_step"):
                results.add(measure(name, budget, generate))
    Console().print(table(results.lines()))


if __name__ == "__main__":
    main()
