"""Selection of parameters by names, globs and classes of modules."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from dist_ssn.errors import ShareError

Selector = str | type[nn.Module]
"""A parameter's or a module's name, a glob over either, or a class of modules (as a class, or by its name).

A module selects every parameter inside it.
"""


def as_list(what: str, selectors: Selector | Iterable[Selector] | None) -> list[Selector]:
    """One selector, several or none, as a list.

    Args:
        what: name of the argument, for the message.
        selectors: the argument's value.

    Raises:
        ShareError: an entry is neither a string nor a class.
    """
    if selectors is None:
        return []
    single = isinstance(selectors, (str, type)) or not isinstance(selectors, Iterable)
    listed: list[Any] = [selectors] if single else list(selectors)  # pyright: ignore[reportArgumentType]
    for selector in listed:
        if not isinstance(selector, (str, type)):
            raise ShareError(
                f"{what} holds an object of type {type(selector).__name__}: give names, globs or classes of modules"
            )
    return listed


def shown(selector: Selector) -> str:
    """A selector as messages print it."""
    return repr(selector) if isinstance(selector, str) else f"class {selector.__name__}"


def selected_by(
    selectors: set[Any], globs: Sequence[str], names: Sequence[str], modules: dict[str, nn.Module]
) -> set[Any]:
    """The selectors that match one parameter, by its name, the name of a module around it, or such a module's class.

    Args:
        selectors: all selectors.
        globs: those of them with a wildcard.
        names: the parameter's names; a tied parameter has several.
        modules: the model's modules, by name.
    """
    if not selectors:
        return set()
    paths = {path for name in names for path in _paths(name)}
    classes = {cls for path in paths | {""} if path in modules for cls in type(modules[path]).__mro__}
    labels = paths | classes | {cls.__name__ for cls in classes - {nn.Module, object}}
    return labels & selectors | {glob for glob in globs if any(fnmatch.fnmatchcase(path, glob) for path in paths)}


def _paths(name: str) -> Iterator[str]:
    """A name and its prefixes: "a.b.c" → "a.b.c", "a.b", "a"."""
    while name:
        yield name
        name = name.rpartition(".")[0]
