"""Reads a command's words by its declaration, and prints its help."""

from __future__ import annotations

import argparse
import difflib
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import NoReturn

from dist_ssn.cli.declare import Command, Option
from dist_ssn.cli.recipe_options import recipe_groups
from dist_ssn.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are a `UserError`."""

    def error(self, message: str) -> NoReturn:
        """Raises the message of argparse as one sentence.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message} ({self.prog} --help lists what there is)")


class Layout(argparse.RawDescriptionHelpFormatter):
    """Help with a line per example, and a third of the width for the options' names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=max(24, shutil.get_terminal_size().columns // 3))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # an option stays one word


def parse(command: Command, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Separates a command's own options from its recipe keys or its program. `--help` prints and exits.

    Returns:
        The values of the own options, None where one was not given, and the rest of the words.

    Raises:
        UserError: one sentence that names every wrong value.
    """
    if command.takes_recipe:
        own, rest = own_options(words, list(command.options()))
    elif command.takes_program and "--" in words:
        cut = words.index("--")
        own, rest = list(words[:cut]), list(words[cut + 1 :])
    else:
        own, rest = list(words), []
    with_keys = command.takes_recipe and any(word in ("-h", "--help") for word in own)
    parser = parser_of(command, with_keys)
    given, unknown = parser.parse_known_args(own)
    if unknown:
        names = [option.name for option in command.options()]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    problems = []
    for option in command.options():
        text = getattr(given, option.attribute, None)
        if option.metavar and not option.of_recipe and text is not None:
            try:
                setattr(given, option.attribute, option.read(text))
            except ValueError as error:
                problems.append(f"{option.name} must be {error}, got {text!r:.40}")
    if problems:
        raise UserError(f"command line: {'; '.join(problems)}")
    return given, rest


def own_options(words: Sequence[str], options: Iterable[Option]) -> tuple[list[str], list[str]]:
    """Separates the words of these options, wherever they stand, from those of recipe keys.

    A recipe key keeps the word after it, unless it is written with `=` or that word starts with two dashes.

    Raises:
        UserError: an option lacks its value.
    """
    takes_value = {option.name: option for option in options if not option.of_recipe}
    own: list[str] = []
    rest: list[str] = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        name, equals, _ = word.partition("=")
        option = takes_value.get(name)
        follows = remaining[0] if remaining and not remaining[0].startswith("--") else None
        if word in ("-h", "--help"):
            own.append(word)
        elif option is None:
            rest.append(word)
            if word.startswith("--") and not equals and follows is not None:
                rest.append(remaining.pop(0))
        elif not option.metavar or equals:
            own.append(word)
        elif follows is None:
            raise UserError(f"command line: {name} needs a value, as in {name}={option.example}")
        else:
            own.append(f"{name}={remaining.pop(0)}")
    return own, rest


def parser_of(command: Command, with_recipe_keys: bool = False) -> Parser:
    """The argparse parser of a command; with recipe keys for its help, which takes them as options like any other."""
    prog = f"dist-ssn {command.name}"
    text = [command.summary, *([command.details] if command.details else [])]
    text += ["examples:\n" + "\n".join(f"  {example}" for example in command.examples)]
    text = [paragraph if "\n" in paragraph else _filled(paragraph) for paragraph in text]
    parser = Parser(
        prog,
        _usage(prog, command),
        "\n\n".join(text),
        formatter_class=Layout,
        allow_abbrev=False,
        add_help=False,
    )
    words = parser.add_argument_group("arguments") if command.arguments else parser
    for argument in command.arguments:
        words.add_argument(
            argument.attribute,
            metavar=argument.metavar,
            help=_escaped(argument.help),
            choices=argument.choices or None,
            nargs="+" if argument.many else None,
        )
    parser.add_argument("-h", "--help", action="help", help="Show this help.")
    own = {option.name for option in command.options()}
    for group in [*command.groups, *(recipe_groups() if with_recipe_keys else ())]:
        made = parser.add_argument_group(group.title)
        for option in group.options:
            if group not in command.groups and option.name in own:
                continue  # the command's own option hides the recipe's key
            if option.metavar:
                made.add_argument(
                    option.name,
                    dest=option.attribute,
                    metavar=option.metavar,
                    help=_escaped(option.full_help),
                    required=option.required and not command.takes_recipe,  # then the command itself says so
                )
            else:
                made.add_argument(
                    option.name, dest=option.attribute, action="store_true", help=_escaped(option.full_help)
                )
    return parser


def _usage(prog: str, command: Command) -> str:
    words = [prog, *(f"{argument.metavar}{' ...' if argument.many else ''}" for argument in command.arguments)]
    required = [option for option in command.options() if option.required]
    words += [f"{option.name} {option.metavar}" for option in required]
    words += ["[options]"] if len(required) < len(list(command.options())) else []
    words += ["[--any.key=value ...]"] if command.takes_recipe else []
    words += ["-- PROGRAM ..."] if command.takes_program else []
    return " ".join(words)


def _filled(paragraph: str) -> str:
    return textwrap.fill(paragraph, max(40, shutil.get_terminal_size().columns - 2), break_on_hyphens=False)


def _escaped(text: str) -> str:
    return text.replace("%", "%%")  # argparse fills in %(default)s and the like
