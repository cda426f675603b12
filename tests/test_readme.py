"""Everything in README.md's code blocks is true: Python runs, make targets exist, commands run or are understood.

The README says with HTML comments, which readers don't see, what a block needs:

    <!-- python               Python that runs in this place, e.g. to make the `model` that the next block speaks of.
    model = ...
    -->
    <!-- file: my.yaml -->    The next block is saved under this name, where the later commands find it.
    <!-- run: --steps=2 -->   The commands of the next block are run, with these arguments added to each; other commands
                              are only checked: that they, and the subcommand, option names and files they name, exist.

`text` blocks show output and are not checked. Any other language, and any command that nothing here knows, fails.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
VISIBLE = ("dist_ssn", "benchmarks", "launch", "clusters", "scripts", "Makefile", "pyproject.toml")
SHELLS = ("bash", "sh", "shell", "console")
UNCHECKED = ("git", "cd")

FENCE = re.compile(r"^(?P<fence>```+|~~~+)(?P<language>[\w+-]*)[^\n]*\n(?P<body>.*?)^(?P=fence)\s*$", re.M | re.S)
COMMENT = re.compile(r"^<!--\s*(?P<kind>python|file:|run:)(?P<body>.*?)-->\s*$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A code block or marker of the README: its language (or "python" of a comment), text and first line's number."""

    language: str
    body: str
    line: int
    file: str | None = None
    run: str | None = None


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
            blocks.append(Block(match["language"], body, line, markers.pop("file", None), markers.pop("run", None)))
        elif match["kind"] == "python":
            blocks.append(Block("python", body, line))
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


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command as a reader in an active environment would, in a temporary folder that looks like a clone."""
    scripts = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    # make -n must not speak to the make that runs these tests
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment |= {"PATH": os.pathsep.join([*scripts, os.environ["PATH"]]), "TORCHRUN": "torchrun"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


def extras() -> set[str]:
    """The extras that pyproject.toml declares."""
    table = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^(\w+) = ", table, re.M))


def check(words: list[str], folder: Path, arguments: str | None) -> str | None:
    """What is wrong with a README command, or None.

    Args:
        words: the command; settings like `NODES=2` may stand before it.
        folder: where to run it.
        arguments: None to check only that it is understood; otherwise it is run, with these added.
    """
    whole, words = words, list(dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=.*", word), words))
    program = words[0] if words else ""
    missing = [word for word in words if word.startswith(VISIBLE) and "/" in word and not (folder / word).exists()]
    if missing:
        return f"there is no {missing[0]}"
    if program in UNCHECKED:
        return None
    if "pip" in words[:4] and "install" in words:
        named = {extra.strip() for group in re.findall(r"\[([\w, ]+)\]", " ".join(words)) for extra in group.split(",")}
        return f"unknown extras {named - extras()}" if named - extras() else None
    if program == "make":
        targets = [word for word in words[1:] if "=" not in word]
        result = run(["make", "-n", *targets], folder) if targets else None
        return "names no target" if result is None else result.stderr if result.returncode else None
    if program not in ("dist-ssn", "torchrun", "python", "launch/torchrun.sh"):
        return "is a command that this test knows nothing of"
    if arguments is not None:
        result = run(["env", *whole, *shlex.split(arguments)], folder)
        return f"exit code {result.returncode}\n{result.stdout}{result.stderr}" if result.returncode else None
    ours = next((index for index, word in enumerate(words) if word in ("dist-ssn", "dist_ssn.cli")), None)
    if ours is not None:
        words = words[: words.index("--")] if "--" in words else words  # what follows is for another command
        command = "dist-ssn " + "".join(words[ours + 1 : ours + 2])
        result = run([*command.split(), "--help"], folder)
        if not result.stdout.startswith(f"usage: {command} "):
            return f"there is no `{command}`"
        named = {word.split("=")[0] for word in words[ours + 1 :] if word.startswith("--")}
        unknown = named - set(re.findall(r"--[\w.-]+", result.stdout))
        return f"unknown options {unknown}" if unknown else None
    return "is neither run (put <!-- run: ... --> before the block) nor known by its options"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder in which the README's relative paths lead into the repository, but whatever is written stays here."""
    for name in VISIBLE:
        if (ROOT / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture(scope="module")
def blocks() -> list[Block]:
    found = parse(README.read_text())
    assert any(block.language in SHELLS for block in found), "README.md has no shell block"
    assert any(block.language == "python" for block in found), "README.md has no Python block"
    return found


def save_files(blocks: list[Block], folder: Path) -> None:
    for block in blocks:
        if block.file is not None:
            (folder / block.file).write_text(block.body)


def test_every_block_is_of_a_kind_that_is_checked(blocks: list[Block]) -> None:
    unknown = [
        f"README.md:{block.line}: {block.language or 'no language'}"
        for block in blocks
        if block.file is None and block.language not in (*SHELLS, "python", "text")
    ]
    assert not unknown, unknown


@pytest.mark.timeout(600)
def test_python_blocks_run_in_order(blocks: list[Block], clone: Path) -> None:
    """All in one program, each on its line of the README, so that a traceback shows the README's line numbers."""
    save_files(blocks, clone)
    program: list[str] = []
    for block in blocks:
        if block.language == "python" and block.file is None:
            program += [""] * (block.line - 1 - len(program)) + block.body.splitlines()
    (clone / "README.py").write_text("\n".join(program) + "\n")
    result = run([sys.executable, "README.py"], clone)
    assert result.returncode == 0, result.stderr


@pytest.mark.timeout(900)
def test_shell_blocks(blocks: list[Block], clone: Path) -> None:
    save_files(blocks, clone)
    wrong = []
    for block in blocks:
        if block.language in SHELLS and block.file is None:
            for line, words in commands(block):
                problem = check(words, clone, block.run)
                if problem:
                    wrong.append(f"README.md:{line}: {shlex.join(words)}: {problem}")
    assert not wrong, "\n".join(wrong)


EXAMPLE = """# Title
<!-- python
model = 1
-->
```python
print(model)
```
<!-- file: my.yaml -->
```yaml
steps: 2
```
<!-- run: --steps=2 -->
```console
$ dist-ssn train \\
  --config my.yaml  # why
output
```
~~~
```
~~~
"""


def test_parse() -> None:
    assert parse(EXAMPLE) == [
        Block("python", "\nmodel = 1\n", 2),
        Block("python", "print(model)\n", 6),
        Block("yaml", "steps: 2\n", 10, file="my.yaml"),
        Block("console", "$ dist-ssn train \\\n  --config my.yaml  # why\noutput\n", 14, run="--steps=2"),
        Block("", "```\n", 19),
    ]
    assert commands(parse(EXAMPLE)[3]) == [(14, ["dist-ssn", "train", "--config", "my.yaml"])]


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("make nonsense", "nonsense"),
        ("make", "no target"),
        ("pip install dist_ssn[nonsense]", "unknown extras"),
        ("launch/nonsense.sh", "there is no launch/nonsense.sh"),
        ("curl example.org", "knows nothing"),
        ("python my_script.py", "neither run"),
        ("dist-ssn train --nonsense=1", "unknown options {'--nonsense'}"),
        ("dist-ssn nonsense", "there is no `dist-ssn nonsense`"),
    ],
)
def test_wrong_commands_are_found(command: str, problem: str, clone: Path) -> None:
    assert problem in (check(shlex.split(command), clone, None) or "")


def test_right_commands_pass(clone: Path) -> None:
    for command in ("make test", "NODES=2 make train ARGS=-v", "pip install 'dist_ssn[wandb]'", "git clone x"):
        assert check(shlex.split(command), clone, None) is None
    assert check(["SETTING=2", "python", "-c"], clone, '\'import os; assert os.environ["SETTING"] == "2"\'') is None
    assert "exit code 1" in (check(["python", "-c"], clone, "1/0") or "")
