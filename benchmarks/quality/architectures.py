"""Four architectures of Hugging Face's `transformers`, from their configs alone: shared at 10 % beside their dense twins.

    python -m benchmarks.quality.architectures rates seeds [--jobs 2]      # resumable: measured cells stay
    python -m benchmarks.quality.architectures --table

Random weights, 500 steps of 16 samples, and no setting of sharing but the budget. "rates" trains both sides over a grid of
learning rates with one seed, "seeds" the other two seeds at each side's best. Text is bytes of Python's help texts in windows of
64: GPT-2 predicts the next one, BERT the 15 % that are masked, T5 the second half of a window from its first. ViT names images
of Fashion-MNIST. Writes results/architectures/.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dist_ssn
from benchmarks.markdown import mean
from benchmarks.quality.cells import SEEDS
from benchmarks.result_files import ResultFile, chosen, latest, lines_of, provenance
from dist_ssn.train.data import load_task
from dist_ssn.train.optim import build_optimizer, build_schedule
from dist_ssn.train.recipe.sections import DataConfig, OptimizerConfig, ScheduleConfig

Line = dict[str, Any]
Settings = dict[str, Any]
Cell = tuple[str, float | None, float, int]
"""architecture, budget (None: dense), learning rate, seed"""
BUDGET, RATES = 0.1, (1.875e-4, 3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3)
STEPS, BATCH, CONTEXT, HELD_OUT = 500, 16, 64, 40
WIDTH, LAYERS, HEADS = 128, 4, 4
EXTRA = 256
"""A token beside the bytes: BERT's mask, T5's start and padding."""
NOT_ASKED = -100
"""The label that these models' losses ignore."""
KEYS = ("architecture", "budget", "rate", "seed")


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: Settings = {"n_positions": CONTEXT, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    none: Settings = {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return GPT2LMHeadModel(GPT2Config(vocab_size=EXTRA, **sizes, **none))


def _encoder() -> Settings:
    sizes: Settings = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {**sizes, "intermediate_size": 4 * WIDTH, **dropouts}


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(vocab_size=EXTRA + 1, max_position_embeddings=CONTEXT, **_encoder()))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    images: Settings = {"image_size": 28, "patch_size": 4, "num_channels": 1, "num_labels": 10}
    return ViTForImageClassification(ViTConfig(**images, **_encoder()))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes: Settings = {
        "d_model": WIDTH,
        "d_kv": WIDTH // HEADS,
        "d_ff": 4 * WIDTH,
        "num_layers": LAYERS,
        "num_heads": HEADS,
    }
    special: Settings = {"decoder_start_token_id": EXTRA, "pad_token_id": EXTRA}
    return T5ForConditionalGeneration(T5Config(vocab_size=EXTRA + 1, dropout_rate=0.0, **sizes, **special))


def _next(windows: Tensor, _: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": windows, "labels": windows}  # the model compares each with the one after it


def _masked(windows: Tensor, _: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    asked = torch.rand(windows.shape, generator=draw) < 0.15
    hidden = torch.where(asked, EXTRA, windows)
    return {"input_ids": hidden, "labels": torch.where(asked, windows, NOT_ASKED)}


def _second_half(windows: Tensor, _: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    first, second = windows.split(CONTEXT // 2, dim=1)
    return {"input_ids": first, "labels": second.contiguous()}


def _named(images: Tensor, labels: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": images, "labels": labels}


class Architecture(NamedTuple):
    build: Callable[[], nn.Module]
    data: DataConfig
    ask: Callable[[Tensor, Tensor, torch.Generator], dict[str, Tensor]]
    """A batch of the data as arguments of the model, which computes its own loss."""


_TEXT, _IMAGES = DataConfig("text"), DataConfig("fashion_mnist", limit=10_000)
ARCHITECTURES = {
    "GPT-2": Architecture(_gpt2, _TEXT, _next),
    "BERT": Architecture(_bert, _TEXT, _masked),
    "ViT": Architecture(_vit, _IMAGES, _named),
    "T5": Architecture(_t5, _TEXT, _second_half),
}


def trained(cell: Cell, steps: int = STEPS) -> Line:
    """Trains one run on one thread. Returns its settings, number of parameters, and mean loss on held-out samples."""
    name, budget, rate, seed = cell
    commit = provenance()["commit"]
    torch.set_num_threads(1)
    architecture = ARCHITECTURES[name]
    task = load_task(architecture.data, context=CONTEXT, seed=seed)
    torch.manual_seed(seed)
    model = architecture.build()
    if budget is not None:
        dist_ssn.share(model, budget, seed=seed)
    optimizer = build_optimizer(model, OptimizerConfig(lr=rate, weight_decay=0.1))
    schedule = build_schedule(optimizer, ScheduleConfig(warmup=min(50, steps)), steps)
    draw = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        model(**architecture.ask(*task.batch(step, BATCH), draw)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    draw.manual_seed(0)  # every run is asked the same
    with torch.no_grad():
        held_out = task.validation(BATCH, limit=HELD_OUT)
        losses = [model(**architecture.ask(*batch, draw)).loss.item() for batch in held_out]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    measured = {"parameters": parameters, "steps": steps, "validation_loss": statistics.mean(losses)}
    return {**dict(zip(KEYS, cell, strict=True)), **measured, "commit": commit}


def rates() -> Iterator[Cell]:
    """Cells of every learning rate, with one seed."""
    for name in ARCHITECTURES:
        for budget in (None, BUDGET):
            yield from ((name, budget, rate, SEEDS[0]) for rate in RATES)


def seeds() -> Iterator[Cell]:
    """Cells of the other seeds, at each side's best learning rate."""
    for (name, budget), rate in best_rates(lines_of("architectures")).items():
        yield from ((name, budget, rate, seed) for seed in SEEDS[1:])


def best_rates(lines: Iterable[Line]) -> dict[tuple[str, float | None], float]:
    """(architecture, budget) → the learning rate with the least loss, for the first seed."""
    first = [line for line in lines if line["seed"] == SEEDS[0]]
    ranked = sorted(first, key=lambda line: -line["validation_loss"])
    return {(line["architecture"], line["budget"]): line["rate"] for line in ranked}


SUITES = {"rates": rates, "seeds": seeds}


def rows(lines: Iterable[Line]) -> Iterator[tuple[str, ...]]:
    """Rows of the table: parameters, best learning rate and losses of each side, and the distance of shared to dense."""
    lines = list(lines)
    known, best = latest(lines, KEYS), best_rates(lines)
    for name in ARCHITECTURES:
        means: dict[float | None, float] = {}
        for budget in (None, BUDGET):
            rate = best.get((name, budget))
            cells = [(name, budget, rate, seed) for seed in SEEDS]
            found = [known[cell] for cell in cells if cell in known]
            if not found:
                continue
            losses = [line["validation_loss"] for line in found]
            means[budget] = statistics.mean(losses)
            side = "dense" if budget is None else f"**{budget:.0%} bank**"
            apart = f"{means[budget] / means[None] - 1:+.1%}" if budget and None in means else ""
            yield f"{name}: {side}", f"{found[0]['parameters']:,}", f"{rate:g}", mean(losses), apart


HEADINGS = ("", "parameters", "best learning rate", "validation loss, mean (seed by seed)", "from its dense twin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="rates|seeds", help="what to measure")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    arguments = parser.parse_args()
    results = ResultFile("architectures")
    for suite in chosen(parser, arguments.suites, SUITES):
        done = latest(results.lines(), KEYS)
        wanted = [cell for cell in SUITES[suite]() if cell not in done]
        for line in results.measure(trained, wanted, arguments.jobs):
            print(f"  {line['validation_loss']:.4f}  {[line[key] for key in KEYS]}", flush=True)
    if arguments.table or not arguments.suites:
        table = Table(*HEADINGS)
        for row in rows(results.lines()):
            table.add_row(*row)
        Console().print(table)


if __name__ == "__main__":
    main()
