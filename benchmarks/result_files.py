"""Results files: one measurement per line, with everything that is needed to repeat it."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import multiprocessing
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(os.environ.get("DIST_SSN_RESULTS") or Path(__file__).parent / "results")
"""Folder of the lines. With another folder in the environment, everything is measured anew."""


def provenance() -> dict[str, Any]:
    """Command, commit, versions and hardware of this process."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    cpu = Path("/proc/cpuinfo")
    models = [line for line in cpu.read_text().splitlines() if "model name" in line] if cpu.exists() else []
    hardware = f"{len(models)} × {models[0].split(':')[1].strip()}" if models else platform.processor()
    if torch.cuda.is_available():
        hardware += f", {torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return {
        "command": " ".join(["python", "-m", *sys.orig_argv[2:]]) if "-m" in sys.orig_argv else " ".join(sys.orig_argv),
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
        "time": datetime.datetime.now().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hardware": hardware,
    }


def lines_of(benchmark: str) -> list[dict[str, Any]]:
    """Every measurement of this benchmark so far, oldest first."""
    found: list[dict[str, Any]] = []
    for path in sorted((RESULTS / benchmark).glob("*.jsonl")):
        found += _parsed(path, path.stat().st_mtime_ns, path.stat().st_size)
    return sorted(found, key=lambda line: line.get("time", line["date"]))


@functools.cache
def _parsed(path: Path, changed: int, size: int) -> tuple[dict[str, Any], ...]:
    """The lines of a file, parsed once for each of its versions; nobody changes them."""
    return tuple(json.loads(line) for line in path.read_text().splitlines())


class ResultFile:
    """Appends measurements to `results/<benchmark>/<date>-<commit>.jsonl`, and reads those of earlier runs."""

    def __init__(self, benchmark: str):
        self.benchmark = benchmark
        self.provenance = provenance()
        self.path = RESULTS / benchmark / f"{self.provenance['date']}-{self.provenance['commit']}.jsonl"

    def lines(self) -> list[dict[str, Any]]:
        return lines_of(self.benchmark)

    def add(self, measurement: dict[str, Any]) -> None:
        """Writes one line. Keys of `measurement` win over this process's provenance (such as the commit at which it began)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({**self.provenance, **measurement}) + "\n")

    def measure(
        self, function: Callable[[Any], dict[str, Any]], cells: Sequence[Any], jobs: int, **more: Any
    ) -> Iterator[dict[str, Any]]:
        """Measures cells in processes of their own, `jobs` at once; adds and yields each line, with `more`, as it comes."""
        print(f"{len(cells)} cells to measure", flush=True)
        with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
            for measured in pool.imap_unordered(function, cells):
                line = {**more, **measured}
                self.add(line)
                yield line


def latest(lines: Iterable[dict[str, Any]], keys: Sequence[str]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Newest measurement of each cell, which the values of `keys` identify; cells in order of their first measurement."""
    return {tuple(line[key] for key in keys): line for line in lines}


def chosen(parser: argparse.ArgumentParser, words: Sequence[str], known: Iterable[str]) -> list[str]:
    """The words of a command line, all of which must be known; argparse's `choices` would reject an empty list."""
    for word in words:
        if word not in (known := list(known)):
            parser.error(f"unknown: {word!r}; there are {'; '.join(known)}")
    return list(words)
