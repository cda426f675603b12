"""Nine architectures of the paper at small scale: dense, dense as small as a 10 % bank, and shared at 10 % with nothing set.

    python -m benchmarks.quality.paper_architectures rates # resumable: measured cells stay
    python -m benchmarks.quality.paper_architectures --table

The structures are kept, depths and widths are reduced. 200 steps of 16 samples, AdamW, one seed, and the same learning rates for
each side. Images and captions are of Fashion-MNIST, texts are bytes of Python's help texts in windows of 64: ALBERT predicts
the 15 % that are masked; the reader finds the span whose first and last four bytes it is given. Writes
results/paper_architectures/.

Source: Plummer et al., arXiv 2006.10598, section 4. SWRN is Savarese & Maire's soft-shared Wide ResNet, arXiv 1902.09701.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dist_ssn
from benchmarks.paper_models import AdaptiveRetrieval, DenseNet, Reader, SharedWideResNet
from benchmarks.result_files import ResultFile, chosen, latest, provenance
from dist_ssn.train.data import Task, load_task
from dist_ssn.train.data.captions import CAPTIONS
from dist_ssn.train.models.wide_resnet import build_wide_resnet
from dist_ssn.train.optim import build_optimizer, build_schedule
from dist_ssn.train.recipe.sections import DataConfig, OptimizerConfig, ScheduleConfig

Line = dict[str, Any]
Sizes = dict[str, Any]
Cell = tuple[str, str, float, int]
"""architecture, side, learning rate, seed"""
BUDGET, RATES, SEED = 0.1, (3e-3, 1e-2, 1e-3), 0
STEPS, WARMUP, BATCH = 200, 20, 16
HELD_OUT, TOGETHER = 16, 64
CONTEXT, MASK, SHOWN = 64, 256, 4
"""Bytes in a passage; the token of a masked byte; bytes that a question shows of each end of its span."""
SHORTEST, LONGEST = 8, 24
"""Bytes in a span."""
SIDES = ("dense", "small", "shared")
KEYS = ("architecture", "side", "rate", "seed")


def _wide_resnet(**sizes: Any) -> nn.Module:
    return build_wide_resnet(stem_stride=2, **sizes)


def _efficientnet(**sizes: Any) -> nn.Module:
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    none: Sizes = {"dropout_rate": 0.0, "drop_connect_rate": 0.0, "batch_norm_momentum": 0.1}
    images: Sizes = {"image_size": 32, "num_channels": 1, "num_labels": 10}
    model = EfficientNetForImageClassification(EfficientNetConfig(**images, **none, **sizes))
    for (
        module
    ) in model.modules():  # transformers draws norms from N(0, 0.02²): such a model puts out zero and never learns
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return model


def _resnet(**sizes: Any) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    images: Sizes = {"num_channels": 1, "num_labels": 10}
    return ResNetForImageClassification(ResNetConfig(**images, **sizes))


def _mobilenet(**sizes: Any) -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    images: Sizes = {"image_size": 32, "num_channels": 1, "num_labels": 10, "classifier_dropout_prob": 0.0}
    return MobileNetV2ForImageClassification(MobileNetV2Config(**images, **sizes))


def _albert(**sizes: Any) -> nn.Module:
    from transformers import AlbertConfig, AlbertForMaskedLM

    none: Sizes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    special: Sizes = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    text: Sizes = {"vocab_size": MASK + 1, "max_position_embeddings": CONTEXT}
    return AlbertForMaskedLM(AlbertConfig(**text, **none, **special, **sizes))


def _retrieval(**sizes: Any) -> nn.Module:
    return AdaptiveRetrieval(CAPTIONS, **sizes)


def named(model: nn.Module, images: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
    """Cross entropy of the images' labels, or of their captions' indices."""
    outputs = model(images)
    return F.cross_entropy(getattr(outputs, "logits", outputs), labels)


def padded(model: nn.Module, images: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
    """As `named`, with images of 32 × 32 pixels for models that halve them five times."""
    return named(model, F.pad(images, (2, 2, 2, 2), mode="replicate"), labels, draw)


def masked(model: nn.Module, windows: Tensor, _: Tensor, draw: torch.Generator) -> Tensor:
    """Cross entropy of the bytes behind 15 % of the windows' places."""
    asked = torch.rand(windows.shape, generator=draw) < 0.15
    logits = model(input_ids=torch.where(asked, MASK, windows)).logits
    return F.cross_entropy(logits[asked], windows[asked])


def spans(windows: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """A span in each window, for a reader to find.

    Args:
        windows: bytes (B, T).
        draw: of the spans.

    Returns:
        Questions (B, 2 · SHOWN), the first and last bytes of each span, and indices (B, 2) of its first and last byte.
    """
    count, size = windows.shape
    length = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=draw)
    first = (torch.rand(count, generator=draw) * (size - length + 1)).long()
    ends = torch.stack([first, first + length - 1], 1)
    shown = torch.cat([first[:, None] + torch.arange(SHOWN), ends[:, 1:] - SHOWN + 1 + torch.arange(SHOWN)], 1)
    return windows.gather(1, shown), ends


def read(model: nn.Module, windows: Tensor, _: Tensor, draw: torch.Generator) -> Tensor:
    """Cross entropy of a span's first and last byte."""
    questions, ends = spans(windows, draw)
    return F.cross_entropy(model(windows, questions).flatten(0, 1), ends.flatten())


class Architecture(NamedTuple):
    build: Callable[..., nn.Module]
    dense: Sizes
    small: Sizes
    """Sizes of a narrower dense model with at least as many parameters as the shared one."""
    data: DataConfig
    loss: Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


_TEXT, _IMAGES, _CAPTIONS = (
    DataConfig("text"),
    *(DataConfig(name, limit=10_000) for name in ("fashion_mnist", "fashion_captions")),
)
_EFFICIENTNET: Sizes = {"depth_coefficient": 0.5}
_RESNET: Sizes = {"depths": [1, 2, 2, 1], "layer_type": "bottleneck"}
_ALBERT: Sizes = {"num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES = {
    "Wide ResNet 16": Architecture(_wide_resnet, {"depth": 16, "width": 2}, {"depth": 10, "width": 1}, _IMAGES, named),
    "DenseNet-BC": Architecture(DenseNet, {"layers": 3, "growth": 16}, {"layers": 3, "growth": 6}, _IMAGES, named),
    "ResNet, bottlenecks": Architecture(
        _resnet,
        {**_RESNET, "embedding_size": 16, "hidden_sizes": [32, 64, 128, 256]},
        {**_RESNET, "embedding_size": 8, "hidden_sizes": [12, 20, 44, 84]},
        _IMAGES,
        padded,
    ),
    "SWRN 16": Architecture(
        SharedWideResNet,
        {"blocks": 2, "width": 16, "templates": 4},
        {"blocks": 2, "width": 5, "templates": 5},
        _IMAGES,
        named,
    ),
    "ALBERT": Architecture(
        _albert,
        {**_ALBERT, "embedding_size": 32, "hidden_size": 64, "intermediate_size": 256},
        {**_ALBERT, "embedding_size": 12, "hidden_size": 20, "intermediate_size": 80},
        _TEXT,
        masked,
    ),
    "bi-LSTM reader": Architecture(Reader, {"width": 32}, {"width": 10}, _TEXT, read),
    "ADAPT-like retrieval": Architecture(_retrieval, {"width": 64}, {"width": 20}, _CAPTIONS, named),
    "EfficientNet-B0": Architecture(
        _efficientnet,
        {**_EFFICIENTNET, "width_coefficient": 0.35, "hidden_dim": 448},
        {**_EFFICIENTNET, "width_coefficient": 0.11, "hidden_dim": 140, "depth_divisor": 2},
        _IMAGES,
        padded,
    ),
    "MobileNetV2": Architecture(
        _mobilenet,
        {"depth_multiplier": 0.35, "finegrained_output": False},
        {"depth_multiplier": 0.11, "finegrained_output": False, "depth_divisible_by": 4, "min_depth": 4},
        _IMAGES,
        padded,
    ),
}


def built(name: str, side: str, seed: int) -> nn.Module:
    """The model of one side."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(seed)
    model = architecture.build(**(architecture.small if side == "small" else architecture.dense))
    return dist_ssn.share(model, BUDGET, seed=seed) if side == "shared" else model


@functools.cache
def _task(name: str, seed: int) -> Task:
    data = next(architecture.data for architecture in ARCHITECTURES.values() if architecture.data.name == name)
    return load_task(data, context=CONTEXT, seed=seed)


def trained(cell: Cell, steps: int = STEPS) -> Line:
    """Trains one run on one thread. Returns its settings, number of parameters, and mean loss on held-out samples."""
    name, side, rate, seed = cell
    commit = provenance()["commit"]
    torch.set_num_threads(1)
    architecture = ARCHITECTURES[name]
    task = _task(architecture.data.name, seed)
    model = built(name, side, seed)
    optimizer = build_optimizer(model, OptimizerConfig(lr=rate, weight_decay=0.1))
    schedule = build_schedule(optimizer, ScheduleConfig(warmup=min(WARMUP, steps)), steps)
    draw = torch.Generator().manual_seed(seed)
    begin = time.process_time()
    model.train()
    for step in range(steps):
        architecture.loss(model, *task.batch(step, BATCH), draw).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    seconds = time.process_time() - begin
    model.eval()
    draw.manual_seed(0)  # every run is asked the same
    with torch.no_grad():
        losses = [architecture.loss(model, *batch, draw).item() for batch in task.validation(TOGETHER, limit=HELD_OUT)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    measured = {
        "parameters": parameters,
        "steps": steps,
        "seconds": seconds,
        "validation_loss": statistics.mean(losses),
    }
    return {**dict(zip(KEYS, cell, strict=True)), **measured, "commit": commit}


def rates() -> Iterator[Cell]:
    """Cells of every learning rate, one after the other for all architectures."""
    for rate in RATES:
        for name in ARCHITECTURES:
            yield from ((name, side, rate, SEED) for side in SIDES)


SUITES = {"rates": rates}
_SHOWN = {"dense": "dense", "small": "dense, as small", "shared": f"**{BUDGET:.0%} bank**"}


def rows(lines: Iterable[Line]) -> Iterator[tuple[str, ...]]:
    """Rows of the table: parameters, the best learning rate and its loss, the distance to dense, and all losses.

    A learning rate counts where all sides of an architecture were measured at it.
    """
    known = latest(lines, KEYS)
    for name in ARCHITECTURES:
        tried = [rate for rate in sorted(RATES) if all((name, side, rate, SEED) in known for side in SIDES)]
        best: dict[str, float] = {}
        for side in SIDES if tried else ():
            found = [known[name, side, rate, SEED] for rate in tried]
            line = min(found, key=lambda line: line["validation_loss"])
            best[side] = line["validation_loss"]
            apart = f"{best[side] / best['dense'] - 1:+.1%}" if side != "dense" else ""
            shown = f"{name}: {_SHOWN[side]}", f"{line['parameters']:,}", f"{line['rate']:g}", f"{best[side]:.3f}"
            yield *shown, apart, ", ".join(f"{line['validation_loss']:.3f}" for line in found)


HEADINGS = (
    *("", "parameters", "best learning rate", "validation loss (one seed)", "from its dense twin"),
    "at each learning rate, lowest first",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="rates", help="what to measure")
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    arguments = parser.parse_args()
    results = ResultFile("paper_architectures")
    for suite in chosen(parser, arguments.suites, SUITES):
        done = latest(results.lines(), KEYS)
        for cell in (cell for cell in SUITES[suite]() if cell not in done):
            line = trained(cell)  # in this process: importing torch takes longer than most runs
            results.add(line)
            print(f"  {line['validation_loss']:.4f}  {list(cell)}", flush=True)
    if arguments.table or not arguments.suites:
        table = Table(*HEADINGS)
        for row in rows(results.lines()):
            table.add_row(*row)
        Console().print(table)


if __name__ == "__main__":
    main()
