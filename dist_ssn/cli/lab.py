"""`dist-ssn lab run` and `dist-ssn lab clean`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from dist_ssn.cli.launch import split
from dist_ssn.cluster import load_cluster
from dist_ssn.errors import UserError

ACTIONS = ("run", "clean")


def lab(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Runs `dist-ssn lab`; returns the exit code of what ran on the hosts."""
    parser.add_argument("action", choices=ACTIONS, help="run a program; or remove what a killed lab has left")
    parser.add_argument("--cluster", metavar="FILE", help="a file of clusters/, or its name; with emulated: true")
    parser.add_argument("--nodes", type=int, metavar="N", help="so many hosts (as the cluster says)")
    parser.add_argument("--logs", metavar="FOLDER", help="folder of the hosts' logs (runs/lab-DATE-TIME)")
    ours, program = split(arguments)
    given = parser.parse_args(ours)
    if given.action == "clean":
        return _clean()
    if given.cluster is None:
        raise UserError("dist-ssn lab run needs --cluster, such as --cluster emulated-100mbit")
    from dist_ssn.lab.hosts import this_owner
    from dist_ssn.lab.network import plan_network
    from dist_ssn.lab.run import run, show_table

    cluster = load_cluster(given.cluster)
    logs = Path(given.logs or f"runs/lab-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}").absolute()
    result = run(cluster, program, logs, dict(os.environ), given.nodes)
    show_table(plan_network(cluster, this_owner(), given.nodes), result)
    return result.code


def _clean() -> int:
    from dist_ssn.lab.hosts import remove_stale, require

    require()
    removed = remove_stale()
    print(f"removed {', '.join(removed)}" if removed else "nothing was left of an earlier lab")
    return 0
