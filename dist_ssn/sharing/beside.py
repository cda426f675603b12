"""The parameters beside a weight, by which people choose layers: biases and norms, which a bank does not replace.

Rules by the names of parameters (`name.startswith("encoder")`) find them, and not the weight.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from dist_ssn.sharing.bank import Bank
from dist_ssn.sharing.parts import slots_of
from dist_ssn.sharing.places import layer_at
from dist_ssn.sharing.trained_by import is_a, layers, roots

Own = tuple[tuple[str, nn.Parameter], ...]


class Weight(NamedTuple):
    """A weight that a layer reads."""

    source: Any
    index: int
    own: Own
    """Names in their modules and parameters: the layer's own, or else biases and norms of the smallest block that has any."""

    @property
    def name(self) -> str:
        """Full name in the model."""
        return self.source.weight_name(self.index)


def weights_of_process() -> list[Weight]:
    """All weights of shared layers, each with the parameters beside it.

    The whole model is no block: of a layer without others in the same block nothing is beside.
    """
    sources = _sources()
    _find_copies(sources)
    banks = {id(p) for source in sources for p in source.parameters()}
    blocks: dict[int, Own] = {}
    found: dict[int, Own] = {}
    for root in sorted(roots, key=lambda root: sum(1 for _ in root.modules())):
        for layer, around in _with_blocks(root, ()):
            if id(layer) not in found:
                found[id(layer)] = next(filter(None, (_own(block, banks, blocks) for block in reversed(around))), ())
    weights = []
    for layer in list(layers):
        own = tuple((name, p) for name, p in layer._parameters.items() if p is not None) or found.get(id(layer), ())
        weights += [Weight(source, index, own) for source, index in slots_of(layer).values()]
    return sorted(weights, key=lambda weight: weight.name)


def _sources() -> set[Any]:
    return {source for layer in list(layers) for source, _ in slots_of(layer).values()}


def _with_blocks(module: nn.Module, around: tuple[nn.Module, ...]) -> Iterator[tuple[nn.Module, tuple[nn.Module, ...]]]:
    """Each shared layer with the modules around it, from the outermost on."""
    for child in module._modules.values():
        if child is None:
            continue
        if slots_of(child):
            yield child, around
        yield from _with_blocks(child, (*around, child))


def _own(block: nn.Module, banks: set[int], known: dict[int, Own]) -> Own:
    """The biases and norms inside a block. Matrices are of other layers, or of adapters that train without the weights."""
    if id(block) not in known:
        known[id(block)] = tuple(
            (name.rpartition(".")[2], p) for name, p in block.named_parameters() if p.ndim < 2 and id(p) not in banks
        )
    return known[id(block)]


def _find_copies(sources: set[Any]) -> None:
    """Adds models to `roots` that were copied or unpickled, so that `share` did not get them."""
    inside = {id(module) for root in list(roots) for module in root.modules()}
    strange = [source for source in sources if isinstance(source, Bank) and id(source) not in inside]
    for thing in gc.get_objects() if strange else ():
        if is_a(thing, nn.Module) and "_modules" in thing.__dict__ and any(_is_root(thing, bank) for bank in strange):
            roots.add(thing)


def _is_root(module: nn.Module, bank: Bank) -> bool:
    """True if the bank's first weight has its name in this module."""
    path, _, name = bank.weight_name(0).rpartition(".")
    layer = layer_at(module, path)
    return layer is not None and slots_of(layer).get(name, (None,))[0] is bank
