"""Results of `dist-ssn cluster probe` in the lab, where the links are known.

    sudo python -m benchmarks.network.probe
    python -m benchmarks.network.probe --table

Two emulated hosts. Writes results/probe/.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.network.in_the_lab import cluster_file, in_the_lab
from benchmarks.result_files import ResultFile, latest

Line = dict[str, Any]
LINKS: dict[str, tuple[float, float]] = {
    "as in emulated-100mbit": (0, 0),
    "the same with `loss_percent: 2`": (0, 2),
    "the same with `delay_ms: 50`": (50, 0),
}
"""name → delay_ms, loss_percent"""


def measure(name: str) -> Line:
    """Runs one probe and returns it beside the link's settings."""
    with tempfile.TemporaryDirectory() as text:
        folder, (delay_ms, loss_percent) = Path(text), LINKS[name]
        cluster = Path(cluster_file(folder, hosts=2, delay_ms=delay_ms, loss_percent=loss_percent))
        in_the_lab(str(cluster), folder / "logs", ["cluster", "probe", f"--output={folder}/found.yaml"])
        settings, found = (yaml.safe_load(path.read_text())["between"] for path in (cluster, folder / "found.yaml"))
    return {"link": name, "told": settings, "found": found}


def table(lines: Iterable[Line]) -> Table:
    """A table of the newest probe of each link, beside its settings."""
    shown = Table("link", "latency set, µs", "measured", "bandwidth set, Mbit/s", "measured")
    for (name,), line in latest(lines, ("link",)).items():
        pairs = [(line["told"][key], line["found"][key]) for key in ("latency_us", "bandwidth_mbit")]
        shown.add_row(name, *(f"{value:,g}" for pair in pairs for value in pair))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    arguments = parser.parse_args()
    results = ResultFile("probe")
    for name in () if arguments.table else LINKS:
        results.add(measure(name))
    Console(width=120).print(table(results.lines()))


if __name__ == "__main__":
    main()
