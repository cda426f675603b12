"""Everything about generation that needs a GPU, by one command: step times, memory, processes, and the kernels by themselves.

    python -m benchmarks.compute.gpu                  # on one GPU; about half an hour, most of it compilers
    python -m benchmarks.compute.gpu --cells kernels launch-bound
    python -m benchmarks.compute.gpu --device cpu     # a rehearsal with tiny models, whose figures mean nothing; writes no lines
    python -m benchmarks.compute.gpu --table

Each cell has a process of its own, in which all sides step in turn. Writes results/gpu/ after each cell.

- step: a GPT of 124 M parameters under bfloat16's autocast and torch.compile, with flash attention, dense and shared. Goal: 1.02.
- launch-bound: a GPT of width 256 on one sample, eager (goal: 1.15) and with CUDA graphs (goal: 1.05).
- memory: the most that a step of the large GPT allocates, with AdamW.
- nccl, gloo: DistributedDataParallel on one process with NCCL, and on two processes of one GPU with gloo.
- kernels: the Triton kernels beside the operations that replace them elsewhere, and their error against float64.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import dist_ssn
from benchmarks.result_files import ResultFile, chosen, latest
from dist_ssn.sharing import blocks
from dist_ssn.sharing.bank_set import bank_sets
from dist_ssn.sharing.blocks import Given
from dist_ssn.train.models.gpt import build_gpt

Line = dict[str, Any]
WARM_UP = 3
WHAT = {
    "step": "GPT of 124 M parameters, bfloat16, torch.compile, flash attention",
    "launch-bound": "GPT of width 256, one sample, eager and with CUDA graphs",
    "memory": "peak of a step of the GPT of 124 M parameters, AdamW",
    "nccl": "DDP with NCCL on one process",
    "gloo": "DDP with gloo, two processes on one GPU",
    "kernels": "Triton kernels beside plain operations, and their error",
}
CELLS = tuple(WHAT)
_TINY = {"layers": 2, "width": 32, "heads": 2, "context": 16, "vocabulary": 64, "samples": 2}
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "cuda": {
        "large": {"layers": 12, "width": 768, "heads": 12, "context": 1024, "vocabulary": 50304, "samples": 8},
        "small": {"layers": 4, "width": 256, "heads": 4, "context": 128, "vocabulary": 256, "samples": 1},
    },
    "cpu": {"large": _TINY, "small": _TINY},
}
"""Device → size → arguments of `build_gpt`, and the number of samples. On a processor everything is tiny."""
SHARED = ((0.1, "per_step"), (0.1, "on_demand"), (0.25, "per_step"))
"""Budgets and modes beside the dense model."""


class Setting(NamedTuple):
    """Settings of all cells."""

    device: str
    repetitions: int
    backend: str = "inductor"


def build(size: str, device: str, side: tuple[float, str] | None) -> nn.Module:
    """A GPT, dense or shared."""
    shape = dict(SHAPES[device][size])
    del shape["samples"]
    torch.manual_seed(0)
    model = build_gpt(**shape)
    return (model if side is None else dist_ssn.share(model, side[0], generate=side[1])).to(device)


class Trainer:
    """A model that trains on one batch.

    Args:
        model: see `build`.
        forward: the model, compiled or wrapped.
        size: see `SHAPES`.
        device: "cuda" or "cpu".
        lower: whether bfloat16's autocast is on.
    """

    def __init__(self, model: nn.Module, forward: Callable[[Tensor], Tensor], size: str, device: str, lower: bool):
        shape = SHAPES[device][size]
        tokens = torch.randint(0, shape["vocabulary"], (shape["samples"], shape["context"]))
        self.model, self.forward, self.tokens, self.lower = model, forward, tokens.to(device), lower
        groups = dist_ssn.parameter_groups(model)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=device == "cuda")

    def step(self) -> float:
        """Trains one step; returns its seconds, up to the end of the last kernel."""
        device = self.tokens.device.type
        wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=self.lower), _flash(device, self.lower):
            logits = self.forward(self.tokens)
        F.cross_entropy(logits.float().flatten(0, 1), self.tokens.flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        wait()
        return time.perf_counter() - start


def _flash(device: str, lower: bool) -> AbstractContextManager[object]:
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device == "cuda" and lower else nullcontext()


def in_turn(trainers: dict[str, Trainer], repetitions: int) -> Iterator[Line]:
    """Step times in ms of all sides in turn, and their ratios to the first; the first step's seconds include compilation."""
    times: dict[str, list[float]] = {side: [] for side in trainers}
    for _ in range(WARM_UP + repetitions):
        for side, trainer in trainers.items():
            times[side].append(trainer.step())
    dense = [1e3 * seconds for seconds in next(iter(times.values()))[WARM_UP:]]
    for side, seconds in times.items():
        ours = [1e3 * second for second in seconds[WARM_UP:]]
        yield {
            **{"side": side, "ms": [f(ours) for f in (statistics.median, min, max)], "first_seconds": seconds[0]},
            "ratio": statistics.median(ours) / statistics.median(dense),
        }


def name_of(side: tuple[float, str] | None) -> str:
    return "dense" if side is None else f"{side[0]:.0%} {side[1]}"


def compiled(model: nn.Module, way: str, backend: str) -> Callable[[Tensor], Tensor]:
    if way == "eager":
        return model
    mode = "reduce-overhead" if way == "CUDA graphs" and backend == "inductor" else None
    return torch.compile(model, backend=backend, mode=mode)


def measure_steps(size: str, way: str, lower: bool, setting: Setting) -> Iterator[Line]:
    """Lines of the cells "step" and "launch-bound"."""
    trainers = {}
    for side in (None, *SHARED):
        model = build(size, setting.device, side)
        forward = compiled(model, way, setting.backend)
        trainers[name_of(side)] = Trainer(model, forward, size, setting.device, lower)
    for line in in_turn(trainers, setting.repetitions):
        yield {"what": f"{size} GPT, {way}{', bfloat16' if lower else ''}", **line}


def measure_memory(setting: Setting) -> Iterator[Line]:
    """Peak of a step's allocations in bytes (0 on a processor), one side after the other."""
    dense = 0
    for side in (None, *SHARED, (0.5, "per_step")):
        trainer = Trainer(model := build("large", setting.device, side), model, "large", setting.device, True)
        trainer.step()
        trainer.step()
        if setting.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.step()
        peak = torch.cuda.max_memory_allocated() if setting.device == "cuda" else 0
        dense = dense or peak
        del trainer, model
        yield {
            "what": "large GPT, peak",
            "side": name_of(side),
            "peak_bytes": peak,
            "ratio": peak / dense if dense else 1,
        }


def measure_processes(kind: str, setting: Setting) -> Iterator[Line]:
    """Steps of DistributedDataParallel, which must leave all ranks with the same parameters."""
    world = 2 if kind == "gloo" else 1
    backend = kind if setting.device == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        lines = f"{folder}/lines"
        arguments = (world, backend, f"file://{folder}/store", lines, setting)
        torch.multiprocessing.spawn(_rank, arguments, nprocs=world)  # pyright: ignore[reportPrivateImportUsage]
        yield from torch.load(lines)


def _rank(rank: int, world: int, backend: str, store: str, lines: str, setting: Setting) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world)
    trainers = {}
    for side in (None, *SHARED):
        model = build("small", setting.device, side)
        trainers[name_of(side)] = Trainer(model, DistributedDataParallel(model), "small", setting.device, False)
    found = [
        {"what": f"small GPT, DDP, {world} × {backend}", **line} for line in in_turn(trainers, setting.repetitions)
    ]
    for name, trainer in trainers.items():
        for parameter in trainer.model.parameters():
            theirs = parameter.detach().clone()
            dist.broadcast(theirs, 0)
            if not torch.equal(theirs, parameter):
                raise RuntimeError(f"{name}: rank {rank} has other parameters than rank 0")
    if rank == 0:
        torch.save(found, lines)
    dist.destroy_process_group()


def measure_kernels(setting: Setting) -> Iterator[Line]:
    """Milliseconds to make all weights of the large GPT and to take their gradients back, and the error against float64."""
    model = build("large", setting.device, SHARED[0])
    bank = next(bank for banks in bank_sets(model) for bank in banks.banks() if bank.per_step is not None)
    assert bank.per_step is not None
    flat, choose = bank.bank.detach().reshape(-1), blocks.kernels_on
    given = Given.of(flat, bank.scales, None if bank.gains is None else bank.gains.detach())
    for out in (torch.float32, torch.bfloat16):
        for side, chooser in (("kernels", choose), ("operations", lambda device: None)):
            try:
                blocks.kernels_on = chooser
                made = blocks.make_blocks(bank.per_step.slots, bank.seed, flat.numel(), (), flat.device)
            finally:
                blocks.kernels_on = choose
            for work, line in _timed(made, given, out, setting).items():
                yield {"what": f"{work} of the large GPT in {str(out)[6:]}", "side": side, **line}


def _timed(made: list[blocks.Block], given: Given, out: torch.dtype, setting: Setting) -> dict[str, Line]:
    numel = [block.numel for block in made]
    weights = given.bank.new_empty(sum(numel), dtype=out)
    gradient = torch.randn(sum(numel), generator=torch.Generator().manual_seed(0)).to(given.bank.device, out)
    sums = _zeros(given)

    def forward() -> None:
        for block, part in zip(made, weights.split(numel), strict=True):
            block.generate(given, part)

    def backward() -> None:
        for total in sums:
            if total is not None:
                total.zero_()
        for block, part in zip(made, gradient.split(numel), strict=True):
            block.pull_back(part.clone(), given, *sums)

    wanted, wanted_sums = _exact(made, given, gradient)
    found = {}
    for work, function, pairs in (
        ("weights", forward, [(weights, wanted)]),
        ("gradients", backward, list(zip(sums, wanted_sums, strict=True))),
    ):
        times = []
        for _ in range(WARM_UP + setting.repetitions):
            if setting.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if setting.device == "cuda":
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        errors = [_error(got, value) for got, value in pairs if got is not None and value is not None]
        spread = [f(times[WARM_UP:]) for f in (statistics.median, min, max)]
        found[work] = {"ms": spread, "first_seconds": times[0] / 1e3, "error": max(errors)}
    return found


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.cpu().double() - exact).norm() / exact.norm())


def _zeros(given: Given) -> tuple[Tensor, Tensor | None]:
    """Sums for the gradients of the bank and, if there are gains, of these."""
    return torch.zeros_like(given.bank), None if given.gains is None else torch.zeros_like(given.gains)


def _exact(made: list[blocks.Block], given: Given, gradient: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """The weights, and the gradients of bank and gains, in float64 on the processor."""
    gains = None if given.gains is None else given.gains.cpu().double()
    exact = Given.of(given.bank.cpu().double(), given.scales.cpu(), gains)
    slots = [placed for block in made for placed in block.slots]
    plain = blocks.make_blocks(slots, made[0].seed, exact.bank.numel(), (), torch.device("cpu"))
    weights, numel = torch.empty(len(gradient), dtype=torch.float64), [block.numel for block in plain]
    sums = _zeros(exact)
    for block, part, its in zip(plain, weights.split(numel), gradient.cpu().double().split(numel), strict=True):
        block.generate(exact, part)
        block.pull_back(its.clone(), exact, *sums)
    return weights, sums


def measure(arguments: tuple[str, Setting]) -> Line:
    """All lines of a cell, under the key "lines"."""
    cell, setting = arguments
    torch.set_num_threads(1)
    if cell == "step":
        lines = measure_steps("large", "compiled", True, setting)
    elif cell == "launch-bound":
        ways = ("eager", "CUDA graphs")
        lines = (line for way in ways for line in measure_steps("small", way, False, setting))
    elif cell == "memory":
        lines = measure_memory(setting)
    elif cell == "kernels":
        lines = measure_kernels(setting)
    else:
        lines = measure_processes(cell, setting)
    return {"cell": cell, "repetitions": setting.repetitions, "device": setting.device, "lines": list(lines)}


def in_process(cell: str, setting: Setting) -> Line:
    """The line of a cell, from a process of its own; those of several processes start theirs themselves."""
    if cell in ("nccl", "gloo"):
        return measure((cell, setting))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, ((cell, setting),))


def table(lines: Iterable[Line]) -> Table:
    """A row for each side of each cell's newest measurement, and one for each cell without any."""
    shown = Table("what", "side", "on", "ms: median (min-max)", "peak, MiB", "to dense", "first step, s", "error")
    found = latest(lines, ("cell",))
    for cell in found.values():
        on = cell["hardware"].split("NVIDIA ")[-1] if "NVIDIA" in cell["hardware"] else cell["device"]
        for line in cell["lines"]:
            ms = "{:.2f} ({:.2f}-{:.2f})".format(*line["ms"]) if "ms" in line else ""
            peak = f"{line['peak_bytes'] / 2**20:,.0f}" if "peak_bytes" in line else ""
            ratio, first, error = (line.get(key) for key in ("ratio", "first_seconds", "error"))
            numbers = ((ratio, ".3f"), (first, ".1f"), (error, ".1e"))
            shown.add_row(
                line["what"], line["side"], on, ms, peak, *("" if n is None else f"{n:{f}}" for n, f in numbers)
            )
    for name in CELLS:
        if (name,) not in found:
            shown.add_row(WHAT[name], "", "not measured", "", "", "", "", "")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="*", default=CELLS, help=f"of {', '.join(CELLS)}")
    parser.add_argument("--device", default="cuda", choices=list(SHAPES))
    parser.add_argument("--repetitions", type=int, default=21)
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    arguments = parser.parse_args()
    results = ResultFile("gpu")
    if arguments.table:
        Console().print(table(results.lines()))
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device: --device cpu rehearses with tiny models")
    os.environ.setdefault("DIST_SSN_KERNELS", "1")
    failed = []
    for cell in chosen(parser, arguments.cells, CELLS):
        try:
            line = in_process(cell, Setting(arguments.device, arguments.repetitions))
        except Exception:  # the cells behind it are still worth their time
            traceback.print_exc()
            failed.append(cell)
            continue
        if arguments.device == "cuda":
            results.add(line)
        Console().print(table(results.lines() if arguments.device == "cuda" else [{**results.provenance, **line}]))
    if failed:
        parser.exit(1, f"failed: {', '.join(failed)}\n")


if __name__ == "__main__":
    main()
