"""Bytes that two emulated hosts send in a whole run that keeps pretrained weights, by their network devices.

    sudo python -m benchmarks.network.keep_bytes [--budgets 2000 0.5M] [--steps 50]

A GPT of 15.9 M parameters (64 MB) is fine-tuned by `dist-ssn lab run`: start, evaluation, metrics and packet headers included.
Beside each run is the bank alone: the same launcher starts processes that send a tensor of the bank's size once, and all-reduce it
once for each step. What the run sends beyond that is all that a base of 64 MB costs. Writes results/keep_bytes/.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from benchmarks.network.in_the_lab import cluster_file, in_the_lab
from benchmarks.result_files import ResultFile
from dist_ssn.train.data import data_hints
from dist_ssn.train.models import build_model
from dist_ssn.train.recipe.schema import DataConfig

MODEL = {"layers": 5, "width": 512, "heads": 8, "context": 32}
HOSTS = 2


def pretrained(folder: Path) -> tuple[Path, int]:
    """A file with the model's values, and their bytes."""
    torch.manual_seed(0)
    model = build_model("gpt", MODEL, data_hints(DataConfig(), context=MODEL["context"]))
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}  # a tied one once
    save_file(tensors, folder / "pretrained.safetensors")
    return folder / "pretrained.safetensors", sum(tensor.nbytes for tensor in tensors.values())


def sent_by(program: list[str], folder: Path) -> list[int]:
    """Runs a program on the hosts; bytes that each has sent."""
    in_the_lab(cluster_file(folder, hosts=HOSTS), folder / "logs", program)
    return [host["sent_bytes"] for host in json.loads((folder / "logs" / "counters.json").read_text())]


def measure(budget: str, steps: int) -> dict[str, Any]:
    """Trains once, and sends the bank alone once."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights, base_bytes = pretrained(folder)
        program = ["train", "--config", "quickstart", f"--output={folder}", f"--share.budget={budget}"]
        program += [f"--model_weights={weights}", "--share.keep=true", "--batch_size=4", "--schedule.warmup=1"]
        program += [f"--model_args.{key}={value}" for key, value in MODEL.items()]
        program += [f"--steps={steps}", f"--evaluate_every={steps}", "--evaluate_batches=1", "--no-progress"]
        sent = sent_by(program, folder)
        row = json.loads((folder / "quickstart" / "summary.json").read_text())["rows"][0]
        alone = sent_by([__file__, f"--alone={row['parameters']}", f"--steps={steps}"], folder)
    ring = round(2 * (HOSTS - 1) / HOSTS * 4 * row["parameters"] * steps)
    return {
        **{"budget": budget, "steps": steps, "hosts": HOSTS, "base_bytes": base_bytes, "parameters": row["parameters"]},
        **{"ring_bytes": ring, "meter_bytes": row["total_bytes"], "sent_bytes": sent, "alone_bytes": alone},
        "beyond_bytes": [mine - theirs for mine, theirs in zip(sent, alone, strict=True)],
    }


def send_alone(parameters: int, steps: int) -> None:
    """On a host: sends a tensor once, and sums it once for each step."""
    dist.init_process_group("gloo")
    tensor = torch.zeros(parameters)
    dist.broadcast(tensor, src=0)
    for _ in range(steps):
        dist.all_reduce(tensor)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--budgets", nargs="+", default=["2000", "0.5M"])
    parser.add_argument("--alone", type=int, help="what a host runs: a tensor of so many elements")
    arguments = parser.parse_args()
    if arguments.alone:
        send_alone(arguments.alone, arguments.steps)
        return
    results = ResultFile("keep_bytes")
    table = Table(
        "budget", "parameters", "ring, kB", "meter, kB", "sent by each host, kB", "bank alone, kB", "beyond, kB"
    )
    for budget in arguments.budgets:
        results.add(line := measure(budget, arguments.steps))
        cells = [f"{line['parameters']:,}", f"{line['ring_bytes'] / 1e3:.1f}", f"{line['meter_bytes'] / 1e3:.1f}"]
        for key in ("sent_bytes", "alone_bytes", "beyond_bytes"):
            cells.append(" ".join(f"{value / 1e3:.1f}" for value in line[key]))
        table.add_row(budget, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
