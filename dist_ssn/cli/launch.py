"""`dist-ssn launch`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence

from dist_ssn.cluster import load_cluster
from dist_ssn.errors import UserError
from dist_ssn.launch.command import Start, build_command
from dist_ssn.launch.run import execute, found, text_of


def launch(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Runs `dist-ssn launch`; does not return, unless with --dry-run."""
    parser.add_argument("--cluster", metavar="FILE", required=True, help="a file of clusters/, or its name")
    parser.add_argument("--nodes", type=int, metavar="N", help="on so many nodes (as the cluster says)")
    parser.add_argument("--node-rank", type=int, metavar="R", help="this node's number, from 0 (NODE_RANK)")
    parser.add_argument("--address", help="node 0, as the others reach it (MASTER_ADDR, else as the cluster says)")
    parser.add_argument("--port", type=int, help="a free port of node 0 (MASTER_PORT, else as the cluster says)")
    parser.add_argument("--hostfile", metavar="FILE", help="names of the nodes, for deepspeed and mpirun")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    ours, program = split(arguments)
    given = parser.parse_args(ours)
    start = Start(
        load_cluster(given.cluster),
        tuple(program),
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


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before and after the first `--`."""
    words = list(arguments)
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut], words[cut + 1 :]


def _number(given: int | None, name: str, environ: Mapping[str, str]) -> int | None:
    text = environ.get(name, "")
    if given is not None or not text:
        return given
    if not text.isdecimal():
        raise UserError(f"environment variable {name} must be a whole number, got {text!r}")
    return int(text)
