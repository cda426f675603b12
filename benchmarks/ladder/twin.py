"""A dense twin of a shared model that generates all weights at once, in one read of each bank. Same values, half the time.

A layer generates its weight in forward and again in backward, so that nothing is kept. A simulation of small models has the memory
to keep them: bank[index] · factor for all weights of a bank together, times each matrix's gains. The tables are found by reading
the weights of a bank of ones (their factors) and of a bank that counts (their indices).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dist_ssn.baselines.hashed import Hashed
from dist_ssn.sharing.bank import Bank
from dist_ssn.sharing.morphs import split_gains


class Twin(nn.Module):
    """Computes what `model` computes, from the same parameters, and updates the same buffers.

    Args:
        model: Shared by the morph "offset" with one template, or by the baseline "hashed-global".
        dense: The same architecture, not shared; its values do not matter.
    """

    def __init__(self, model: nn.Module, dense: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._dense = [dense]  # in a list, so that its parameters are not this module's
        for name, module in dense.named_modules():
            module._buffers.update(dict(model.get_submodule(name)._buffers))
        kept = dict(model.named_parameters())
        self._own = {name: kept[name] for name, _ in dense.named_parameters() if name in kept}
        made = dict(dense.named_parameters())
        sources = [module for module in model.modules() if isinstance(module, Bank | Hashed)]
        self._sources = [_Source(one, [name for name in self._named(one) if name in made]) for one in sources]
        missing = made.keys() - self._own.keys() - {name for one in self._sources for name in one.names}
        assert not missing, missing

    @staticmethod
    def _named(source: Bank | Hashed) -> list[str]:
        count = len(source.group.slots) if isinstance(source, Bank) else len(source.weights)
        return [source.weight_name(index) for index in range(count)]

    def forward(self, inputs: Tensor) -> Any:
        weights = {name: weight for source in self._sources for name, weight in source.weights().items()}
        return functional_call(self._dense[0], {**self._own, **weights}, (inputs,))


class _Source:
    """Makes all weights of one bank, or of one array of buckets."""

    def __init__(self, source: Bank | Hashed, names: list[str]) -> None:
        self.source, self.names = source, names
        self.values = source.bank if isinstance(source, Bank) else source.get_parameter("buckets0")
        count = len(names)
        kept = {name: one.detach().clone() for name, one in source.named_parameters()}
        if isinstance(source, Bank):
            source.at_start = False  # the values below are not taken for a mistake
        with torch.no_grad():
            for name, one in source.named_parameters():
                one.fill_(1.0)
                assert name in ("bank", "gains", "buckets0"), f"not a source of one template: {name}"
            factors = [source(index).clone() for index in range(count)]
            self.values.copy_(torch.arange(1, self.values.numel() + 1).view_as(self.values))
            places = [(source(index) / factor).round().long() - 1 for index, factor in enumerate(factors)]
            for name, one in source.named_parameters():
                one.copy_(kept[name])
        self.shapes = [factor.shape for factor in factors]
        self.factor = torch.cat([factor.flatten() for factor in factors])
        self.index = torch.cat([place.flatten() for place in places])
        self.sizes = [factor.numel() for factor in factors]

    def weights(self) -> dict[str, Tensor]:
        """Name → weight, with a graph to the parameters of the source."""
        flat = self.values.view(-1).index_select(0, self.index) * self.factor
        made = [part.view(shape) for part, shape in zip(flat.split(self.sizes), self.shapes, strict=True)]
        if isinstance(self.source, Bank) and self.source.gains is not None:
            slots = self.source.group.slots
            gains = self.source.gains.split([slot.gains for slot in slots])
            made = [
                _scaled(weight, *split_gains(slot, own)) for weight, slot, own in zip(made, slots, gains, strict=True)
            ]
        return dict(zip(self.names, made, strict=True))


def _scaled(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    if rows is not None:
        weight = weight * rows.view(-1, *[1] * (weight.dim() - 1))
    if columns is not None:
        weight = (weight.view(len(weight), -1) * columns).view_as(weight)
    return weight
