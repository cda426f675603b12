"""The emulated cluster with other links than those of its file, and programs on its hosts."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dist_ssn.cluster import load_cluster


def cluster_file(
    folder: Path,
    *,
    hosts: int | None = None,
    mbit: float | None = None,
    launcher: str = "torchrun",
    delay_ms: float = 0,
    loss_percent: float = 0,
) -> str:
    """Writes a cluster file into `folder` and returns its path. Other facts are those of emulated-100mbit."""
    cluster = load_cluster("emulated-100mbit")
    facts: dict[str, Any] = {
        key: value for key, value in dataclasses.asdict(cluster).items() if value and key not in ("name", "within")
    }
    facts |= {"nodes": hosts or cluster.nodes, "launcher": launcher, "delay_ms": delay_ms, "loss_percent": loss_percent}
    facts["between"] = {
        "latency_us": cluster.between.latency_us + 1000 * delay_ms,
        "bandwidth_mbit": mbit or cluster.between.bandwidth_mbit,
    }
    path = folder / f"{facts['nodes']}-{launcher}-{mbit}-{delay_ms}-{loss_percent}.yaml"
    path.write_text(yaml.safe_dump(facts))
    return str(path)


def in_the_lab(cluster: str, logs: Path, program: Sequence[str]) -> None:
    """Runs `program` (a command of dist-ssn, or a script and its arguments) on all hosts; their logs go to `logs`.

    Raises:
        SystemExit: As `quietly`.
    """
    lab = ["-m", "dist_ssn.cli", "lab", "run", f"--cluster={cluster}", f"--logs={logs}"]
    quietly([*lab, "--", *program])


def quietly(arguments: Sequence[str], **environment: str) -> str:
    """Output of Python with these arguments.

    Raises:
        SystemExit: The program failed; with the end of its output.
    """
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{(done.stdout + done.stderr)[-4000:]}\nexit code {done.returncode}")
    return done.stdout
