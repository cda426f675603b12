"""`dist-ssn lab run` and `dist-ssn lab clean`."""

from __future__ import annotations

import argparse
import dataclasses
import os
from datetime import datetime
from pathlib import Path

from dist_ssn.cli.declare import FOLDERS, Argument, Command, Group, Option
from dist_ssn.cli.launch import CLUSTER, NODES
from dist_ssn.errors import UserError


def run(given: argparse.Namespace, rest: list[str]) -> int:
    """Runs a program on emulated hosts and returns its exit code, or removes the remains of killed labs."""
    if given.action == "clean":
        return _clean()
    if given.cluster is None:
        raise UserError("dist-ssn lab run needs --cluster, such as --cluster emulated-100mbit")
    from dist_ssn.cluster import load_cluster
    from dist_ssn.lab.hosts import this_owner
    from dist_ssn.lab.network import plan_network
    from dist_ssn.lab.run import run as run_in_lab
    from dist_ssn.lab.run import show_table

    cluster = load_cluster(given.cluster)
    logs = Path(given.logs or f"runs/lab-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}").absolute()
    result = run_in_lab(cluster, rest, logs, dict(os.environ), given.nodes)
    show_table(plan_network(cluster, this_owner(), given.nodes), result)
    return result.code


def _clean() -> int:
    from dist_ssn.lab.hosts import remove_stale, require

    require()
    removed = remove_stale()
    print(f"removed {', '.join(removed)}" if removed else "nothing was left of an earlier lab")
    return 0


LAB = Command(
    "lab",
    "on a cluster",
    "Try a cluster on this machine: emulated hosts with rate-limited links, each with its own processes and log.",
    (
        "sudo dist-ssn lab run --cluster emulated-100mbit -- train --config quickstart",
        "sudo dist-ssn lab clean",
    ),
    run,
    (
        Group(
            "cluster",
            (
                dataclasses.replace(
                    CLUSTER,
                    help="Cluster to emulate: a file with emulated: true, or its name in clusters/.",
                    default="none; run needs one",
                    example="emulated-100mbit",
                    required=False,
                ),
                dataclasses.replace(NODES, help="Number of hosts, 2 to 64."),
            ),
        ),
        Group(
            "output",
            (
                Option(
                    "--logs",
                    "Folder for the hosts' logs and counters.json.",
                    "FOLDER",
                    default="runs/lab-DATE-TIME-PID",
                    example="runs/lab",
                    completes=FOLDERS,
                ),
            ),
        ),
    ),
    (Argument("ACTION", "run: run PROGRAM on the hosts; clean: remove what a killed lab has left.", ("run", "clean")),),
    details="Needs Linux, root, iproute2, and for packet loss nftables. PROGRAM is as for dist-ssn launch.",
    takes_program=True,
)
