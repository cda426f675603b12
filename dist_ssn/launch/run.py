"""A command as text, and as the program that this process becomes."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from dist_ssn.errors import ClusterError
from dist_ssn.launch.command import Command

INSTALL = {
    "deepspeed": "pip install 'dist_ssn[deepspeed]'",
    "mpirun": "pip install 'dist_ssn[mpi]'",
    "sbatch": "run this where Slurm's commands are",
    "kubectl": "run this where kubectl is",
}


def found(command: Command, path: str) -> Command:
    """The command with full paths of its programs, looked for beside this Python, then in `path`; unchanged where there is none."""
    search = os.pathsep.join([str(Path(sys.executable).parent), path])
    program = shutil.which(command.argv[0], path=search) or command.argv[0]
    rest = [sys.executable if word == "python" else word for word in command.argv[1:]]
    return Command((program, *rest), command.environment, command.stdin)


def text_of(command: Command) -> str:
    """The command as a shell takes it; of one that reads a script or manifest, that text under the command as a comment."""
    setting = [f"{name}={value}" for name, value in command.environment.items()]
    line = shlex.join([*(["env", *setting] if setting else []), *command.argv])
    if command.stdin is None:
        return line
    first, _, rest = command.stdin.partition("\n")
    comment = f"# Goes to the standard input of: {line}\n"
    return f"{first}\n{comment}{rest}" if first.startswith("#!") else comment + command.stdin


def execute(command: Command, environ: Mapping[str, str]) -> NoReturn:
    """Becomes the command: this process's output, Ctrl-C and exit code are the command's from here on.

    Raises:
        ClusterError: the launcher is not installed.
    """
    path = environ.get("PATH", os.defpath)
    command = found(command, path)
    if os.sep not in command.argv[0]:
        hint = INSTALL.get(command.argv[0])
        raise ClusterError(f"{command.argv[0]} is not installed{f': {hint}' if hint else ''}")
    sys.stdout.flush()
    sys.stderr.flush()
    if command.stdin is not None:
        with tempfile.TemporaryFile() as file:  # it has no name, so nothing of it remains
            file.write(command.stdin.encode())
            file.seek(0)
            os.dup2(file.fileno(), 0)
    # A launcher, or the job that it hands in, looks for python and torchrun by itself, in an environment that isn't active too.
    path = os.pathsep.join([str(Path(sys.executable).parent), path])
    os.execve(command.argv[0], command.argv, {**environ, **command.environment, "PATH": path})
