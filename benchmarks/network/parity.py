"""Compares every engine with plain autograd in one process on the same global batch: losses and parameters after five steps.

python -m benchmarks.network.parity                                   # all engines, on 1, 2 and 4 processes; writes results/parity/
torchrun --nproc-per-node=2 -m benchmarks.network.parity --worker ddp fsdp    # one line of JSON per cell, from rank 0
mpirun -n 2 python -m benchmarks.network.parity --worker mpi
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dist_ssn
from benchmarks.result_files import ResultFile
from dist_ssn.engines import engine_class, init_world
from dist_ssn.train.models.gpt import build_gpt
from dist_ssn.train.models.wide_resnet import build_wide_resnet
from testing.launch import ENGINES, LAUNCHES, launch

STEPS, BATCH, LENGTH, VOCABULARY = 5, 12, 8, 32
WORLDS = (1, 2, 4)


class Variant(NamedTuple):
    """A variant of the training step, and the allowed relative difference."""

    tolerance: float = 1e-5
    accumulation: int = 1
    checkpointing: bool = False
    clip_norm: float | None = None
    bf16: bool = False


VARIANTS = {
    "plain": Variant(),
    "accumulation": Variant(accumulation=3),
    "checkpointing": Variant(checkpointing=True),
    "clipping": Variant(clip_norm=0.3),
    "bf16": Variant(2e-2, bf16=True),  # a process rounds the mean over its part of the batch
}


class Checkpointed(nn.Module):
    """Recomputes a model's whole forward in backward."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[return-value]


class Recurrent(nn.Module):
    """An LSTM between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(24, VOCABULARY)
        self.rnn = nn.LSTM(16, 24, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])


class Encoder(nn.Module):
    """torch's own encoder between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 24), nn.Linear(24, VOCABULARY)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens)))


def _tokens() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, VOCABULARY, (STEPS, BATCH, LENGTH))
    return tokens, tokens.roll(1, -1)


def _images() -> tuple[Tensor, Tensor]:
    return torch.randn(STEPS, BATCH, 1, 8, 8), torch.randint(0, 10, (STEPS, BATCH))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "gpt": (lambda: build_gpt(vocabulary=VOCABULARY, layers=2, width=24, heads=4, context=LENGTH), _tokens),
    # Group norm: what batch norm does depends on how a batch is split, with any engine.
    "wide_resnet": (lambda: build_wide_resnet(depth=10, width=1, norm="group"), _images),
    "lstm": (Recurrent, _tokens),
    "encoder": (Encoder, _tokens),
}


def made(name: str, variant: Variant) -> tuple[nn.Module, Tensor, Tensor]:
    """Builds a shared model, and inputs and targets of all steps."""
    torch.manual_seed(0)
    build, data = MODELS[name]
    model = dist_ssn.share(build(), 0.2)
    return (Checkpointed(model) if variant.checkpointing else model), *data()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # Momentum SGD: Adam's division would blow rounding differences of tiny gradients up to whole steps.
    return torch.optim.SGD(dist_ssn.parameter_groups(model), lr=0.05, momentum=0.9)


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor, variant: Variant) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16) if variant.bf16 else nullcontext():
        return F.cross_entropy(model(inputs).flatten(0, -2).float(), targets.flatten())


def refusal(name: str, variant: Variant) -> str | None:
    """Reason why this processor cannot run the dense model in this variant, or None: some have no 16-bit LSTM."""
    build, data = MODELS[name]
    try:
        inputs, targets = data()
        loss_of(build(), inputs[0], targets[0], variant)
    except RuntimeError as error:
        return f"the dense model does not run here either: {str(error).splitlines()[0]}"
    return None


def alone(name: str, variant: Variant) -> tuple[list[float], dict[str, Tensor]]:
    """Trains by plain autograd on whole batches. Returns losses, and parameters after the last step."""
    model, inputs, targets = made(name, variant)
    optimizer = optimizer_of(model)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, inputs[step], targets[step], variant)
        loss.backward()
        if variant.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), variant.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {key: parameter.detach() for key, parameter in model.named_parameters()}


def together(
    name: str, variant: Variant, kind: str, options: dict[str, Any], rank: int, ranks: int
) -> tuple[list[float], dict[str, Tensor]]:
    """Trains by an engine, each rank with its part of the batch. Returns the same; parameters are valid on rank 0."""
    model, inputs, targets = made(name, variant)
    cls = engine_class(kind)
    model = cls.prepare(model)
    engine = cls(model, optimizer_of(model), clip_norm=variant.clip_norm, **options)
    losses = []
    for step in range(STEPS):
        mine = [part[step][rank::ranks].chunk(variant.accumulation) for part in (inputs, targets)]
        total = torch.zeros(())
        for micro, (x, y) in enumerate(zip(*mine, strict=True)):
            last = micro == variant.accumulation - 1
            with engine.accumulating(last):
                loss = loss_of(engine.model, x, y, variant) / variant.accumulation
                engine.backward(loss, last)
            total += loss.detach()
        engine.step()
        if ranks > 1:
            dist.all_reduce(total)
        losses.append(total.item() / ranks)
    return losses, copy.deepcopy(engine.gathered()[0])


def spread(columns: list[str], models: list[str], variants: list[str]) -> set[tuple[str, str, str]]:
    """Cells (engine, model, variant) such that every engine meets every variant once, each with the next model in turn."""
    return {
        (column, models[(turn + number) % len(models)], kind)
        for turn, column in enumerate(columns)
        for number, kind in enumerate(variants)
    }


def cells(
    columns: list[str], models: list[str], variants: list[str], chosen: set[tuple[str, str, str]] | None = None
) -> Iterator[dict[str, Any]]:
    """One result per cell, on every rank; those of rank 0 are complete.

    Args:
        chosen: the cells to run, all by default.
    """
    with init_world(device="cpu") as world:
        for name in models:
            for kind in variants:
                here = [column for column in columns if chosen is None or (column, name, kind) in chosen]
                if not here:
                    continue
                variant = VARIANTS[kind]
                if why := refusal(name, variant):
                    for column in here:
                        cell = {"engine": column, "model": name, "variant": kind, "ranks": world.world_size}
                        yield {**cell, "why_not": why, "rank": world.rank}
                    continue
                losses, parameters = alone(name, variant)
                for column in here:
                    engine, options = ENGINES[column]
                    found_losses, found = together(name, variant, engine, options, world.rank, world.world_size)
                    loss = max(abs(a - b) / abs(b) for a, b in zip(found_losses, losses, strict=True))
                    yield {
                        **{"engine": column, "model": name, "variant": kind, "ranks": world.world_size},
                        **{"loss_difference": loss, "tolerance": variant.tolerance},
                        "difference": _difference(found, parameters) if world.rank == 0 else None,
                        "rank": world.rank,
                    }


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative difference by norms, of all banks, all gains and so on, and of all own parameters.

    A bank of a stem has a dozen numbers, and in bf16 the sum of many rounded gradients for each: by itself it says nothing.
    """
    parts: dict[str, list[str]] = {}
    for key in expected:
        parts.setdefault(key.rpartition(".")[2] if "dist_ssn." in key else "own", []).append(key)
    pairs = [
        [torch.cat([side[key].float().view(-1) for key in keys]) for side in (found, expected)]
        for keys in parts.values()
    ]
    return max(float((mine - theirs).norm() / theirs.norm()) for mine, theirs in pairs)


def is_equal(cell: dict[str, Any]) -> bool:
    """True if a cell passes: within its tolerance, or impossible on this processor."""
    return "why_not" in cell or max(cell["difference"], cell["loss_difference"]) <= cell["tolerance"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs="+", choices=list(ENGINES), help="be one of the processes of these engines")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--spread", action="store_true", help="a worker runs one model for each variant and engine")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        given = (arguments.worker, arguments.models, arguments.variants)
        for cell in cells(*given, spread(*given) if arguments.spread else None):
            if cell.pop("rank") == 0:
                print(json.dumps(cell), flush=True)
        return
    results, failed, reasons = ResultFile("parity"), 0, set()
    table = Table("ranks", "engine", *(f"{model}: worst of {len(arguments.variants)}" for model in arguments.models))
    for ranks in WORLDS:
        for columns in LAUNCHES:
            work = ("--models", *arguments.models, "--variants", *arguments.variants)
            found = launch(columns, ranks, "benchmarks.network.parity", *work)
            for cell in found:
                results.add(cell)
                failed += not is_equal(cell)
            for column in columns:
                ran = [c for c in found if c["engine"] == column and "why_not" not in c]
                worst = [max((c for c in ran if c["model"] == model), key=_distance) for model in arguments.models]
                table.add_row(str(ranks), column, *(f"{c['difference']:.1e} ({c['variant']})" for c in worst))
                for cell in found:
                    if cell["engine"] == column and "why_not" in cell:
                        reasons.add(f"{cell['model']}, {cell['variant']}: {cell['why_not']}")
    Console(width=160).print(table, *sorted(reasons), sep="\n")
    if failed:
        raise SystemExit(f"{failed} cells differ by more than their tolerance")


def _distance(cell: dict[str, Any]) -> float:
    return max(cell["difference"], cell["loss_difference"]) / cell["tolerance"]


if __name__ == "__main__":
    main()
