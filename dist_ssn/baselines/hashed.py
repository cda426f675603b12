"""HashedNets: each element of a weight is one of a few buckets, with a pseudo-random index, times a pseudo-random sign.

V_ij = ξ(i, j) · w_h(i, j). The paper has an array of buckets per layer ("hashed"); "hashed-global" has one for all weights.

Letters: n elements in a weight, K buckets.

Source: Chen, Wilson, Tyree, Weinberger & Chen 2015, "Compressing Neural Networks with the Hashing Trick", arXiv 1504.04788,
section 4.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_ssn.baselines.generator import Generator, draw_for, normal
from dist_ssn.errors import BudgetError
from dist_ssn.model.specs import LayerSpec, Specs
from dist_ssn.plan.allocate import split
from dist_ssn.plan.mapping import group_std


def hashed(specs: Specs, budget: int, seed: int) -> Generator:
    """An array of buckets for each weight, in proportion to its size.

    Raises:
        BudgetError: the budget has fewer parameters than there are weights.
    """
    count = len(specs.weights)
    if budget < count:
        raise BudgetError(
            f"the control 'hashed' needs more than {budget:,} parameters: at least one for each of {count} weights"
        )
    shares = split(budget - count, {weight.name: [weight] for weight in specs.weights}, {})
    sizes = [shares[weight.name] + 1 for weight in specs.weights]
    return Hashed("hashed", specs.weights, sizes, list(range(count)), seed)


def hashed_global(specs: Specs, budget: int, seed: int) -> Generator:
    """One array of buckets for all weights."""
    return Hashed("hashed-global", specs.weights, [budget], [0] * len(specs.weights), seed)


class Hashed(Generator):
    """Hashed weights; weight i reads the array `array_of[i]`, and array a has `sizes[a]` buckets."""

    def __init__(
        self, control: str, weights: Sequence[LayerSpec], sizes: Sequence[int], array_of: Sequence[int], seed: int
    ):
        super().__init__(control, weights, seed)
        self._array_of, self._scales = tuple(array_of), [0.0] * len(weights)
        for place, size in enumerate(sizes):
            members = [i for i, array in enumerate(array_of) if array == place]
            std = group_std([weights[i] for i in members])
            for i in members:
                self._scales[i] = weights[i].init_std / std
            # Two dimensions, so that optimizers decay buckets like the matrices that they replace.
            values = normal(draw_for(seed, f"buckets {place}"), (size, 1), std)
            parameter = nn.Parameter(torch.from_numpy(values).to(torch.get_default_dtype()))
            self.register_parameter(f"buckets{place}", parameter)
        # No buffers, because DDP sends buffers to all ranks in each step, and each rank can compute these tables itself.
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._prepare()

    def _prepare(self) -> None:
        """Indices and signs [n] of each weight, on the buckets' device."""
        device, dtype = self.device, self.dtype
        self._tables = []
        for i, weight in enumerate(self.weights):
            size = self.get_parameter(f"buckets{self._array_of[i]}").numel()
            draw = draw_for(self.seed, f"hash {weight.name}")
            index = torch.from_numpy(draw.randint(0, size, weight.numel).astype(np.int32)).to(device)
            sign = torch.from_numpy(draw.randint(0, 2, weight.numel) * 2.0 - 1.0).to(device, dtype)
            self._tables.append((index, sign * self._scales[i]))

    def make(self, index: int, parameters: Mapping[str, Tensor | None]) -> Tensor:
        """The weight [R, C]: its buckets at its indices, times its signs and its scale."""
        buckets = parameters[f"buckets{self._array_of[index]}"]
        assert buckets is not None
        place, sign = self._tables[index]
        return (buckets.view(-1).index_select(0, place) * sign).view(self.weights[index].rows, -1)

    def _apply(self, fn: Any, recurse: bool = True) -> Hashed:
        before = (self.device, self.dtype)
        super()._apply(fn, recurse)
        if (self.device, self.dtype) != before:
            self._prepare()
        return self
