"""Bytes that two emulated hosts send in a whole run that keeps pretrained weights, by their network devices.

    sudo python -m benchmarks.network.keep_bytes [--budgets 2000 20000] [--steps 50]

A GPT of 15.9 M parameters (64 MB) is fine-tuned by `dist-ssn lab run`: start, evaluation, metrics and packet headers included. Beside
each run is the same from scratch, with a bank of the same size, which keeps nothing. `beyond` is what a host sends more than the
ring formula asks for the bank in all steps, in full Ethernet frames of TCP (1448 bytes in 1514). Writes results/keep_bytes/.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from benchmarks.network.in_the_lab import cluster_file, in_the_lab
from benchmarks.result_files import ResultFile
from dist_ssn.train.data import data_hints
from dist_ssn.train.models import build_model
from dist_ssn.train.recipe.schema import DataConfig

MODEL = {"layers": 5, "width": 512, "heads": 8, "context": 32}
HOSTS, FRAME = 2, 1514 / 1448


def pretrained(folder: Path) -> tuple[Path, int]:
    """A file with the model's values, and their bytes."""
    torch.manual_seed(0)
    model = build_model("gpt", MODEL, data_hints(DataConfig(), context=MODEL["context"]))
    unique = {id(p): name for name, p in reversed(list(model.state_dict(keep_vars=True).items()))}
    tensors = {name: model.state_dict()[name] for name in unique.values()}
    save_file(tensors, folder / "pretrained.safetensors")
    return folder / "pretrained.safetensors", sum(tensor.nbytes for tensor in tensors.values())


def measure(budget: str, keep: bool, steps: int) -> dict[str, Any]:
    """Trains once, and reads the counters of the hosts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights, base_bytes = pretrained(folder)
        kept = [f"--model_weights={weights}", "--share.keep=true"] if keep else []
        program = ["train", "--config", "quickstart", f"--output={folder}", f"--share.budget={budget}", *kept]
        program += [f"--model_args.{key}={value}" for key, value in MODEL.items()]
        program += [f"--steps={steps}", f"--evaluate_every={steps}", "--evaluate_batches=1", "--batch_size=4"]
        in_the_lab(
            cluster_file(folder, hosts=HOSTS), folder / "logs", [*program, "--schedule.warmup=1", "--no-progress"]
        )
        row = json.loads((folder / "quickstart" / "summary.json").read_text())["rows"][0]
        counters = json.loads((folder / "logs" / "counters.json").read_text())
    sent = [host["sent_bytes"] for host in counters]
    ring = round(2 * (HOSTS - 1) / HOSTS * 4 * row["parameters"] * steps)
    return {
        **{"budget": budget, "keep": keep, "steps": steps, "hosts": HOSTS, "base_bytes": base_bytes},
        **{"parameters": row["parameters"], "ring_bytes": ring, "meter_bytes": row["total_bytes"], "sent_bytes": sent},
        "beyond_bytes": [value - round(ring * FRAME) for value in sent],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--budgets", nargs="+", default=["2000", "20000"])
    arguments = parser.parse_args()
    results = ResultFile("keep_bytes")
    table = Table("budget", "keeps", "parameters", "ring, kB", "sent by each host, kB", "beyond, kB")
    for budget in arguments.budgets:
        for keep in (True, False):
            results.add(line := measure(budget, keep, arguments.steps))
            cells = [f"{line['parameters']:,}", f"{line['ring_bytes'] / 1e3:.1f}"]
            cells += [" ".join(f"{value / 1e3:.1f}" for value in line[key]) for key in ("sent_bytes", "beyond_bytes")]
            table.add_row(budget, "yes" if keep else "no", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
