"""`WeightSource`: what a layer needs of the module that makes its weights, be it a bank or a baseline's generator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Values(NamedTuple):
    """The parameters that a weight was read from, and each one's version at that time.

    They travel with the read, so that its backward sees the same tensors (`functional_call` swaps them), and the same
    values or an error.
    """

    tensors: Mapping[str, Tensor | None]
    versions: tuple[int, ...]

    @staticmethod
    def of(parameters: Mapping[str, Tensor | None]) -> Values:
        """The present values of `parameters`."""
        return Values(dict(parameters), _versions(parameters))

    def checked(self, weight: str) -> Mapping[str, Tensor | None]:
        """The tensors.

        Raises:
            RuntimeError: one of them was written to after the read.
        """
        if _versions(self.tensors) != self.versions:
            raise RuntimeError(
                f"the bank of {weight} was modified in place between forward and backward, by an optimizer step perhaps: "
                "its gradient would be wrong; call backward() first"
            )
        return self.tensors


def _versions(parameters: Mapping[str, Tensor | None]) -> tuple[int, ...]:
    return tuple(p._version for p in parameters.values() if p is not None and not p.is_inference())


class WeightSource(Protocol):
    """A module that makes weight `index` when it is called, and makes it again for backward."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights outside of autocast."""
        ...

    def __call__(
        self,
        index: int,
        rows: Tensor | None = None,
        dtype: torch.dtype | None = None,
        values: Values | None = None,
    ) -> Tensor:
        """The weight of number `index` in its shape, or only its `rows` [m] as [m, C].

        Args:
            index: number of the weight.
            rows: the rows to make; None makes the whole weight.
            dtype: of the result, where it differs from the source's (under autocast).
            values: make the weight, without a graph, from what an earlier read was made from.
        """
        ...

    def values(self) -> Values:
        """The present parameters, to make a weight again from just these."""
        ...

    def weight_name(self, index: int) -> str:
        """Full name of weight `index` in the model, for messages."""
        ...
