"""Step time by number of hosts: up to 8 emulated ones measured beside the model, up to 4,096 by the model alone.

    sudo python -m benchmarks.network.scaling measured modelled [--hosts 2 4 8] [--mbit 50] [--repetitions 3]
    python -m benchmarks.network.scaling --table

Hosts share this machine's processors, so more of them compute more slowly, on any network. Efficiency is therefore relative to
the same hosts on links of 10 Gbit/s: the loss is the network's. "weak": a batch of 4 per host;
"strong": 16 in all. Resumable; writes results/scaling/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.network.in_the_lab import cluster_file, quietly
from benchmarks.network.prediction import MODELS, calibrate, measure, predict
from benchmarks.result_files import ResultFile, chosen, latest
from dist_ssn.cluster import load_cluster
from dist_ssn.cost.alternatives import per_node

Line = dict[str, Any]
MODEL, BUDGET, FAST = "gpt-128", 0.1, 10_000.0
BATCHES = {"weak": lambda hosts: 4 * hosts, "strong": lambda hosts: 16}
CLUSTERS = ("ethernet-1g", "ethernet-10g", "infiniband-200g", "wan")
WORKERS = (2, 8, 64, 512, 4096)


def measured(hosts: list[int], mbit: float, repetition: int, done: set[tuple[Any, ...]]) -> Iterator[Line]:
    """Measures dense and shared steps on slow and on fast links, and predicts both."""
    for count in hosts:
        for batch in sorted({size(count) for size in BATCHES.values()}):
            cells = [
                {
                    "what": "measured",
                    "hosts": count,
                    "batch": batch,
                    "mbit": mbit,
                    "budget": budget,
                    "repetition": repetition,
                }
                for budget in (None, BUDGET)
            ]
            cells = [cell for cell in cells if tuple(cell[key] for key in KEYS) not in done]
            if not cells:
                continue
            with tempfile.TemporaryDirectory() as name:
                folder, more = Path(name), [f"--batch_size={batch}"]
                compute = calibrate(count, MODEL, BUDGET, folder, more)
                for cell in cells:
                    budget, alternative = cell["budget"], "none" if cell["budget"] else "dense"
                    for where, rate in (("slow", mbit), ("fast", FAST)):
                        cluster = cluster_file(folder, hosts=count, mbit=rate)
                        said = predict(cluster, MODEL, BUDGET, compute, more)[alternative]["ms_per_step"]
                        ms = measure(cluster, "ddp", MODEL, budget, folder, more)["ms_per_step"]
                        cell |= {f"{where}_ms": ms, f"{where}_predicted_ms": said}
                    yield cell


def modelled() -> Iterator[Line]:
    """Predicts steps on other clusters, from the compute of one process here with a batch of 4."""
    base = ["plan", "--config=quickstart", "--threads=1", f"--share.budget={BUDGET}", "--json"]
    base += [f"--model_args={json.dumps(MODELS[MODEL])}", f"--workers={','.join(map(str, WORKERS))}"]
    for name in CLUSTERS:
        cluster = load_cluster(name)
        batch = 4 * cluster.nodes * per_node(cluster)
        said = json.loads(quietly(["-m", "dist_ssn.cli", *base, f"--cluster={name}", f"--batch_size={batch}"]))
        for row in said["workers"]:
            yield {"what": "modelled", "cluster": name, "budget": BUDGET, **row}


def tables(lines: Iterable[Line]) -> list[Table]:
    """Two tables: measured efficiencies beside predicted ones, and modelled efficiencies."""
    lines = list(lines)
    first = Table(
        "hosts",
        "batch, in all",
        "Mbit/s",
        "side",
        "ms per step: median (min-max)",
        "at 10 Gbit/s",
        "efficiency",
        "predicted",
    )
    cells: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        if line["what"] == "measured":
            cells.setdefault(tuple(line[key] for key in KEYS[:-1]), []).append(line)
    for (hosts, batch, mbit, budget), mine in cells.items():
        middle = {key: statistics.median(line[key] for line in mine) for key in mine[0] if key.endswith("_ms")}
        slow = [line["slow_ms"] for line in mine]
        weak = " and ".join(name for name, size in BATCHES.items() if size(hosts) == batch)
        first.add_row(
            *(str(hosts), f"{batch} ({weak})", f"{mbit:g}", f"{budget:.0%} bank" if budget else "dense"),
            *(f"{middle['slow_ms']:.0f} ({min(slow):.0f}-{max(slow):.0f})", f"{middle['fast_ms']:.0f}"),
            f"{middle['fast_ms'] / middle['slow_ms']:.0%}",
            f"{middle['fast_predicted_ms'] / middle['slow_predicted_ms']:.0%}",
        )
    second = Table("cluster", "side", *(f"{count:,} processes" for count in WORKERS))
    there = latest((line for line in lines if line["what"] == "modelled"), ("cluster", "processes"))
    for cluster in dict.fromkeys(name for name, _ in there):
        for side in ("dense", "shared"):
            rows = [there[cluster, count] for count in WORKERS]
            texts = (f"{row[f'{side}_efficiency']:.0%} ({row[f'{side}_ms_per_step']:,.0f} ms)" for row in rows)
            second.add_row(cluster, side, *texts)
    return [first, second]


KEYS = ("hosts", "batch", "mbit", "budget", "repetition")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="measured|modelled", help="what to do")
    parser.add_argument("--hosts", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--mbit", type=float, default=50.0)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    arguments = parser.parse_args()
    chosen(parser, arguments.what, ["measured", "modelled"])
    results = ResultFile("scaling")
    if "measured" in arguments.what:
        done = {tuple(line[key] for key in KEYS) for line in results.lines() if line["what"] == "measured"}
        for repetition in range(arguments.repetitions):
            for line in measured(arguments.hosts, arguments.mbit, repetition, done):
                results.add(line)
                print(line, flush=True)
    if "modelled" in arguments.what:
        for line in modelled():
            results.add(line)
    if arguments.table or not arguments.what:
        for table in tables(results.lines()):
            Console(width=180).print(table)


if __name__ == "__main__":
    main()
