"""`dist-ssn cluster probe`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_ssn.cli.declare import FILES, Argument, Command, Group, Option
from dist_ssn.errors import ClusterError


def run(given: argparse.Namespace, rest: list[str]) -> None:
    """Measures the links on one of the job's processes; rank 0 writes the file."""
    output = Path(given.output)
    if not output.parent.is_dir():
        raise ClusterError(f"--output: the folder {output.parent} does not exist")
    if output.suffix != ".yaml":
        raise ClusterError(f"--output must name a file that ends in .yaml, got {given.output!r}")

    from dist_ssn.cluster.probe import probe
    from dist_ssn.engines import init_world
    from dist_ssn.files import write_whole

    with init_world() as world:
        if world.world_size < 2:
            raise ClusterError(
                "there is nothing to measure between fewer than two processes: start this by a launcher, as in "
                "dist-ssn launch --cluster local -- cluster probe --output mine.yaml"
            )
        measured = probe(world)
        if world.rank == 0:
            write_whole(output, measured.to_yaml())
            print(f"{measured.to_yaml()}written to {output}")


CLUSTER = Command(
    "cluster",
    "on a cluster",
    "Measure latency and bandwidth between the processes of a running job, and write them as a cluster file.",
    ("dist-ssn launch --cluster local -- cluster probe --output mine.yaml",),
    run,
    (
        Group(
            "output",
            (
                Option(
                    "--output",
                    "Cluster file to write: latencies in microseconds, bandwidths in Mbit/s.",
                    "FILE.yaml",
                    example="mine.yaml",
                    completes=FILES,
                    required=True,
                ),
            ),
        ),
    ),
    (Argument("ACTION", "probe: measure.", choices=("probe",)),),
)
