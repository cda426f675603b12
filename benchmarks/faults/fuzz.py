"""Feeds changed files to every reader, by the million: each must refuse by an error of ours, in bounded time and memory.

    python -m benchmarks.faults.fuzz [--inputs 1000000] [--seed 0] [--readers plan cluster ...]

Writes results/fuzz/, one line per reader. Any other failure is printed with its input, and sets the exit code.
Memory: no thousand readings may take the process's address space 16 MiB further, touched or not; and of a sample, Python's own
allocations are compared with those for the good file. A parser's tree of a text that does nothing but nest has some 250 bytes for
each of its bytes.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

from benchmarks.result_files import ResultFile
from testing.fuzz_targets import Readers, mutated

WEIGHTS = {
    **{"plan": 35, "cluster": 20, "recipe": 2, "recipe-json": 3},
    **{"state.json": 12, "model.safetensors": 12, "optimizer.safetensors": 8, "plan.json": 5, "recipe.json": 3},
}
"""Percentage of the inputs for each reader; quick readers get most."""
SAMPLE = 200  # one of this many inputs is read with its memory traced, which is slow
BETWEEN_LIMITS = 1000
SLOW_SECONDS = 5.0
SPARE_BYTES = 16 * 2**20  # of address space
EXCESS = 400.0  # bytes of Python's that a byte of a file may take beyond what the good file takes


def fuzz(readers: Readers, name: str, inputs: int, seed: int) -> dict[str, Any]:
    """Feeds `inputs` changed files to a reader, and prints every failure."""
    dice = random.Random(f"{name} {seed}")
    good = readers.seeds[name]
    for _ in range(20):  # imports and caches are not an input's
        readers.accepts(name, good)
    accepted, failures, slowest, excess = 0, [], 0.0, 0.0
    usual = traced_peak(readers, name, good)
    began = time.monotonic()
    for number in range(inputs):
        if number % BETWEEN_LIMITS == 0:
            limit_memory()
        data = mutated(good, dice)
        start = time.monotonic()
        try:
            accepted += readers.accepts(name, data)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}"[:200])
            print(f"{name}: {failures[-1]}: {data[:2000]!r}", flush=True)
        slowest = max(slowest, time.monotonic() - start)
        if number % SAMPLE == 0:
            excess = max(excess, (traced_peak(readers, name, data) - usual) / max(1, len(data)))
    return {
        "reader": name,
        "inputs": inputs,
        "seed": seed,
        "accepted": accepted,
        "failures": len(failures),
        "kinds_of_failures": sorted({failure.partition(":")[0] for failure in failures}),
        "slowest_s": slowest,
        "file_bytes": len(good),
        "usual_bytes": usual,
        "excess_per_file_byte": excess,
        "traced": -(-inputs // SAMPLE),
        "seconds": time.monotonic() - began,
    }


def traced_peak(readers: Readers, name: str, data: bytes) -> int:
    """Peak of Python's allocations in bytes while `data` is read."""
    tracemalloc.start()
    try:
        readers.accepts(name, data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def limit_memory() -> None:
    """Makes every allocation of more than SPARE_BYTES from now on a MemoryError, which is no error of ours.

    Not once for all: allocators keep what they have split up, some 100 bytes per reading.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    arguments = parser.parse_args()
    results = ResultFile("fuzz")
    whole = sum(WEIGHTS[name] for name in arguments.readers)
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        readers = Readers(Path(folder))
        for name in arguments.readers:  # imports are not an input's
            traced_peak(readers, name, readers.seeds[name])
        for name in arguments.readers:
            line = fuzz(readers, name, -(-arguments.inputs * WEIGHTS[name] // whole), arguments.seed)
            results.add(line)
            failures += bool(
                line["failures"] or line["slowest_s"] > SLOW_SECONDS or line["excess_per_file_byte"] > EXCESS
            )
            shown = ("reader", "inputs", "accepted", "failures", "slowest_s", "excess_per_file_byte", "seconds")
            print({key: line[key] for key in shown}, flush=True)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
