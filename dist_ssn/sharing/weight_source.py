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
    memory: Mapping[str, Tensor]
    """The parameters' memory at that time: `parameter.data = ...` gives a parameter another one."""
    versions: Mapping[str, int]

    @staticmethod
    def of(parameters: Mapping[str, Tensor | None], fixed: Mapping[str, Tensor | None] | None = None) -> Values:
        """The current values.

        Args:
            parameters: by name.
            fixed: tensors that training does not change, by name. DDP may copy rank 0's into them at any time.
        """
        # ZeRO-3 takes a parameter's memory away between forward and backward.
        memory = {
            name: p if hasattr(p, "ds_id") else p.detach()
            for name, p in parameters.items()
            if p is not None and not p.is_inference()
        }
        versions = {name: p._version for name, p in memory.items()}
        return Values({**parameters, **(fixed or {})}, memory, versions)

    def are(self, parameters: Mapping[str, Tensor | None], fixed: Mapping[str, Tensor | None] | None = None) -> bool:
        """True if these are the same tensors, with the same values; arguments as of `of`. Layers ask at every read."""
        fixed = fixed or {}
        for name, tensor in self.tensors.items():
            if tensor is not (fixed[name] if name in fixed else parameters[name]):
                return False
        for name, memory in self.memory.items():
            if memory._version != self.versions[name] or not memory.is_set_to(self.tensors[name]):  # type: ignore[arg-type]
                return False
        return True

    def checked(self, weight: str) -> Mapping[str, Tensor | None]:
        """The tensors, in the memory that they had.

        Raises:
            RuntimeError: one of them was written to after the read.
        """
        if not self._unchanged():
            raise RuntimeError(
                f"the bank of {weight} was modified in place between forward and backward, by an optimizer step perhaps: "
                "its gradient would be wrong; call backward() first"
            )
        return {**self.tensors, **self.memory}

    def _unchanged(self) -> bool:
        return all(p._version == self.versions[name] for name, p in self.memory.items())


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
