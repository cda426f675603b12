"""Code blocks of README and docs: how they are found, and what a shell command must fulfil.

HTML comments, which readers do not see, say what a block needs:

    <!-- python               Python that runs in this place, e.g. to make the `model` that the next block speaks of.
    model = ...
    -->
    <!-- file: my.yaml -->    The next block is saved under this name, where the later commands of the page find it.
    <!-- run: --steps=2 -->   The commands of the next block are run, with these arguments added to each. Other commands are
                              only checked: that they, and the subcommand, option names and files they name, exist.
    <!-- script -->           The next block is a script before and after a change; tests/test_engines runs both.

A page with a `python` comment is run as one program; Python of other pages is compiled. YAML must be a recipe, a cluster file, or
parts of one. `text` blocks show output and are not checked. Any other language, and any command that nothing here knows, fails.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
VISIBLE = ("dist_ssn", "benchmarks", "launch", "clusters", "scripts", "examples", "tests", "Makefile", "pyproject.toml")
SHELLS = ("bash", "sh", "shell", "console")
UNCHECKED = ("git", "cd", "export", "source", "rm")
LAUNCHERS = ("torchrun", "mpirun", "srun", "sbatch", "deepspeed")
"""Programs with options of their own, which are not ours to check: what they start is."""
NAMES_OF_FILES = ("share.plan", "distill.teacher", "data.path", "engine.config")
"""Keys of a recipe whose files need not be there when a command is only checked."""

FENCE = re.compile(r"^(?P<fence>```+|~~~+)(?P<language>[\w+-]*)[^\n]*\n(?P<body>.*?)^(?P=fence)\s*$", re.M | re.S)
COMMENT = re.compile(r"^<!--\s*(?P<kind>python|file:|run:|script)(?P<body>.*?)-->\s*$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A code block or marker of a page: its language (or "python" of a comment), text and first line's number."""

    language: str
    body: str
    line: int
    file: str | None = None
    run: str | None = None
    script: str | None = None
    hidden: bool = False


def pages() -> list[Path]:
    """README, CONTRIBUTING and every page under docs/."""
    tops = [path for name in ("README.md", "CONTRIBUTING.md") if (path := ROOT / name).exists()]
    return [*tops, *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    """A page's path in the repository, which names it in messages."""
    return str(page.relative_to(ROOT))


def parse(text: str) -> list[Block]:
    """The blocks of a Markdown text in order, hidden Python included, each with the markers that stand before it."""
    found = sorted([*FENCE.finditer(text), *COMMENT.finditer(text)], key=lambda match: match.start())
    blocks: list[Block] = []
    markers: dict[str, str] = {}
    end = 0
    for match in found:
        if match.start() < end:
            continue  # a comment inside a fence is the block's own text
        end = match.end()
        body, line = match["body"], text.count("\n", 0, match.start("body")) + 1
        if match.re is FENCE:
            blocks.append(Block(match["language"], body, line, **markers))
            markers = {}
        elif match["kind"] == "python":
            blocks.append(Block("python", body, line, hidden=True))
        else:
            markers[match["kind"].rstrip(":")] = body.strip()
    return blocks


def commands(block: Block) -> list[tuple[int, list[str]]]:
    """The (line number, words) of each command of a shell block; continued lines are one, comments and output none."""
    prompts = block.language == "console"
    result, pending, start = [], "", block.line
    for number, raw in enumerate(block.body.splitlines(), block.line):
        if not pending:
            if prompts and not raw.startswith("$ "):
                continue
            start, raw = number, raw.removeprefix("$ ")
        pending += raw
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        words = shlex.split(pending, comments=True)
        if words:
            result.append((start, words))
        pending = ""
    return result


def save_files(blocks: Iterable[Block], folder: Path) -> None:
    """Writes the blocks that have a file's name into `folder`, after those of README, whose recipe other pages speak of."""
    for block in (*parse(README.read_text()), *blocks):
        if block.file is not None:
            (folder / block.file).write_text(block.body)


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command as a reader in an active environment would, in a temporary folder that looks like a clone."""
    scripts = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    # make -n must not speak to the make that runs these tests
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment |= {"PATH": os.pathsep.join([*scripts, os.environ["PATH"]]), "TORCHRUN": "torchrun"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


@functools.cache
def helped(program: str) -> str:
    """What `program --help` says; "" where there is no such program or subcommand."""
    done = run([*program.split(), "--help"], ROOT)
    return done.stdout if done.returncode == 0 else ""


@functools.cache
def extras() -> set[str]:
    """The extras that pyproject.toml declares."""
    table = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^(\w+) = ", table, re.M))


def check(words: list[str], folder: Path, arguments: str | None) -> str | None:
    """What is wrong with a command, or None.

    Args:
        words: the command; settings like `NODES=2` may stand before it.
        folder: where to run it.
        arguments: None to check only that it is understood; otherwise it is run, with these added.
    """
    whole, words = words, list(dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=.*", word) or word == "sudo", words))
    program = words[0] if words else ""
    paths = [word for word in words if word.startswith(VISIBLE) and "/" in word and "…" not in word]
    if missing := [path for path in paths if not (folder / path.partition("::")[0]).exists()]:
        return f"there is no {missing[0]}"
    if not words or program in UNCHECKED:
        return None
    if "pip" in words[:4] and "install" in words:
        named = {extra.strip() for group in re.findall(r"\[([\w, ]+)\]", " ".join(words)) for extra in group.split(",")}
        return f"unknown extras {named - extras()}" if named - extras() else None
    if program == "make":
        targets = [word for word in words[1:] if "=" not in word]
        result = run(["make", "-n", *targets], folder) if targets else None
        return "names no target" if result is None else result.stderr if result.returncode else None
    if arguments is not None:
        result = run(["env", *whole, *shlex.split(arguments)], folder)
        return f"exit code {result.returncode}\n{result.stdout}{result.stderr}" if result.returncode else None
    ours = next((index for index, word in enumerate(words) if word in ("dist-ssn", "dist_ssn.cli")), None)
    if ours is not None:
        return _check_ours(words[ours + 1 :], folder)
    if program == "python" and words[1:2] == ["-m"]:
        return _check_module(words[2], words[3:])
    if program in LAUNCHERS or program.startswith("launch/"):
        return None
    return "is neither run (put <!-- run: ... --> before the block) nor known by its options"


def _check_ours(words: list[str], folder: Path) -> str | None:
    """A command of ours, from its subcommand on: its options by its help, its settings by the parser of recipes."""
    words, program = _split(words)
    command = "dist-ssn " + "".join(words[:1])
    text = helped(command)
    if not text.startswith(f"usage: {command}") and words:
        return f"there is no `{command}`"
    options = [word for word in words if word.startswith("--")]
    if unknown := {word.split("=")[0] for word in options} - set(re.findall(r"--[\w.-]+", text)):
        return f"unknown options {unknown}"
    if problem := _settings_problem(options):
        return problem
    return _check_ours(program, folder) if program[:1] and not program[0].endswith(".py") else None


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """A command, and that for which it is a launcher: what follows the two dashes."""
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut], words[cut + 1 :]


def _settings_problem(options: Iterable[str]) -> str | None:
    """What the parser of recipes says of `--key=value`, for the keys of a recipe among them."""
    from dist_ssn.errors import UserError
    from dist_ssn.train.recipe.read import load_recipe

    settings = [option for option in options if re.match(r"--[a-z_]+\.\w+=[^…]*$", option)]
    try:
        load_recipe(None, [setting for setting in settings if setting.split("=")[0][2:] not in NAMES_OF_FILES])
    except UserError as error:
        return str(error)
    return None


def _check_module(module: str, words: list[str]) -> str | None:
    """`python -m module`, by its help."""
    if module in ("pytest", "venv", "mkdocs", "build", "pip"):
        return None
    text = helped(f"{sys.executable} -m {module}")
    if not text:
        return f"`python -m {module} --help` fails"
    unknown = {word.split("=")[0] for word in words if word.startswith("--")} - set(re.findall(r"--[\w.-]+", text))
    return f"unknown options {unknown} of {module}" if unknown else None


def yaml_problem(text: str, folder: Path) -> str | None:
    """Why a YAML block is neither a recipe, nor a cluster file, nor some keys of one."""
    import yaml

    from dist_ssn.cluster.file import cluster_from_yaml
    from dist_ssn.errors import UserError
    from dist_ssn.train.recipe.read import load_recipe

    keys = set(yaml.safe_load(text))
    try:
        if keys & {"nodes", "within", "between", "launcher"}:
            needed = {"nodes": 2, "processes_per_node": 1, "between": {"latency_us": 50, "bandwidth_mbit": 1000}}
            rest = "".join(f"{key}: {json.dumps(value)}\n" for key, value in needed.items() if key not in keys)
            cluster_from_yaml(text.rstrip() + "\n" + rest)
        else:
            file = folder / "block.yaml"
            file.write_text(text)
            load_recipe(file)
    except UserError as error:
        return str(error)
    return None
