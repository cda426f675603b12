"""Every command of `dist-ssn`, in the order of its help."""

from __future__ import annotations

from dist_ssn.cli.cluster import CLUSTER
from dist_ssn.cli.completion import completion
from dist_ssn.cli.declare import Command
from dist_ssn.cli.doctor import DOCTOR
from dist_ssn.cli.lab import LAB
from dist_ssn.cli.launch import LAUNCH
from dist_ssn.cli.plan import PLAN
from dist_ssn.cli.report import REPORT
from dist_ssn.cli.search import SEARCH
from dist_ssn.cli.train import TRAIN

COMMANDS: dict[str, Command] = {
    command.name: command for command in (PLAN, SEARCH, TRAIN, REPORT, LAUNCH, CLUSTER, LAB, DOCTOR)
}
COMMANDS["completion"] = completion(COMMANDS)
