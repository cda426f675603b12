"""`WeightSource`: interface of the modules that generate a layer's weights: banks, and the baselines' generators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Values(NamedTuple):
    """The tensors from which a weight was generated, and the version of each parameter at that time.

    The read keeps them, so that its backward uses the same tensors (`functional_call` swaps them), and either the same values
    or raises an error.
    """

    tensors: Mapping[str, Tensor | None]
    versions: Mapping[str, int]

    @staticmethod
    def of(parameters: Mapping[str, Tensor | None], fixed: Mapping[str, Tensor | None] | None = None) -> Values:
        """The current values.

        Args:
            parameters: by name.
            fixed: tensors that training does not change, by name. DDP may copy rank 0's into them at any time.
        """
        return Values({**parameters, **(fixed or {})}, _versions(parameters))

    def are(self, parameters: Mapping[str, Tensor | None]) -> bool:
        """True if `parameters` are the same tensors, with the same values."""
        same = all(tensor is parameters[name] for name, tensor in self.tensors.items())
        return same and self._unchanged()

    def checked(self, weight: str) -> Mapping[str, Tensor | None]:
        """The tensors.

        Raises:
            RuntimeError: one of them was written to after the read.
        """
        if not self._unchanged():
            raise RuntimeError(
                f"the bank of {weight} was modified in place between forward and backward, by an optimizer step perhaps: "
                "its gradient would be wrong; call backward() first"
            )
        return self.tensors

    def _unchanged(self) -> bool:
        return _versions({name: self.tensors[name] for name in self.versions}) == self.versions


def _versions(parameters: Mapping[str, Tensor | None]) -> dict[str, int]:
    return {name: p._version for name, p in parameters.items() if p is not None and not p.is_inference()}


class WeightSource(Protocol):
    """A module that generates weight `index` when it is called, and generates it again for backward."""

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
        """The weight `index` in its shape, or only its `rows` [m] as [m, C].

        Args:
            index: of the weight.
            rows: indices of the rows to generate; None: the whole weight.
            dtype: of the result, if it differs from the source's (under autocast).
            values: the parameters of an earlier read, from which the weight is generated again, without a graph.
        """
        ...

    def values(self) -> Values:
        """The current parameters, from which a weight can be generated again."""
        ...

    def weight_name(self, index: int) -> str:
        """Full name of weight `index` in the model, for messages."""
        ...

    def at_hand(self, index: int) -> Tensor | None:
        """Weight `index`, if it has been generated with all others for this forward; None if it is generated on demand."""
        ...


def autocast_dtype(source: WeightSource) -> torch.dtype | None:
    """The dtype to which autocast would lower a source's weights now; None without autocast."""
    device = source.device.type
    if device == "meta" or source.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
