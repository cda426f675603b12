"""Step time of a shared model relative to its dense twin: one thread, all sides in turn, medians.

python -m benchmarks.compute.step_time [--generate on_demand per_step] [--budget 0.1] [--repetitions 7] [--device cuda] [--compile]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dist_ssn
from benchmarks.result_files import ResultFile
from dist_ssn.train.models.gpt import build_gpt
from dist_ssn.train.models.wide_resnet import build_wide_resnet

WARM_UP = 2


def gpt(width: int, samples: int = 8) -> tuple[Callable[[], nn.Module], Tensor, Tensor]:
    """A GPT of 4 layers on samples of 128 tokens."""
    tokens = torch.randint(0, 256, (samples, 128))
    return lambda: build_gpt(layers=4, width=width, heads=4, context=128), tokens, tokens


def wide_resnet(width: int) -> tuple[Callable[[], nn.Module], Tensor, Tensor]:
    """A Wide ResNet of depth 16 on 128 images of 3 × 32 × 32."""
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))
    return lambda: build_wide_resnet(depth=16, width=width, channels=3), images, labels


class Encoder(nn.Module):
    """Four encoder layers of width 96, and a head."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.TransformerEncoderLayer(96, 4, 384, dropout=0.0, batch_first=True) for _ in range(4)]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(96, 256)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 96) → (B, T, 256)."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Recurrent(nn.Module):
    """Two LSTM layers of width 256 on bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 128)
        self.lstm = nn.LSTM(128, 256, num_layers=2, batch_first=True)
        self.head = nn.Linear(256, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, T, 256)."""
        return self.head(self.lstm(self.embedding(tokens))[0])


def encoder() -> tuple[Callable[[], nn.Module], Tensor, Tensor]:
    """An encoder on 8 samples of 32 positions."""
    return Encoder, torch.randn(8, 32, 96), torch.randint(0, 256, (8, 32))


def recurrent() -> tuple[Callable[[], nn.Module], Tensor, Tensor]:
    """An LSTM on 8 samples of 64 bytes."""
    tokens = torch.randint(0, 256, (8, 64))
    return Recurrent, tokens, tokens


def small_wide_resnet() -> tuple[Callable[[], nn.Module], Tensor, Tensor]:
    """A Wide ResNet 16-1 on 64 images of 16 × 16."""
    images, labels = torch.randn(64, 1, 16, 16), torch.randint(0, 10, (64,))
    return lambda: build_wide_resnet(depth=16, width=1, channels=1), images, labels


MODELS = {
    "encoder-96": encoder,
    "gpt-128": lambda: gpt(128),
    "lstm-256": recurrent,
    "wrn-16-1": small_wide_resnet,
    "gpt-256": lambda: gpt(256),
    "gpt-512": lambda: gpt(512),
    "gpt-1024": lambda: gpt(1024, samples=64),
    "wrn-16-4": lambda: wide_resnet(4),
}


def stepper(model: nn.Module, inputs: Tensor, targets: Tensor, compiled: bool) -> Callable[[], float]:
    """A function that trains one step and returns its seconds, up to the end of a GPU's last kernel."""
    wait = torch.cuda.synchronize if inputs.is_cuda else lambda: None
    optimizer = torch.optim.AdamW(dist_ssn.parameter_groups(model), lr=1e-3)
    forward = torch.compile(model) if compiled else model

    def step() -> float:
        wait()
        start = time.perf_counter()
        outputs = forward(inputs)
        F.cross_entropy(outputs.flatten(0, -2), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        return time.perf_counter() - start

    return step


def measure(name: str, arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """For each mode of generation: step times of both sides in ms, and their ratios by medians and by the fastest steps."""
    torch.manual_seed(0)
    build, *samples = MODELS[name]()
    inputs, targets = (sample.to(arguments.device) for sample in samples)
    sides = {"dense": stepper(build().to(arguments.device), inputs, targets, arguments.compile)}
    for mode in arguments.generate:
        shared = dist_ssn.share(build(), arguments.budget, morph=arguments.morph, generate=mode)
        sides[mode] = stepper(shared.to(arguments.device), inputs, targets, arguments.compile)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(WARM_UP + arguments.repetitions):
        for side, step in sides.items():
            seconds[side].append(step())
    first = {side: times[0] for side, times in seconds.items()}  # with the compiler's time
    theirs = seconds.pop("dense")[WARM_UP:]
    for mode, times in seconds.items():
        ours = times[WARM_UP:]
        yield {
            "model": name,
            "budget": arguments.budget,
            "morph": arguments.morph,
            "generate": mode,
            "compiled": arguments.compile,
            "repetitions": arguments.repetitions,
            "device": arguments.device,
            "dense_ms": [1e3 * f(theirs) for f in (statistics.median, min, max)],
            "shared_ms": [1e3 * f(ours) for f in (statistics.median, min, max)],
            "first_seconds": [first["dense"], first[mode]],
            "ratio": statistics.median(ours) / statistics.median(theirs),
            "ratio_of_minima": min(ours) / min(theirs),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["gpt-256", "wrn-16-4"], choices=list(MODELS))
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--morph", default="auto")
    parser.add_argument("--generate", nargs="*", default=["on_demand", "per_step"], choices=["on_demand", "per_step"])
    parser.add_argument("--compile", action="store_true", help="both sides under torch.compile")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = ResultFile("step_time")
    table = Table("model", "generated", "dense ms: median (min-max)", "shared ms", "ratio", "ratio of minima")
    for name in arguments.models:
        for line in measure(name, arguments):
            results.add(line)
            times = ["{:.1f} ({:.1f}-{:.1f})".format(*line[side]) for side in ("dense_ms", "shared_ms")]  # type: ignore[misc]
            table.add_row(name, line["generate"], *times, f"{line['ratio']:.3f}", f"{line['ratio_of_minima']:.3f}")  # type: ignore[arg-type]
    Console().print(table)


if __name__ == "__main__":
    main()
