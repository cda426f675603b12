"""`dist-ssn launch`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

from dist_ssn.cli.declare import CLUSTERS, FILES, Command, Group, Option, whole_number
from dist_ssn.errors import UserError

# The cluster and its nodes, for `dist-ssn lab` too.
CLUSTER = Option(
    "--cluster",
    "Cluster to start on: a file, or a name of clusters/.",
    "FILE",
    example="ethernet-1g",
    completes=CLUSTERS,
    required=True,
)
NODES = Option("--nodes", "Number of nodes.", "N", default="as the cluster says", example="2", read=whole_number)


def run(given: argparse.Namespace, rest: list[str]) -> None:
    """Becomes the launcher's command; returns only with --dry-run."""
    from dist_ssn.cluster import load_cluster
    from dist_ssn.launch.command import Start, build_command
    from dist_ssn.launch.run import execute, found, text_of

    start = Start(
        load_cluster(given.cluster),
        tuple(rest),
        given.nodes,
        _number(given.node_rank, "NODE_RANK", os.environ),
        given.address or os.environ.get("MASTER_ADDR"),
        _number(given.port, "MASTER_PORT", os.environ),
        given.hostfile,
        dict(os.environ),
    )
    command = build_command(start)
    if given.dry_run:
        print(text_of(found(command, os.environ.get("PATH", os.defpath))).rstrip("\n"))
    else:
        execute(command, dict(os.environ))


def _number(given: int | None, name: str, environ: Mapping[str, str]) -> int | None:
    text = environ.get(name, "")
    if given is not None or not text:
        return given
    if not text.isdecimal():
        raise UserError(f"environment variable {name} must be a whole number, got {text!r}")
    return int(text)


LAUNCH = Command(
    "launch",
    "on a cluster",
    "Start a program on a cluster, by torchrun, DeepSpeed's launcher, mpirun, Slurm or Kubernetes.",
    (
        "dist-ssn launch --cluster local --dry-run -- train --config quickstart",
        "dist-ssn launch --cluster ethernet-1g --node-rank 0 --address 10.0.0.1 -- my_script.py --my-option",
    ),
    run,
    (
        Group(
            "cluster",
            (
                CLUSTER,
                NODES,
                Option(
                    "--node-rank",
                    "Number of this node, from 0 (torchrun; deepspeed without ssh).",
                    "R",
                    default="the variable NODE_RANK",
                    example="0",
                    read=whole_number,
                ),
                Option(
                    "--address",
                    "Name or address of node 0, as the other nodes reach it.",
                    "HOST",
                    default="the variable MASTER_ADDR, else as the cluster says",
                    example="10.0.0.1",
                ),
                Option(
                    "--port",
                    "Free TCP port of node 0.",
                    "N",
                    default="the variable MASTER_PORT, else as the cluster says",
                    example="29500",
                    read=whole_number,
                ),
                Option(
                    "--hostfile",
                    "File with the nodes' names, in the launcher's own format (deepspeed, mpirun).",
                    "FILE",
                    default="none",
                    example="hosts",
                    completes=FILES,
                ),
            ),
        ),
        Group("output", (Option("--dry-run", "Print the command, job script or manifest, and start nothing."),)),
    ),
    details="PROGRAM is train, plan or cluster of dist-ssn, or a script of your own that ends in .py, with its arguments.",
    takes_program=True,
)
