"""Parts of a shared model: what they read, which parameters they train, and how they are frozen.

A bank belongs to the model that was shared. A part of it, such as `model.encoder`, holds biases and norms, and reads the rest
from banks outside of it. torch's functions see only what a module holds. Where that would go wrong unnoticed, it is found by
`part_check.py` and `walks.py`.
"""

from __future__ import annotations

import fnmatch
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from dist_ssn.errors import ShareError
from dist_ssn.sharing.bank import Bank, banks_of
from dist_ssn.sharing.bases import frozen_beside

frozen_by_torch: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Layers on which `requires_grad_(False)` was called last."""
told_of: weakref.WeakKeyDictionary[Bank, frozenset[int]] = weakref.WeakKeyDictionary()
"""Bank → its frozen weights, by index, about which `freeze` has already warned."""
_MOST = 3
"""Number of names in a message."""


def slots_of(layer: nn.Module) -> dict[str, tuple[Any, int]]:
    """Name of a generated parameter → (its source, its index there); empty for other modules.

    Args:
        layer: any module.
    """
    return layer.__dict__.get("_dist_ssn_slots", {})


def reads(part: nn.Module) -> Iterator[tuple[Any, int]]:
    """(source, index) of each weight that the layers of a part read.

    Args:
        part: any module.
    """
    for module in part.modules():
        yield from slots_of(module).values()


def outside(part: nn.Module) -> dict[Any, list[str]]:
    """The banks that a part reads and does not hold, each with the names of the weights that it reads.

    Args:
        part: any module.
    """
    inside = {id(module) for module in part.modules()}
    found: dict[Any, list[str]] = {}
    for source, index in reads(part):
        if id(source) not in inside and source.weight_name(index) not in found.setdefault(source, []):
            found[source].append(source.weight_name(index))
    return found


def parameters_of(part: nn.Module) -> list[nn.Parameter]:
    """The parameters that a part of a shared model trains: its own, and those of the banks that its layers read.

    `part.parameters()` lacks the banks, because they belong to the whole model. A bank that other parts read, too, is in the
    list of each of them: training one part then moves the others' weights. A mapping such as {"backbone.*": "backbone",
    "*": "rest"} gives a part its own banks.

    Args:
        part: a module of a shared model, the model itself, or a dense module.

    Returns:
        Each parameter once.
    """
    found = {id(p): p for p in part.parameters()}
    for source in outside(part):
        found |= {id(p): p for p in source.parameters()}
    return list(found.values())


def listed(names: Iterable[str]) -> str:
    """A few names, and the number of the others.

    Args:
        names: in order; repeated ones count once.
    """
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - _MOST} more" if len(unique) > _MOST else ""
    return ", ".join(unique[:_MOST]) + more


def freeze(model: nn.Module, *patterns: str) -> nn.Module:
    """Stops the training of weights and other parameters, by name, until `unfreeze`.

    A frozen weight sends no gradient into its bank. A bank whose weights are all frozen does not change any more. If others
    train the same bank, then frozen weights change with it, and a warning says so.

    Args:
        model: a shared model, or a dense one.
        patterns: names of parameters or modules, or globs over them, as in the dense model: "backbone", "backbone.*",
            "*.bias". Without any: everything.

    Returns:
        The model itself.

    Raises:
        ShareError: a pattern matches nothing.
    """
    _set_frozen(model, patterns, True)
    moving: list[str] = []
    for bank in banks_of(model):
        if bank.frozen and bank.bank.requires_grad:
            told_of[bank] = bank.frozen
            moving += [bank.weight_name(index) for index in sorted(bank.frozen)]
    if moving:
        warnings.warn(
            f"the frozen weights {listed(moving)} get no gradient, but other weights train their bank and so change them: give "
            "them a bank of their own, share(model, …, mapping={'backbone.*': 'backbone', '*': 'rest'})",
            stacklevel=2,
        )
    return model


def unfreeze(model: nn.Module, *patterns: str) -> nn.Module:
    """Undoes `freeze` for the parameters that the patterns match.

    Args:
        model: see `freeze`.
        patterns: see `freeze`. Without any: everything but what `share(keep=True)` keeps beside the banks.

    Returns:
        The model itself.

    Raises:
        ShareError: a pattern matches nothing.
    """
    _set_frozen(model, patterns, False)
    return model


def _set_frozen(model: nn.Module, patterns: tuple[str, ...], frozen: bool) -> None:
    stay = _kept_beside(model) if not frozen and not patterns else set[int]()
    patterns = patterns or ("*",)
    missed = set(patterns)

    def matches(name: str) -> bool:
        path, found = name, False
        while path:
            hits = {pattern for pattern in patterns if path == pattern or fnmatch.fnmatchcase(path, pattern)}
            missed.difference_update(hits)
            found |= bool(hits)
            path = path.rpartition(".")[0]
        return found

    changed: dict[Bank, set[int]] = {}
    own: list[Tensor] = []
    banks = {id(p) for bank in banks_of(model) for p in bank.parameters()}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, (source, index) in slots_of(module).items():
            if not matches(prefix + name):
                continue
            if not isinstance(source, Bank):
                raise ShareError(f"{prefix}{name} is not generated by a bank of share(): it cannot be frozen by itself")
            changed.setdefault(source, set()).add(index)
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in banks | stay and matches(prefix + name):
                own.append(parameter)
    if missed:
        raise ShareError(
            f"{sorted(missed)[0]!r} matches no parameter of {type(model).__name__}: names are those of the dense model, such as "
            "'encoder.*'"
        )
    for parameter in own:
        parameter.requires_grad_(not frozen)
    for bank, indices in changed.items():
        bank.set_frozen(bank.frozen | indices if frozen else bank.frozen - indices)


def _kept_beside(model: nn.Module) -> set[int]:
    """Ids of the parameters that `share(keep=True)` froze beside the banks: `unfreeze` without a pattern leaves them."""
    whole = {name for module in model.modules() for name in getattr(module, "trained_whole", ())}
    return {
        id(parameter)
        for name, parameter in frozen_beside(model).items()
        if not any(f".{name}".endswith(f".{trained}") for trained in whole)  # a wrapper's names have a prefix
    }


def set_trained(layer: nn.Module, trained: bool) -> None:
    """Freezes the weights of one layer, or trains them again.

    If `requires_grad_(False)` of the model has frozen the bank, then the bank trains again for these weights, and for no others.

    Args:
        layer: a shared layer.
        trained: False to freeze.
    """
    (frozen_by_torch.discard if trained else frozen_by_torch.add)(layer)
    for source, index in slots_of(layer).values():
        if not isinstance(source, Bank):
            continue
        frozen = source.frozen
        if trained and not source.bank.requires_grad and not source.stopped:
            source.requires_grad_(True)
            frozen = frozenset(range(len(source.group.slots)))
        source.set_frozen(frozen - {index} if trained else frozen | {index})
