"""Parameters that are trained beside the banks of differences: those that a user names; all others are frozen."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable

from torch import nn

from dist_ssn.errors import ShareError
from dist_ssn.model.selectors import Selector, as_list
from dist_ssn.model.specs import Specs, find_specs
from dist_ssn.sharing.bank import banks_of
from dist_ssn.sharing.pretrained import warn_of_new_values


def specs_of_kept(
    model: nn.Module,
    include: Selector | Iterable[Selector] | None,
    exclude: Selector | Iterable[Selector] | None,
    train: Iterable[str],
) -> Specs:
    """Specs of the weights whose values are kept: those of `find_specs`, without what is trained whole.

    Args:
        model: dense.
        include: see `find_specs`.
        exclude: see `find_specs`.
        train: see `names_of`.
    """
    whole = {name: model.get_parameter(name) for name in names_of(model, train)}
    warn_of_new_values(model, whole)
    matrices = [name for name, parameter in whole.items() if parameter.ndim >= 2]
    specs = find_specs(model, include, [*as_list("exclude", exclude), *matrices], structure=False, frozen=True)
    return dataclasses.replace(specs, own_parameters=sum(p.numel() for p in set(whole.values())))


def names_of(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Names of the parameters that patterns match; of a tied one, its first name.

    Args:
        model: dense.
        patterns: names of parameters or modules, or globs over them. What is a name is no glob, even if it has a "[" or a "*".

    Raises:
        ShareError: a pattern matches nothing.
    """
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    found: dict[str, None] = {}
    for pattern in patterns:
        matched = [names[name] for name in names if pattern in _paths(name)] or [
            names[name] for name in names if any(fnmatch.fnmatchcase(path, pattern) for path in _paths(name))
        ]
        if not matched:
            raise ShareError(f"train={pattern!r} matches no parameter of {type(model).__name__}")
        found |= dict.fromkeys(matched)
    return list(found)


def train_only(model: nn.Module, names: Iterable[str]) -> None:
    """Freezes all parameters but the banks' and those of these names.

    Args:
        model: shared.
        names: of parameters.
    """
    trained = {id(p) for bank in banks_of(model) for p in bank.parameters()}
    trained |= {id(model.get_parameter(name)) for name in names}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def _paths(name: str) -> Iterable[str]:
    """A parameter's name, and those of the modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]
