"""Bytes sent by the counters of the network interface, beside those of the meter, on emulated hosts.

    sudo python -m benchmarks.network.interface_bytes --hosts h0 h1 --address 10.77.0.1

The hosts are network namespaces that exist already, each with a device `--device` and reachable at `--address` (the first
one's). One process trains in each; the counters of its device are read before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.result_files import ResultFile

PORT = 29_611


def sent(host: str, device: str) -> int:
    """Bytes that the host's network device has sent so far."""
    path = f"/sys/class/net/{device}/statistics/tx_bytes"
    text = subprocess.run(["ip", "netns", "exec", host, "cat", path], capture_output=True, text=True, check=True).stdout
    return int(text)


def run_on(hosts: list[str], address: str, device: str, program: list[str]) -> str:
    """Runs `dist-ssn PROGRAM` in one process on each host and returns the output of the first.

    Raises:
        SystemExit: A process failed; its own message is on the terminal.
    """
    processes = []
    for rank, host in enumerate(hosts):
        launcher = ["--nnodes", str(len(hosts)), "--nproc-per-node", "1", "--node-rank", str(rank)]
        rendezvous = ["--master-addr", address, "--master-port", str(PORT)]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *launcher,
            *rendezvous,
            "-m",
            "dist_ssn.cli",
            *program,
        ]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": device, "OMP_NUM_THREADS": "1"}
        out = subprocess.DEVNULL if rank else subprocess.PIPE
        processes.append(
            subprocess.Popen(["ip", "netns", "exec", host, *command], env=environment, stdout=out, text=True)
        )
    said, _ = processes[0].communicate(timeout=1800)
    codes = [process.wait(timeout=1800) for process in processes]
    if any(codes):
        raise SystemExit(f"{program[0]} ended with exit codes {codes}")
    return said


def train_on(hosts: list[str], address: str, device: str, recipe: list[str], folder: str) -> dict[str, Any]:
    """Trains the quick start with these settings, one process on each host, and returns its summary."""
    program = ["train", "--config", "quickstart", f"--output={folder}", "--schedule.warmup=1", *recipe]
    run_on(hosts, address, device, program)
    return json.loads((Path(folder) / "quickstart" / "summary.json").read_text())


def measure(arguments: argparse.Namespace, budget: str | None, folder: str) -> dict[str, object]:
    """Bytes per rank and step, by the meter and by the interfaces."""
    before = [sent(host, arguments.device) for host in arguments.hosts]
    recipe = [f"--steps={arguments.steps}", f"--evaluate_every={arguments.steps}"]
    recipe += [f"--share.budget={json.dumps(budget) if budget is None else budget}"]
    summary = train_on(arguments.hosts, arguments.address, arguments.device, recipe, folder)
    after = [sent(host, arguments.device) for host in arguments.hosts]
    row = summary["rows"][0]
    interface = [b - a for a, b in zip(before, after, strict=True)]
    return {
        "budget": budget,
        "hosts": len(arguments.hosts),
        "steps": arguments.steps,
        "parameters": row["parameters"],
        "bytes_per_step_logical": row["bytes_per_step_logical"],
        "bytes_per_step_ring": row["bytes_per_step_ring"],
        "ring_bytes": row["total_bytes"],
        "interface_bytes": interface,
        "interface_to_ring": max(interface) / row["total_bytes"],
        "ms_per_step": row["ms_per_step"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", default=["h0", "h1"])
    parser.add_argument("--address", default="10.77.0.1")
    parser.add_argument("--device", default="e0")
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    results = ResultFile("interface_bytes")
    table = Table(
        "budget", "parameters", "logical B/step", "ring B/step", "ring B in all", "interface B", "interface / ring"
    )
    for budget in ("10%", None):
        with tempfile.TemporaryDirectory() as folder:
            line = measure(arguments, budget, folder)
        results.add(line)
        table.add_row(budget or "dense", *(str(line[key]) for key in (
            "parameters", "bytes_per_step_logical", "bytes_per_step_ring", "ring_bytes", "interface_bytes")),
            f"{line['interface_to_ring']:.3f}")  # fmt: skip
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
