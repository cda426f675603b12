"""The command line `dist-ssn`: finds the command, runs it, and turns errors into a sentence and an exit code."""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence

from dist_ssn.cli.commands import COMMANDS
from dist_ssn.cli.parse import Layout, Parser, parse
from dist_ssn.cli.version import version_of
from dist_ssn.errors import Preempted, RanksLost, UserError, unknown_choice

PATIENCE_SECONDS = 10  # how long a process leaves the word to the first on its machine

EXIT_CODES = {
    0: "Success.",
    1: "Trouble with the machines: a lost process, a full disk, a file that cannot be read; or a bug, with its traceback.",
    2: "A mistake in the command, recipe, cluster file, plan or data; one sentence on stderr names it.",
    75: "A signal asked the run to make room. It is saved: start it again with --checkpoint.resume=true.",
    130: "Stopped by Ctrl-C.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: the arguments; None: those of this process

    Returns:
        The exit code, one of `EXIT_CODES` or that of the program that `dist-ssn lab run` ran.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _tolerate_narrow_consoles()
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        _say(str(error))
        return 2
    except Preempted as error:
        from dist_ssn.train.ranks.stop import EXIT_REQUEUE

        _say(str(error))
        return EXIT_REQUEUE
    except RanksLost as error:
        _say(str(error))
        return 1
    except KeyboardInterrupt:
        if not _is_follower():  # the launcher ends all processes anyhow
            _say("stopped by Ctrl-C")
        return 130
    except BrokenPipeError:  # `dist-ssn plan | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a folder that may not be written, ...
        if error.errno is None:
            raise
        _say(": ".join(str(part) for part in (error.filename, error.strerror) if part))
        return 1


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        return _without_command(arguments)
    command = COMMANDS[arguments[0]]
    given, rest = parse(command, arguments[1:])
    return command.run(given, rest) or 0


def _without_command(arguments: list[str]) -> int:
    parser = Parser(
        "dist-ssn",
        "dist-ssn [-h] [--version] COMMAND ...",
        "Train any PyTorch model from a small shared bank of parameters.",
        f"{_commands_by_purpose()}\n\n{_exit_codes()}\n\ndist-ssn COMMAND --help lists every option of a command.",
        formatter_class=Layout,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help="Show this help.")
    parser.add_argument(
        "--version",
        action="version",
        version=f"dist-ssn {version_of('dist_ssn') or '(not installed)'}",
        help="Show the version.",
    )
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    given = parser.parse_known_args(arguments)[0]
    raise UserError(unknown_choice("command", given.command, COMMANDS))


def _commands_by_purpose() -> str:
    purposes: dict[str, list[str]] = {}
    for command in COMMANDS.values():
        text = _wrapped(command.summary, 14)
        purposes.setdefault(command.purpose, []).append(f"  {command.name:12}{text}")
    return "\n\n".join("\n".join([f"{purpose}:", *lines]) for purpose, lines in purposes.items())


def _exit_codes() -> str:
    lines = [f"  {code:<12}{_wrapped(text, 14)}" for code, text in EXIT_CODES.items()]
    also = _wrapped("launch and lab run end with the exit code of the program that they start.", 2)
    return "\n".join(["exit codes:", *lines, f"  {also}"])


def _wrapped(text: str, indent: int) -> str:
    width = max(40, shutil.get_terminal_size().columns - 2 - indent)
    return f"\n{' ' * indent}".join(textwrap.wrap(text, width, break_on_hyphens=False))


def _tolerate_narrow_consoles() -> None:
    """Replaces characters that a console cannot show by a question mark: × in ASCII, and in UTF-8 a file's name that is not."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _say(sentence: str) -> None:
    """Writes a sentence to stderr, once per machine: every process of a job that fails has the same to say.

    A launcher ends all processes with the first that fails, which must therefore be the one that speaks. The others wait for that
    end, and speak for themselves if it does not come.
    """
    if _is_follower():
        time.sleep(PATIENCE_SECONDS)
    print(f"dist-ssn: {' '.join(sentence.split())}", file=sys.stderr)


def _is_follower() -> bool:
    """Another process of the same job speaks for this machine."""
    local_ranks = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")
    return any(os.environ.get(name, "0") != "0" for name in local_ranks)


if __name__ == "__main__":
    sys.exit(main())
