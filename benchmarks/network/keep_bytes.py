"""Bytes that two emulated hosts send in a whole run that keeps pretrained weights, by their network devices.

    sudo python -m benchmarks.network.keep_bytes [--budgets 2000 0.5M] [--steps 50] [--by recipe script]

A GPT of 15.9 M parameters (64 MB) is fine-tuned on the hosts of `dist-ssn lab run`, by a recipe (evaluation, metrics and the ranks'
agreements included), and by a script of a user's own with DDP. Beside each is the bank alone: the same launcher starts processes
that send a tensor of the bank's size once, and all-reduce it once for each step, with a pause about as long as a step before each.
What a run sends beyond that is all that a base of 64 MB costs, start and packet headers included. Writes results/keep_bytes/.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dist_ssn
from benchmarks.network.in_the_lab import cluster_file, in_the_lab
from benchmarks.result_files import ResultFile
from dist_ssn.train.data import data_hints
from dist_ssn.train.models import build_model
from dist_ssn.train.recipe.sections import DataConfig

MODEL = {"layers": 5, "width": 512, "heads": 8, "context": 32}
HOSTS = 2
PAUSE_SECONDS = 0.3
"""Before each sum of the bank alone: how many packets only confirm others depends on the time between them."""


def model_of() -> nn.Module:
    """The GPT, dense, with random values."""
    torch.manual_seed(0)
    return build_model("gpt", MODEL, data_hints(DataConfig(), context=MODEL["context"]))


def pretrained(folder: Path) -> tuple[Path, int]:
    """A file with the model's values, and their bytes."""
    tensors = {name: parameter.detach() for name, parameter in model_of().named_parameters()}  # a tied one once
    save_file(tensors, folder / "pretrained.safetensors")
    return folder / "pretrained.safetensors", sum(tensor.nbytes for tensor in tensors.values())


def sent_by(program: list[str], folder: Path) -> list[int]:
    """Runs a program on the hosts; bytes that each has sent."""
    in_the_lab(cluster_file(folder, hosts=HOSTS), folder / "logs", program)
    return [host["sent_bytes"] for host in json.loads((folder / "logs" / "counters.json").read_text())]


def by_recipe(budget: str, steps: int, weights: Path, folder: Path) -> list[str]:
    """Arguments of `dist-ssn`."""
    program = ["train", "--config", "quickstart", f"--output={folder}", f"--share.budget={budget}"]
    program += [f"--model_weights={weights}", "--share.keep=true", "--batch_size=4", "--schedule.warmup=1"]
    program += [f"--model_args.{key}={value}" for key, value in MODEL.items()]
    return [*program, f"--steps={steps}", f"--evaluate_every={steps}", "--evaluate_batches=1", "--no-progress"]


def by_script(budget: str, steps: int, weights: Path, folder: Path) -> list[str]:
    """This file, as a user's script."""
    return [__file__, f"--train={budget}", f"--weights={weights}", f"--steps={steps}"]


WAYS = {"recipe": by_recipe, "script": by_script}


def measure(way: str, budget: str, steps: int) -> dict[str, Any]:
    """Trains once, and sends the bank alone once."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights, base_bytes = pretrained(folder)
        sent = sent_by(WAYS[way](budget, steps, weights, folder), folder)
        parameters = dist_ssn.make_plan(model_of(), budget, keep=True).parameters
        alone = sent_by([__file__, f"--alone={parameters}", f"--steps={steps}"], folder)
    ring = round(2 * (HOSTS - 1) / HOSTS * 4 * parameters * steps)
    return {
        **{"by": way, "budget": budget, "steps": steps, "hosts": HOSTS, "base_bytes": base_bytes},
        **{"parameters": parameters, "ring_bytes": ring, "sent_bytes": sent, "alone_bytes": alone},
        "pause_seconds": PAUSE_SECONDS,
        "beyond_bytes": [mine - theirs for mine, theirs in zip(sent, alone, strict=True)],
    }


def train(budget: str, weights: str, steps: int) -> None:
    """On a host: a user's script."""
    dist.init_process_group("gloo")
    model = model_of()
    model.load_state_dict(load_file(weights), strict=False)  # a tied tensor is there once
    dist_ssn.share(model, budget, keep=True)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(dist_ssn.parameter_groups(model, weight_decay=0.0, lr=1e-3))
    torch.manual_seed(dist.get_rank())
    for _ in range(steps):
        tokens = torch.randint(0, 256, (2, MODEL["context"] + 1))
        F.cross_entropy(wrapped(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.destroy_process_group()


def send_alone(parameters: int, steps: int) -> None:
    """On a host: sends a tensor once, and sums it once for each step."""
    dist.init_process_group("gloo")
    tensor = torch.zeros(parameters)
    dist.broadcast(tensor, src=0)
    for _ in range(steps):
        time.sleep(PAUSE_SECONDS)
        dist.all_reduce(tensor)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--budgets", nargs="+", default=["2000", "0.5M"])
    parser.add_argument("--by", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument(
        "--alone", type=int, help="run as one of the hosts: all-reduce a tensor with this number of elements"
    )
    parser.add_argument("--train", help="run as one of the hosts: a user's script, with this budget")
    parser.add_argument("--weights", help="file of the pretrained values, with --train")
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train, arguments.weights, arguments.steps)
        return
    if arguments.alone:
        send_alone(arguments.alone, arguments.steps)
        return
    results = ResultFile("keep_bytes")
    table = Table("by", "budget", "parameters", "ring, kB", "sent by each host, kB", "bank alone, kB", "beyond, kB")
    for budget in arguments.budgets:
        for way in arguments.by:
            results.add(line := measure(way, budget, arguments.steps))
            cells = [f"{line['parameters']:,}", f"{line['ring_bytes'] / 1e3:.1f}"]
            for key in ("sent_bytes", "alone_bytes", "beyond_bytes"):
                cells.append(" ".join(f"{value / 1e3:.1f}" for value in line[key]))
            table.add_row(way, budget, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
