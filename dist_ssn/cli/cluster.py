"""`dist-ssn cluster probe`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dist_ssn.errors import ClusterError


def cluster(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Runs `dist-ssn cluster probe` on one of the job's processes; rank 0 writes the file."""
    parser.add_argument("action", choices=["probe"], help="measure latency and bandwidth between this job's processes")
    parser.add_argument("--output", metavar="FILE", required=True, help="the cluster file to write, such as mine.yaml")
    given = parser.parse_args(arguments)
    output = Path(given.output)
    if not output.parent.is_dir():
        raise ClusterError(f"--output: the folder {output.parent} does not exist")
    if output.suffix != ".yaml":
        raise ClusterError(f"--output must name a file that ends in .yaml, got {given.output!r}")

    from dist_ssn.cluster.probe import probe
    from dist_ssn.engines import init_world
    from dist_ssn.tracking import write_whole

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
