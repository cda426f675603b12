"""`dist-ssn report`."""

from __future__ import annotations

import argparse

from dist_ssn.cli.declare import FOLDERS, Argument, Command, Group, Option


def run(given: argparse.Namespace, rest: list[str]) -> None:
    """Compares runs."""
    from dist_ssn.report import report

    report(given.runs, given.output)


REPORT = Command(
    "report",
    "train and compare",
    "Compare finished runs in a table; with --output, also as a web page, Markdown and plots.",
    ("dist-ssn report runs/quickstart runs/dense --output report",),
    run,
    (
        Group(
            "output",
            (
                Option(
                    "--output",
                    "Folder for index.html, report.md and the plots.",
                    "FOLDER",
                    default="the table alone",
                    example="report",
                    completes=FOLDERS,
                ),
            ),
        ),
    ),
    (Argument("RUN", "Folder of a finished run, or of several.", many=True, completes=FOLDERS),),
)
