"""Runs many benchmarks, one after the other: `make bench`.

    sudo python -m benchmarks.bench [short|full]     # a step that is done at this commit is not done again
    python -m benchmarks.documents                   # then: the tables and figures of README and docs

"short" has the quick benchmarks, "full" also the long ones. Some steps skip cells that results/ has. With
DIST_SSN_RESULTS=FOLDER in the environment everything is measured anew, into that folder. Emulated hosts need root; without it their
benchmarks are skipped, and the table says so. Each step's time is a line in results/bench/.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

from benchmarks.result_files import ResultFile

SHORT = (
    "compute.memory",
    "compute.codecs",
    "compute.generation size depth --repetitions 5",
    "compute.step_time --models gpt-256 gpt-512 wrn-16-4",
    "network.engine_bytes --ranks 2",
    "compute.checkpoints --what size",
    "network.prediction --models gpt-128 --mbit 50 --repetitions 1",
    "network.latency --repetitions 1",
    "network.probe",
    "network.scaling measured modelled --hosts 4 --repetitions 1",
)
FULL = (
    *SHORT,
    "compute.generation kinds",
    "network.parity",
    "compute.checkpoints --what time ranks",
    "network.prediction",
    "network.latency",
    "network.scaling measured",
    "network.lab_bytes",
    "faults.elastic",
    "faults.run",
    "faults.fuzz",
    "quality.delay",
    "quality.run rates controls low confirm curve curve-confirm budgets morphs",
    "quality.run longer larger larger-confirm distill prune decay wider target target-confirm",
    "quality.architectures rates seeds",
    "quality.paper_architectures rates",
    "quality.searches --tasks gpt-small lstm digits captions",
    "quality.searches --tasks gpt vit --mappings default shape pretrain",
    "ladder agreement frontier-gpt frontier-lstm",
    "growing.run constants ways growing seeds",
    "network.time_to_target curves steps --seeds 1 --repetitions 1 --mbit 100 1000",
)
PROFILES = {"short": SHORT, "full": FULL}
AS_ROOT = (
    "network.prediction",
    "network.latency",
    "network.probe",
    "network.scaling",
    "network.lab_bytes",
    "faults.elastic",
    "faults.run",
    "network.time_to_target",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", nargs="?", choices=PROFILES, default="short")
    arguments = parser.parse_args()
    results, console = ResultFile("bench"), Console()
    done = {line["step"] for line in results.lines() if line["commit"] == results.provenance["commit"]}
    table = Table("benchmark", "", "seconds", title=f"{arguments.profile} profile")
    failed = False
    for step in PROFILES[arguments.profile]:
        name = step.split()[0]
        if step in done:
            table.add_row(step, "done before", "")
        elif name in AS_ROOT and os.geteuid() != 0:
            table.add_row(step, "left out: needs root", "")
        else:
            console.rule(f"python -m benchmarks.{step}")
            began = time.monotonic()
            code = subprocess.run([sys.executable, "-m", *f"benchmarks.{step}".split()], check=False).returncode
            seconds = time.monotonic() - began
            failed |= code != 0
            table.add_row(step, "done" if code == 0 else f"FAILED: exit code {code}", f"{seconds:.0f}")
            if code == 0:
                results.add({"step": step, "seconds": seconds})
    console.print(table)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
