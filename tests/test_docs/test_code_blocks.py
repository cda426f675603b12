"""Everything in the code blocks of README and docs is true: Python runs or compiles, commands run or are understood."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from tests.test_docs.markdown import (
    README,
    ROOT,
    SHELLS,
    VISIBLE,
    Block,
    check,
    commands,
    name_of,
    pages,
    parse,
    run,
    save_files,
    yaml_problem,
)

every_page = pytest.mark.parametrize("page", pages(), ids=name_of)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder in which the relative paths of README lead into the repository, but whatever is written stays here."""
    for name in VISIBLE:
        if (ROOT / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@every_page
def test_every_block_is_of_a_kind_that_is_checked(page: Path) -> None:
    known = (*SHELLS, "python", "text", "yaml", "json")
    unknown = [
        f"{name_of(page)}:{block.line}: {block.language or 'no language'}"
        for block in parse(page.read_text())
        if block.file is None
        and block.language not in known
        and not (block.language == "diff" and block.script is not None)
    ]
    assert not unknown, unknown


@every_page
@pytest.mark.processes
@pytest.mark.timeout(600)
def test_python_blocks(page: Path, clone: Path) -> None:
    """All of a page in one program, each on its line of the page, so that a traceback shows the page's line numbers."""
    blocks = [block for block in parse(page.read_text()) if block.language == "python" and block.file is None]
    if not any(block.hidden for block in blocks):
        for block in blocks:
            compile("\n" * (block.line - 1) + block.body, name_of(page), "exec")
        return
    save_files(parse(page.read_text()), clone)
    program: list[str] = []
    for block in blocks:
        program += [""] * (block.line - 1 - len(program)) + block.body.splitlines()
    (clone / "page.py").write_text("\n".join(program) + "\n")
    result = run([sys.executable, "page.py"], clone)
    assert result.returncode == 0, result.stderr


@every_page
@pytest.mark.processes
@pytest.mark.timeout(900)
def test_shell_blocks(page: Path, clone: Path) -> None:
    blocks = parse(page.read_text())
    save_files(blocks, clone)
    wrong = []
    for block in blocks:
        if block.language in SHELLS and block.file is None:
            for line, words in commands(block):
                if problem := check(words, clone, block.run):
                    wrong.append(f"{name_of(page)}:{line}: {shlex.join(words)}: {problem}")
    assert not wrong, "\n".join(wrong)


@every_page
def test_yaml_and_json_blocks(page: Path, tmp_path: Path) -> None:
    wrong = []
    for block in parse(page.read_text()):
        if block.language == "json":
            json.loads(block.body)
        if block.language == "yaml" and (problem := yaml_problem(block.body, tmp_path)):
            wrong.append(f"{name_of(page)}:{block.line}: {problem}")
    assert not wrong, "\n".join(wrong)


def test_the_readme_is_short_and_shows_both_ways() -> None:
    assert len(README.read_text().splitlines()) <= 120
    languages = {block.language for block in parse(README.read_text())}
    assert {"bash", "python", "yaml"} <= languages


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
        Block("python", "\nmodel = 1\n", 2, hidden=True),
        Block("python", "print(model)\n", 6),
        Block("yaml", "steps: 2\n", 10, file="my.yaml"),
        Block("console", "$ dist-ssn train \\\n  --config my.yaml  # why\noutput\n", 14, run="--steps=2"),
        Block("", "```\n", 19),
    ]
    assert commands(parse(EXAMPLE)[3]) == [(14, ["dist-ssn", "train", "--config", "my.yaml"])]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("make nonsense", "nonsense"),
        ("make", "no target"),
        ("pip install dist_ssn[nonsense]", "unknown extras"),
        ("launch/nonsense.sh", "there is no launch/nonsense.sh"),
        ("curl example.org", "neither run"),
        ("python my_script.py", "neither run"),
        ("python -m benchmarks.nonsense", "fails"),
        ("python -m benchmarks.documents --nonsense", "unknown options {'--nonsense'}"),
        ("dist-ssn train --nonsense=1", "unknown options {'--nonsense'}"),
        ("dist-ssn train --optimizer.lr=fast", "optimizer.lr"),
        ("dist-ssn launch --cluster local -- train --nonsense=1", "unknown options {'--nonsense'}"),
        ("dist-ssn nonsense", "there is no `dist-ssn nonsense`"),
    ],
)
def test_wrong_commands_are_found(command: str, problem: str, clone: Path) -> None:
    assert problem in (check(shlex.split(command), clone, None) or "")


@pytest.mark.processes
def test_right_commands_pass(clone: Path) -> None:
    for command in ("make test", "NODES=2 make train ARGS=-v", "pip install 'dist_ssn[wandb]'", "git clone x"):
        assert check(shlex.split(command), clone, None) is None
    assert check(["SETTING=2", "python", "-c"], clone, '\'import os; assert os.environ["SETTING"] == "2"\'') is None
    assert "exit code 1" in (check(["python", "-c"], clone, "1/0") or "")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("checkpoint: {every: 500}", None),
        ("optimizer: {lr: fast}", "optimizer.lr"),
        ("nodes: 2\nlauncher: slurm", None),
        ("nodes: 2\nlauncher: slurmm", "launcher"),
    ],
)
def test_yaml_blocks_are_recipes_or_clusters(text: str, problem: str | None, tmp_path: Path) -> None:
    found = yaml_problem(text, tmp_path)
    assert found is None if problem is None else problem in (found or "")
