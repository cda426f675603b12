"""Step time of a shared model relative to its dense twin: one thread, the two sides in turn, medians.

python -m benchmarks.compute.step_time [--budget 0.1] [--morph auto] [--repetitions 7] [--device cuda]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

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


MODELS = {
    "gpt-256": lambda: gpt(256),
    "gpt-512": lambda: gpt(512),
    "gpt-1024": lambda: gpt(1024, samples=64),
    "wrn-16-4": lambda: wide_resnet(4),
}


def stepper(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], float]:
    """A function that trains one step and returns its seconds, up to the end of a GPU's last kernel."""
    wait = torch.cuda.synchronize if inputs.is_cuda else lambda: None
    optimizer = torch.optim.AdamW(dist_ssn.parameter_groups(model), lr=1e-3)

    def step() -> float:
        wait()
        start = time.perf_counter()
        outputs = model(inputs)
        F.cross_entropy(outputs.flatten(0, -2), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        return time.perf_counter() - start

    return step


def measure(name: str, budget: float, morph: str, repetitions: int, device: str) -> dict[str, object]:
    """Step times of both sides in ms, and their ratios by medians and by the fastest steps."""
    torch.manual_seed(0)
    build, *samples = MODELS[name]()
    inputs, targets = (sample.to(device) for sample in samples)
    dense = stepper(build().to(device), inputs, targets)
    shared = stepper(dist_ssn.share(build(), budget, morph=morph).to(device), inputs, targets)
    seconds: list[tuple[float, float]] = [(dense(), shared()) for _ in range(WARM_UP + repetitions)][WARM_UP:]
    ours, theirs = [s for _, s in seconds], [d for d, _ in seconds]
    return {
        "model": name,
        "budget": budget,
        "morph": morph,
        "repetitions": repetitions,
        "device": device,
        "dense_ms": [1e3 * f(theirs) for f in (statistics.median, min, max)],
        "shared_ms": [1e3 * f(ours) for f in (statistics.median, min, max)],
        "ratio": statistics.median(ours) / statistics.median(theirs),
        "ratio_of_minima": min(ours) / min(theirs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["gpt-256", "wrn-16-4"], choices=list(MODELS))
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--morph", default="auto")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = ResultFile("step_time")
    table = Table("model", "morph", "dense ms: median (min-max)", "shared ms", "ratio", "ratio of minima")
    for name in arguments.models:
        line = measure(name, arguments.budget, arguments.morph, arguments.repetitions, arguments.device)
        results.add(line)
        times = ["{:.1f} ({:.1f}-{:.1f})".format(*line[side]) for side in ("dense_ms", "shared_ms")]  # type: ignore[misc]
        table.add_row(name, arguments.morph, *times, f"{line['ratio']:.3f}", f"{line['ratio_of_minima']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
