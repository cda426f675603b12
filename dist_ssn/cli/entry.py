"""The command line: `dist-ssn train`, `plan`, `search`, `report`, `launch`, `cluster`, `lab`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, NoReturn

from dist_ssn.errors import Preempted, RanksLost, RecipeError, UserError, unknown_choice

if TYPE_CHECKING:
    from dist_ssn.plan import Plan
    from dist_ssn.train.recipe.schema import Recipe

PATIENCE_SECONDS = 10  # how long a process leaves the word to the first on its machine

# The commands import what they need when they run: torch takes a second, and `--help` should not wait for it.

TRAIN = """Train a model by a recipe, alone or under torchrun; write its metrics, checkpoints, and ledger of bytes sent.
Example: dist-ssn train --config quickstart --share.budget=5% --steps=200"""
PLAN = """Show how a recipe's model would share its weights, without reading its data or training it.
Example: dist-ssn plan --config quickstart --share.budget=5%
With --picture=FILE.png: the mapping as a picture, here and in that file.
With --cluster=FILE: what a step would cost there, dense and shared, by each way to overlap communication and each engine, on
--workers=2,8,64 processes; below which bandwidth sharing pays, and whether it does there. Compute is measured here, and kept by
--calibrate=COMPUTE.json; --compute=COMPUTE.json takes it from there.
Example: dist-ssn plan --config quickstart --cluster=ethernet-1g"""
SEARCH = """Find which weights should share a bank, and write the plan, which share.plan of a recipe reads.
Example: dist-ssn search --config quickstart --method=weights-free --output=plan.json
--method: weights-free, pretrain, gradients, network (with --cluster=FILE), random, manual, or auto (default), which tries several
on short runs within --max-steps=N or --max-seconds=S, and goes on from --trials=FILE. --groups=N;
--split=sensitivity; --picture=FILE.png.
For pretrain and gradients: --short-steps=N, --templates=K."""
REPORT = """Compare finished runs in a table; with --output, also as a web page, Markdown and plots.
Example: dist-ssn report runs/quickstart runs/dense --output report"""
LAUNCH = """Start a program on a cluster, by torchrun, deepspeed, mpirun, Slurm or Kubernetes.
Example: dist-ssn launch --cluster local --dry-run -- train --config quickstart"""
CLUSTER = """Measure the links between the processes of a running job, and write them as a cluster file.
Example: dist-ssn launch --cluster local -- cluster probe --output mine.yaml"""
LAB = """Try a cluster on this machine: emulated hosts with rate-limited links, each with its own processes and log.
Example: sudo dist-ssn lab run --cluster emulated-100mbit -- train --config quickstart"""


def train(arguments: Sequence[str]) -> None:
    """Runs `dist-ssn train`."""
    from dist_ssn.train.recipe.read import parse_recipe

    recipe, given = parse_recipe(arguments, "dist-ssn train", TRAIN, {"--no-progress": "show no progress bar"})
    from dist_ssn.train import loop

    loop.train(recipe, progress="--no-progress" not in given)


def plan(arguments: Sequence[str]) -> None:
    """Runs `dist-ssn plan`."""
    from dist_ssn.train.recipe.read import parse_recipe

    flags = {"--json": "print the plan as JSON, which share.plan reads; with --cluster, the costs"}
    arguments, cluster = _without_option(arguments, "--cluster")
    arguments, picture = _without_option(arguments, "--picture")
    options: dict[str, str | None] = {}
    for name in ("--workers", "--compute", "--calibrate"):
        arguments, options[name] = _without_option(arguments, name)
    recipe, given = parse_recipe(arguments, "dist-ssn plan", PLAN, flags)
    if recipe.share.control is not None:
        raise RecipeError(
            f"share.control is {recipe.share.control}, which has no banks and so no plan: leave it null, or train it"
        )
    if cluster is not None:
        from dist_ssn.cli.plan_costs import show

        return show(recipe, cluster, options, "--json" in given)
    if lonely := [name for name, value in options.items() if value is not None]:
        raise RecipeError(f"command line: {lonely[0]} goes with --cluster=FILE")
    made, left_out = _plan_of(recipe)
    if picture is not None:
        from dist_ssn.report.picture import draw_plan

        draw_plan(made, picture)
    if "--json" in given:
        print(made.to_json())
    else:
        from rich.console import Console

        from dist_ssn.sharing.attach import left_out_text

        Console().print(made.table())
        if picture is not None:
            from dist_ssn.report.picture import plan_picture

            Console().print(plan_picture(made))
        if left_out:
            Console().print(f"left as they are: {left_out_text(left_out)}", markup=False, highlight=False)


def _without_option(arguments: Sequence[str], name: str) -> tuple[list[str], str | None]:
    """The arguments without one option that is no key of a recipe, and that option's value."""
    rest, value = list(arguments), None
    for place, argument in enumerate(arguments):
        if argument.partition("=")[0] == name:
            _, equals, value = argument.partition("=")
            if not equals and place + 1 == len(arguments):
                raise RecipeError(f"command line: {name} needs a value, as in {name}=local")
            value = value if equals else arguments[place + 1]
            del rest[place : place + (1 if equals else 2)]
            break
    return rest, value


def _plan_of(recipe: Recipe) -> tuple[Plan, Sequence[tuple[str, str]]]:
    """The plan, and what is not shared, with the reasons."""
    import torch

    from dist_ssn.model.specs import find_specs
    from dist_ssn.plan import make_plan
    from dist_ssn.train.build import plan_of_file
    from dist_ssn.train.data import data_hints
    from dist_ssn.train.models import build_model

    share = recipe.share
    if share.plan is not None:
        return plan_of_file(share.plan), ()
    if share.budget is None:
        raise RecipeError("share.budget is null, which leaves the model dense: give one, such as --share.budget=10%")
    hints = data_hints(recipe.data, context=recipe.model_args.get("context"))
    torch.manual_seed(recipe.seed)  # as in training: a scale that is measured depends on it
    specs = find_specs(build_model(recipe.model, recipe.model_args, hints), share.include, share.exclude)
    made = make_plan(specs, share.budget, mapping=share.mapping, morph=share.morph, seed=share.seed)
    return made, specs.left_out


def search(arguments: Sequence[str]) -> None:
    """Runs `dist-ssn search`."""
    from dist_ssn.cli.search import search as run

    run(arguments, SEARCH, _without_option)


def report(arguments: Sequence[str]) -> None:
    """Runs `dist-ssn report`."""
    parser = _parser("dist-ssn report", REPORT)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run, or of several")
    parser.add_argument("--output", metavar="FOLDER", help="folder for index.html, report.md and the plots")
    given = parser.parse_args(arguments)
    from dist_ssn.report import report as show

    show(given.runs, given.output)


def launch(arguments: Sequence[str]) -> None:
    """Runs `dist-ssn launch`."""
    from dist_ssn.cli.launch import launch as start

    start(_parser("dist-ssn launch", LAUNCH, "dist-ssn launch --cluster FILE [options] -- train ..."), arguments)


def cluster(arguments: Sequence[str]) -> None:
    """Runs `dist-ssn cluster probe`."""
    from dist_ssn.cli.cluster import cluster as run

    run(_parser("dist-ssn cluster", CLUSTER), arguments)


def lab(arguments: Sequence[str]) -> None:
    """Runs `dist-ssn lab run`, and passes on the exit code of what ran there."""
    from dist_ssn.cli.lab import lab as run

    if code := run(_parser("dist-ssn lab", LAB, "dist-ssn lab run --cluster FILE [options] -- train ..."), arguments):
        raise SystemExit(code)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "plan": plan,
    "search": search,
    "report": report,
    "launch": launch,
    "cluster": cluster,
    "lab": lab,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists what there is)")


def _parser(prog: str, description: str, usage: str | None = None, epilog: str | None = None) -> _Parser:
    layout = argparse.RawDescriptionHelpFormatter  # a line with an example stays a line
    return _Parser(prog, usage, description, epilog, formatter_class=layout, allow_abbrev=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: the arguments; None: those of this process.

    Returns:
        The exit code: 0, 2 for a mistake of the user, 1 for trouble with the machines, 75 for a run that a signal asked to make
        room and that wants to be started again, 130 for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(arguments)
        sys.stdout.flush()
    except UserError as error:
        _tell(str(error))
        return 2
    except Preempted as error:
        from dist_ssn.train.ranks.stop import EXIT_REQUEUE

        _tell(str(error))
        return EXIT_REQUEUE
    except RanksLost as error:
        _tell(str(error))
        return 1
    except KeyboardInterrupt:
        if not _is_follower():  # the launcher ends all processes anyhow
            _tell("stopped by Ctrl-C")
        return 130
    except BrokenPipeError:  # `dist-ssn plan | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a folder that may not be written, ...
        if error.errno is None:
            raise
        _tell(": ".join(str(part) for part in (error.filename, error.strerror) if part))
        return 1
    return 0


def _run(arguments: list[str]) -> None:
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    texts = zip(COMMANDS, (TRAIN, PLAN, SEARCH, REPORT, LAUNCH, CLUSTER, LAB), strict=True)
    commands = "\n".join(f"  {name:8}{text.splitlines()[0]}" for name, text in texts)
    parser = _parser(
        "dist-ssn",
        "Train any PyTorch model from a small shared bank of parameters.",
        epilog=f"commands:\n{commands}\n\ndist-ssn COMMAND --help says more.",
        usage="dist-ssn [-h] [--version] COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"dist-ssn {_version()}")
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    given = parser.parse_known_args(arguments)[0]
    raise UserError(unknown_choice("command", given.command, COMMANDS))


def _version() -> str:
    try:
        return metadata.version("dist_ssn")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _tell(sentence: str) -> None:
    """Writes a sentence to stderr, once per machine: every process of a job that fails has the same to say.

    A launcher ends all processes with the first that fails, which must therefore be the one that speaks. The others wait for that
    end, and speak for themselves if it does not come.
    """
    if _is_follower():
        time.sleep(PATIENCE_SECONDS)
    print(f"dist-ssn: {' '.join(sentence.split())}", file=sys.stderr)


def _is_follower() -> bool:
    """Whether another process of a job is the first on this machine."""
    local_ranks = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")
    return any(os.environ.get(name, "0") != "0" for name in local_ranks)


if __name__ == "__main__":
    sys.exit(main())
