"""Time to generate weights, by bank size, by depth, and by morph × kind of layer × batch; one thread.

    python -m benchmarks.compute.generation size depth kinds [--repetitions 9]
    python -m benchmarks.compute.generation --table

"size" and "depth" time every weight's generation and its gradient, warm, in ns per element of the weights.
The bank grows to 10⁸ parameters, the model to 200 layers. "kinds" times forward and backward of one layer that is alone with its
bank, shared and dense in turn, with small and large batches. Writes results/generation/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dist_ssn
from benchmarks.result_files import ResultFile, chosen, latest
from dist_ssn.sharing.bank import Bank

Line = dict[str, Any]
Layer = tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]], tuple[int, int]]
WARM_UP = 2
SIZES = (10**5, 10**6, 10**7, 10**8)
DEPTHS = (10, 50, 100, 200)
MORPHS = {
    0.1: ("offset", "offset:templates=2", "offset:rank=4", "hash", "inter", "mask", "repeat", "wavg"),
    2.0: ("avg", "wavg", "emb"),
}
"""budget → morphs that are measured at it."""


def _noise(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, *shape),)


LAYERS: dict[str, Layer] = {
    "linear 512": (lambda: nn.Linear(512, 512), _noise(512), (16, 1024)),
    "conv 64, 3 × 3": (lambda: nn.Conv2d(64, 64, 3, padding=1), _noise(64, 16, 16), (2, 32)),
    "embedding 8192 × 128": (lambda: nn.Embedding(8192, 128), lambda n: (torch.randint(8192, (n,)),), (64, 4096)),
    "lstm 128": (lambda: nn.LSTM(128, 128, batch_first=True), _noise(16, 128), (2, 32)),
    "attention 256": (
        lambda: nn.MultiheadAttention(256, 4, batch_first=True),
        lambda batch: (torch.randn(batch, 64, 256),) * 3,
        (1, 16),
    ),
}
"""name → the layer, its inputs for a batch, a small and a large batch."""


def stack(layers: int, width: int, budget: int) -> list[Bank]:
    """Banks of `layers` linear layers."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    dist_ssn.share(model, budget, morph="offset:templates=1", mapping="single")
    return [module for module in model.modules() if isinstance(module, Bank)]


def nanoseconds(banks: list[Bank], repetitions: int) -> dict[str, list[float]]:
    """Median, least and most ns per element of all weights, for generation and for the gradient."""
    slots = [(bank, index, torch.randn(slot.shape)) for bank in banks for index, slot in enumerate(bank.group.slots)]
    sums = {bank: {name: torch.zeros_like(p) for name, p in bank.named_parameters()} for bank in banks}
    numbers = sum(gradient.numel() for *_, gradient in slots)
    passes: dict[str, Callable[[Bank, int, Tensor], Any]] = {
        "make_ns": lambda bank, index, _: bank(index),
        "back_ns": lambda bank, index, gradient: bank.pull_back(
            gradient, index, None, bank.values().tensors, sums[bank]
        ),
    }
    taken: dict[str, list[float]] = {name: [] for name in passes}
    with torch.no_grad():
        for _ in range(WARM_UP + repetitions):
            for name, call in passes.items():
                began = time.perf_counter()
                for slot in slots:
                    call(*slot)
                taken[name].append((time.perf_counter() - began) * 1e9 / numbers)
    return {name: spread(values[WARM_UP:]) for name, values in taken.items()}


def spread(values: list[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


def sizes(repetitions: int) -> Iterable[Line]:
    """Measures eight weights of 512 × 512, with banks of growing size."""
    for size in SIZES:
        banks = stack(8, 512, size)
        found = sum(bank.group.size for bank in banks)
        yield {"what": "size", "layers": 8, "width": 512, "bank": found, **nanoseconds(banks, repetitions)}


def depths(repetitions: int) -> Iterable[Line]:
    """Measures a growing number of weights of 256 × 256, with a bank of a million parameters."""
    for layers in DEPTHS:
        banks = stack(layers, 256, 10**6)
        found = sum(bank.group.size for bank in banks)
        yield {"what": "depth", "layers": layers, "width": 256, "bank": found, **nanoseconds(banks, repetitions)}


def kinds(repetitions: int) -> Iterable[Line]:
    """Measures every morph in every kind of layer."""
    for name, (build, inputs, batches) in LAYERS.items():
        for budget, morphs in MORPHS.items():
            for morph in morphs:
                for batch in batches:
                    given = inputs(batch)
                    dense, shared = build(), dist_ssn.share(build(), budget, morph=morph)
                    pairs = [(seconds(dense, given), seconds(shared, given)) for _ in range(WARM_UP + repetitions)]
                    theirs, ours = (spread([1e3 * s for s in side]) for side in zip(*pairs[WARM_UP:], strict=True))
                    cell = {"what": "kinds", "layer": name, "budget": budget, "morph": morph, "batch": batch}
                    yield {**cell, "dense_ms": theirs, "shared_ms": ours, "ratio": ours[0] / theirs[0]}


def seconds(layer: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Seconds of one forward and backward."""
    began = time.perf_counter()
    output = layer(*inputs)
    (output[0] if isinstance(output, tuple) else output).sum().backward()
    taken = time.perf_counter() - began
    layer.zero_grad()
    return taken


SWEEPS = {"size": sizes, "depth": depths, "kinds": kinds}


def tables(lines: Iterable[Line]) -> list[Table]:
    """Two tables: by size and depth; by kind, with a row per morph and a column per layer and batch."""
    lines = list(lines)
    by_number = Table("weights", "bank", "ns per element, generation: median (min-max)", "ns per element, gradient")
    for line in latest((line for line in lines if line["what"] != "kinds"), ("what", "layers", "bank")).values():
        texts = ["{:.2f} ({:.2f}-{:.2f})".format(*line[key]) for key in ("make_ns", "back_ns")]
        by_number.add_row(f"{line['layers']} × {line['width']}²", f"{line['bank']:,}", *texts)
    cells = latest((line for line in lines if line["what"] == "kinds"), ("morph", "budget", "layer", "batch"))
    columns = list(dict.fromkeys((layer, batch) for _, _, layer, batch in cells))
    by_kind = Table("morph", "budget", *(f"{layer}, batch {batch}" for layer, batch in columns))
    for morph, budget in dict.fromkeys((morph, budget) for morph, budget, *_ in cells):
        ratios = (f"{cells[(morph, budget, *column)]['ratio']:.2f}" for column in columns)
        by_kind.add_row(morph, f"{budget:.0%}", *ratios)
    return [by_number, by_kind]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="size|depth|kinds", help="what to measure")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = ResultFile("generation")
    for what in chosen(parser, arguments.what, SWEEPS):
        for line in SWEEPS[what](arguments.repetitions):
            results.add(line)
            print({key: value for key, value in line.items() if not key.endswith("_ms")}, flush=True)
    if arguments.table or not arguments.what:
        for table in tables(results.lines()):
            Console(width=200).print(table)


if __name__ == "__main__":
    main()
