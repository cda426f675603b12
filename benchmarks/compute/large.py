"""Time and peak memory to plan for large decoders, and to share one: each in a process of its own, one thread.

    python -m benchmarks.compute.large [--cells "1B share" "8B plan" "8B plan keep"] [--budget 0.1]
    python -m benchmarks.compute.large --table

Memory is the process's resident memory beyond what it has before the model is built, at its peak from the built model on. A model
of 1 B parameters needs 5 GB. Writes results/large/.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import dist_ssn
from benchmarks.result_files import ResultFile, chosen, latest
from dist_ssn.train.models.gpt import build_gpt

Line = dict[str, Any]
SHAPES: dict[str, dict[str, Any]] = {
    "10M": {"layers": 3, "width": 512, "heads": 8, "context": 128, "vocabulary": 1024},
    "1B": {"layers": 20, "width": 2048, "heads": 16, "context": 2048, "vocabulary": 32768},
    "8B": {"layers": 40, "width": 4096, "heads": 32, "context": 2048, "vocabulary": 32768},
}
CELLS = {
    "10M share": ("10M", "cpu", False),
    "1B share": ("1B", "cpu", False),
    "8B plan": ("8B", "meta", False),
    "8B plan keep": ("8B", "meta", True),
}
"""Name → (size, device, whether the weights are kept); on "meta" the model is only planned for."""
USUAL = ("1B share", "8B plan", "8B plan keep")


def resident(kind: str) -> int:
    """Bytes of this process by the kernel's account: "VmRSS" now, or "VmHWM" at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def forget_peak() -> None:
    """Begins to look for the peak anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measure(arguments: tuple[str, float]) -> Line:
    """Seconds and bytes of one cell."""
    cell, budget = arguments
    size, device, keep = CELLS[cell]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*is on 'meta'")
    dist_ssn.share(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 0.5)  # what is imported or made once
    before = resident("VmRSS")
    with torch.device(device):
        model = build_gpt(**SHAPES[size])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    forget_peak()
    start = time.perf_counter()
    shared = None if device == "meta" else dist_ssn.share(model, budget)
    plan = dist_ssn.make_plan(model, budget, keep=keep) if shared is None else dist_ssn.shared_plan(shared)
    seconds = time.perf_counter() - start
    assert plan is not None
    return {
        **{"cell": cell, "parameters": parameters, "device": device, "keep": keep, "budget": budget},
        **{"weights": sum(len(group.slots) for group in plan.groups), "bank_parameters": plan.parameters},
        **{"seconds": seconds, "model_bytes": 4 * parameters, "peak_bytes": resident("VmHWM") - before},
    }


def table(lines: Iterable[Line]) -> Table:
    """A row for each cell's newest measurement."""
    headings = ("decoder", "weights", "budget", "", "seconds", "peak, MiB", "to the dense model")
    shown = Table(*headings)
    for line in latest(lines, ("cell", "budget")).values():
        on_meta = line["device"] == "meta"
        kind = f"{line['parameters'] / 1e9:.2f} B{', keep' if line['keep'] else ''}"
        what = "planned on meta" if on_meta else "planned and shared"
        ratio = "" if on_meta else f"{line['peak_bytes'] / line['model_bytes']:.3f}"
        numbers = (f"{line['seconds']:.2f}", f"{line['peak_bytes'] / 2**20:,.0f}", ratio)
        shown.add_row(kind, str(line["weights"]), f"{line['budget']:.0%}", what, *numbers)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="*", default=USUAL, help=f"of {', '.join(CELLS)}")
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    arguments = parser.parse_args()
    results = ResultFile("large")
    cells = () if arguments.table else chosen(parser, arguments.cells, CELLS)
    for _ in results.measure(measure, [(cell, arguments.budget) for cell in cells], jobs=1):
        pass
    Console().print(table(results.lines()))


if __name__ == "__main__":
    main()
