"""Help: every option that the code accepts, legible on a narrow terminal, quick, and on every console."""

from __future__ import annotations

import ast
import dataclasses
import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dist_ssn.cli.commands import COMMANDS
from dist_ssn.cli.declare import Option
from dist_ssn.cli.entry import EXIT_CODES, main
from dist_ssn.cli.parse import own_options, parse
from dist_ssn.cli.recipe_options import recipe_groups
from dist_ssn.cli.search import METHODS, OPTIONS
from dist_ssn.errors import RecipeError, UserError
from dist_ssn.mapping_search.methods import METHODS as SEARCHES
from dist_ssn.mapping_search.setting import SPLITS
from dist_ssn.mapping_search.setting import Options as SearchOptions
from dist_ssn.train.ranks.stop import EXIT_LOST, EXIT_REQUEUE
from dist_ssn.train.recipe.read import parse_recipe
from dist_ssn.train.recipe.schema import Recipe

RECIPE_COMMANDS = ("train", "plan", "search")
CLI = Path(__file__).resolve().parent.parent.parent / "dist_ssn" / "cli"


def help_of(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int = 100
) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"] if command else ["--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def listed(text: str) -> set[str]:
    """Options at the beginning of a line of a help."""
    return set(re.findall(r"^  (?:-h, )?(--[\w.-]+)", text, re.MULTILINE))


def recipe_fields() -> list[str]:
    """Every key of a recipe, from the recipe itself."""
    names = []
    for field in dataclasses.fields(Recipe):
        value = getattr(Recipe(), field.name)
        inner = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        names += [f"{field.name}.{part.name}" for part in inner] or [field.name]
    return names


def is_taken(command: str, option: str) -> bool:
    """Whether the code knows an option, whatever it thinks of the value."""
    try:
        _, rest = parse(COMMANDS[command], [f"{option}=1"])
        parse_recipe(rest)
    except RecipeError as error:
        return "unknown key" not in str(error) and "is a group" not in str(error)
    except UserError as error:
        return "unrecognized" not in str(error)
    return True


@pytest.mark.parametrize("command", RECIPE_COMMANDS)
def test_help_lists_what_the_code_accepts(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = listed(help_of(command, monkeypatch, capsys))
    for key in recipe_fields():
        assert f"--{key}" in named, f"{command} accepts --{key}, and its help does not list it"
    for option in sorted(named - {"--help", "--model_args.NAME"}):
        assert is_taken(command, option), f"the help of {command} lists {option}, which it refuses"
    assert is_taken(command, "--model_args.width") and not is_taken(command, "--nonsense")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_value_that_the_command_reads(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The values are attributes of `given` in the command's file, or names in its tuple OPTIONS."""
    named = {name.lstrip("-").replace("-", "_") for name in listed(help_of(command, monkeypatch, capsys))}
    arguments = {argument.attribute for argument in COMMANDS[command].arguments}
    files = [CLI / f"{command}.py", *([CLI / "plan_costs.py"] if command == "plan" else [])]
    read = {
        node.attr
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "given"
    }
    read |= set(OPTIONS) if command == "search" else set()
    assert read <= named | arguments
    unread = named - read - {"help", "config", "print_config", "model_args.NAME", *recipe_fields()}
    assert unread - ({"workers", "compute", "calibrate"} if command == "plan" else set()) == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_says_its_value_default_and_example(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = " ".join(help_of(command, monkeypatch, capsys).split())
    keys = [option for group in recipe_groups() for option in group.options] if command in RECIPE_COMMANDS else []
    own = list(COMMANDS[command].options())
    for option in [*own, *(key for key in keys if key.name not in {option.name for option in own})]:
        assert option.help.rstrip(")").endswith((".", "/")) or "Example: " in option.help, option
        assert option.help[0].isupper() or option.help.startswith(("gpt", "ZeRO")), option
        if option.metavar:
            assert f"{option.name} {option.metavar} " in text
            assert f"Example: {option.name}={option.example}" in text or "Example: " in option.help
            assert option.default or option.required or "Example: " in option.help
    for example in COMMANDS[command].examples:
        assert example in help_of(command, monkeypatch, capsys)


def own_examples() -> list[tuple[str, Option]]:
    return [(name, option) for name, command in COMMANDS.items() for option in command.options()]


@pytest.mark.parametrize(
    ("command", "option"), [pytest.param(name, option, id=f"{name} {option.name}") for name, option in own_examples()]
)
def test_an_example_of_an_option_is_read(command: str, option: Option) -> None:
    if option.metavar and not option.of_recipe:
        assert option.read(option.example) is not None
    if option.choices:
        assert option.example in option.choices


def test_examples_of_recipe_keys_are_read() -> None:
    """One by one: a value of a right type, which may want a file or another key that is not there."""
    wrong = {}
    for option in (option for group in recipe_groups() for option in group.options):
        if option.example:
            try:
                parse_recipe(shlex.split(f"{option.name}={option.example}"))
            except RecipeError as error:
                wrong[option.name] = str(error)
    asked = {
        name
        for name, text in wrong.items()
        if not re.search("exist|No such file|needs|goes with|set share|folder|must name", text)
    }
    assert not asked, {name: wrong[name] for name in asked}


@functools.cache
def words_of_examples() -> list[list[str]]:
    return [shlex.split(example) for command in COMMANDS.values() for example in command.examples]


def test_command_lines_in_the_help_are_read() -> None:
    for words in words_of_examples():
        if "<(dist-ssn" in words:
            continue
        words = words[: words.index(">")] if ">" in words else words
        at = next(index for index, word in enumerate(words) if word in ("dist-ssn", "dist_ssn.cli"))
        command = COMMANDS[words[at + 1]]
        _, rest = parse(command, words[at + 2 :])
        if command.takes_recipe:
            parse_recipe(rest)


def test_declared_choices_are_those_of_the_code() -> None:
    assert set(METHODS) == {"auto", *SEARCHES} and len(METHODS) == len(set(METHODS))
    search = {option.name: option for option in COMMANDS["search"].options()}
    assert search["--split"].choices == SPLITS
    assert set(OPTIONS) == {field.name for field in dataclasses.fields(SearchOptions)}
    assert search["--templates"].default == str(SearchOptions().templates)


def test_commands_by_purpose_and_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of("", monkeypatch, capsys)
    for command in COMMANDS.values():
        assert re.search(rf"^{command.purpose}:$", text, re.MULTILINE)
        assert re.search(rf"^  {command.name} ", text, re.MULTILINE)
    assert list(EXIT_CODES) == [0, EXIT_LOST, 2, EXIT_REQUEUE, 130]
    for code in EXIT_CODES:
        assert re.search(rf"^  {code} +[A-Z]", text, re.MULTILINE)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_no_line_is_wider_than_the_terminal(
    command: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = help_of(command, monkeypatch, capsys, columns).splitlines()
    examples = {f"  {example}" for example in COMMANDS[command].examples} if command else set()
    assert not [line for line in lines if len(line) > columns and line not in examples]


def test_own_options_stand_anywhere() -> None:
    options = list(COMMANDS["plan"].options())
    words = ["--steps", "3", "--json", "--name", "-h", "--cluster", "local", "--optimizer.lr", "-1e-3", "--workers=2"]
    own, rest = own_options(words, options)
    assert own == ["--json", "--cluster=local", "--workers=2"]
    assert rest == ["--steps", "3", "--name", "-h", "--optimizer.lr", "-1e-3"]
    # A key without its value keeps no option of ours as one.
    assert own_options(["--name", "--json"], options) == (["--json"], ["--name"])
    assert own_options(["--config", "digits", "x"], options) == ([], ["--config", "digits", "x"])


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["plan", "--cluster"], "command line: --cluster needs a value, as in --cluster=ethernet-1g"),
        (["plan", "--cluster", "--json"], "command line: --cluster needs a value, as in --cluster=ethernet-1g"),
        (["plan", "--workers=2,x"], "command line: --workers must be numbers from 1 to 1048576, as in 2,8,64"),
        (["plan", "--share.budget=1", "--workers=2"], "command line: --workers goes with --cluster=FILE"),
        (["search", "--groups=x", "--max-seconds=y"], "--groups must be a number, got 'x'; --max-seconds must be a"),
        (["search", "--share.budget=1"], "command line: --output needs the plan's file, as in --output=plan.json"),
        (["train", "--no-progress=yes"], "ignored explicit argument 'yes' (dist-ssn train --help lists what there is)"),
        (["launch", "--cluster=local", "--nodes=two", "--", "train"], "--nodes must be a number, got 'two'"),
        (["launch", "--clus=local"], "required: --cluster"),
        (["lab", "run", "--nods=2"], "unrecognized arguments: --nods=2; did you mean --nodes? (dist-ssn lab --help"),
        (["plan", "--clutser=local"], "command line: unknown key clutser; did you mean cluster?"),
        (["completion", "fish"], "invalid choice: 'fish'"),
        (["doctor", "--all"], "unrecognized arguments: --all"),
    ],
)
def test_mistakes_in_options(arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and wanted in err and err.count("\n") == 1


def test_print_config_needs_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    for command in RECIPE_COMMANDS:
        assert main([command, "--print_config", "--steps=7"]) == 0
        assert "\nsteps: 7\n" in capsys.readouterr().out


ALL_HELPS = """
import contextlib, sys
from dist_ssn.cli import main
for words in [["--help"], ["--version"], *([name, "--help"] for name in sys.argv[1:])]:
    with contextlib.suppress(SystemExit):
        main(words)
print(*sys.modules, file=sys.stderr)
"""


@pytest.mark.processes
def test_help_imports_no_torch() -> None:
    result = subprocess.run(
        [sys.executable, "-c", ALL_HELPS, *COMMANDS], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0 and result.stdout.count("usage: ") == 1 + len(COMMANDS), result.stderr
    assert not set(result.stderr.split()) & {"torch", "numpy", "sklearn", "matplotlib", "rich"}


@pytest.mark.processes
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_without_a_sign_shows_another(encoding: str) -> None:
    small = ("--model_args={layers: 1, width: 32, heads: 2, context: 16}", "--share.budget=20%")
    program = (
        f"from dist_ssn.cli import main; print(main({['plan', *small]}), main(['train', '--config=×.yaml']), '×…│')"
    )
    result = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", program],
        env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "160"},
        capture_output=True,
        timeout=100,
        check=False,
    )
    errors = result.stderr.decode(encoding)
    assert result.returncode == 0, errors
    assert "blocks.0.mlp.up.weight" in result.stdout.decode(encoding) and b"\n0 2 " in result.stdout
    assert ".yaml' does not exist" in errors and errors.count("\n") == 1
