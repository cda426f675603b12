"""Layers that changed places after `share`: a state dict would give their weights to others.

A weight is generated for the place where `share` found its layer. In a dense model it moves with the layer.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator

from torch import nn

from dist_ssn.sharing.bank import banks_of
from dist_ssn.sharing.parts import listed, slots_of
from dist_ssn.sharing.trained_by import roots

_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models that were told of."""


def warn_of_places(start: nn.Module) -> None:
    """Warns, once for a model, if its layers have other places than when it was shared.

    Args:
        start: is being saved; the shared models inside it are looked at.
    """
    for model in start.modules():
        if model not in roots or model in _told:
            continue
        if moved := list(_moved(model)):
            _told.add(model)
            place, weight = moved[0]
            warnings.warn(
                f"{place} reads the weight that share() made for {weight}, as {len(moved)} layers do that were moved or removed "
                f"({listed(place for place, _ in moved)}): a model of the original order would load this state dict into others: "
                "change the layers before share(), or save materialize(model)'s",
                stacklevel=2,
            )


def _moved(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(Place, weight) of each layer that reads another weight than the one that was made for its place."""
    for bank in banks_of(model):
        for index, slot in enumerate(bank.group.slots):
            path, _, name = slot.name.rpartition(".")
            layer = layer_at(model, path)
            source, found = slots_of(layer).get(name, (bank, index)) if layer is not None else (bank, index)
            if (source, found) != (bank, index):
                yield slot.name, source.weight_name(found)


def layer_at(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a path; None if there is none.

    Args:
        module: where the path begins.
        path: names between dots, or nothing.
    """
    found: nn.Module | None = module
    for name in filter(None, path.split(".")):
        found = found._modules.get(name) if found is not None else None
    return found
