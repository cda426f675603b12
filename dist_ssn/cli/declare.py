"""Commands and options as data. Parsing, `--help` and completion all read the same declarations."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

FILES, FOLDERS, CLUSTERS, RECIPES = "files", "folders", "clusters", "recipes"
"""Kinds of values that a shell completes: see `Option.completes`."""


@dataclass(frozen=True)
class Option:
    """An option of a command.

    Args:
        name: with its dashes
        help: a statement, with the unit of the value
        metavar: name of the value; empty: a flag, which takes none
        default: what applies without the option, as text; empty: nothing
        example: a value; empty: the help shows none
        choices: every value, where they are few; the command itself refuses others
        completes: what a shell offers as values beside `choices`: FILES, FOLDERS, CLUSTERS, RECIPES or nothing
        read: text → value; its ValueError says what a value must be
        required: the command refuses to run without it
        of_recipe: `parse_recipe` reads it, not the command
    """

    name: str
    help: str
    metavar: str = ""
    default: str = ""
    example: str = ""
    choices: tuple[str, ...] = ()
    completes: str = ""
    read: Callable[[str], Any] = str
    required: bool = False
    of_recipe: bool = False

    @property
    def attribute(self) -> str:
        """Name of the value in the parsed namespace."""
        return self.name.lstrip("-").replace("-", "_")

    @property
    def full_help(self) -> str:
        """The help with the default and an example."""
        parts = [self.help]
        if self.required:
            parts.append("Required.")
        if self.choices and not self.of_recipe:  # a recipe key's type names them
            parts.append(f"One of {', '.join(self.choices)}.")
        if self.default:
            parts.append(f"Default: {self.default}.")
        if self.example:
            parts.append(f"Example: {self.name}={self.example}")
        return " ".join(parts)


@dataclass(frozen=True)
class Argument:
    """A word without dashes.

    Args:
        metavar: its name in the help
        help: a statement
        choices: the only values
        many: one or more words
        completes: see `Option`
    """

    metavar: str
    help: str
    choices: tuple[str, ...] = ()
    many: bool = False
    completes: str = ""

    @property
    def attribute(self) -> str:
        """Name of the value in the parsed namespace."""
        return self.metavar.lower() + ("s" if self.many else "")


@dataclass(frozen=True)
class Group:
    """Options that serve one purpose, which the title names."""

    title: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Command:
    """A command of `dist-ssn`.

    Args:
        name: the word after dist-ssn
        purpose: heading of the command in `dist-ssn --help`
        summary: one statement
        examples: whole command lines
        run: runs it, given the options' values and the rest: recipe keys (`takes_recipe`) or a program (`takes_program`);
            returns the exit code, None for 0
        groups: its own options
        arguments: words without dashes
        details: more to say below the summary
        takes_recipe: every recipe key is an option too
        takes_program: a program follows after two dashes
    """

    name: str
    purpose: str
    summary: str
    examples: tuple[str, ...]
    run: Callable[[argparse.Namespace, list[str]], int | None]
    groups: tuple[Group, ...] = ()
    arguments: tuple[Argument, ...] = ()
    details: str = ""
    takes_recipe: bool = False
    takes_program: bool = False

    def options(self) -> Iterator[Option]:
        """Its own options, group by group."""
        for group in self.groups:
            yield from group.options


def whole_number(text: str) -> int:
    """A whole number of at most twelve digits.

    Raises:
        ValueError: the text is none.
    """
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 12):
        raise ValueError("a number")
    return int(text)


def seconds(text: str) -> float:
    """A number of seconds, with or without decimals.

    Raises:
        ValueError: the text is none.
    """
    whole, point, decimals = text.partition(".")
    if point and not (decimals.isascii() and decimals.isdecimal() and len(decimals) <= 9):
        raise ValueError("a number")
    return float(f"{whole_number(whole)}{point}{decimals}") if point else whole_number(whole)
