"""`Generator`: the `WeightSource` of a baseline, which generates weights by plain autograd from parameters of its own.

Baselines thus support everything that shared layers support: recurrent, attention and embedding layers, ties, no generated weight
kept for backward, and parameters of the root, which every engine trains like any others.

Letters: R rows, C columns of a weight as a matrix.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dist_ssn.errors import PlanError
from dist_ssn.model.specs import LayerSpec
from dist_ssn.sharing.weight_source import Values


class Generator(nn.Module):
    """Generates weight `index` of `weights` when it is called with the index.

    Args:
        control: the baseline's name; state dicts contain it with the seed.
        weights: all weights.
        seed: of initial values, and of everything pseudo-random.
    """

    def __init__(self, control: str, weights: Sequence[LayerSpec], seed: int):
        super().__init__()
        self.control, self.seed, self.weights = control, seed, tuple(weights)

    @abstractmethod
    def make(self, index: int, parameters: Mapping[str, Tensor | None]) -> Tensor:
        """The weight `index` [R, C] from these values of the parameters; differentiable."""

    @property
    def device(self) -> torch.device:
        """Device of all parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of all parameters."""
        return next(self.parameters()).dtype

    def at_hand(self, index: int) -> None:
        """None, because each weight is generated on demand."""

    def weight_name(self, index: int) -> str:
        """Full name of weight `index` in the model."""
        return self.weights[index].name

    def values(self) -> Values:
        """The current parameters, from which a weight can be generated again."""
        return Values.of(self._parameters)

    def forward(
        self,
        index: int,
        rows: Tensor | None = None,
        dtype: torch.dtype | None = None,
        values: Values | None = None,
    ) -> Tensor:
        """The weight in its shape, or only its `rows` [m] as [m, C]; see `Bank.forward`."""
        weight = self.weights[index]
        parameters = self._parameters if values is None else values.checked(weight.name)
        with torch.autocast(self.device.type, enabled=False):
            made = self.make(index, parameters)
            if weight.zero_row is not None:
                made = made * (torch.arange(weight.rows, device=made.device) != weight.zero_row).unsqueeze(1)
            made = made.view(weight.shape) if rows is None else made[rows]
            return made if dtype is None else made.to(dtype)

    def get_extra_state(self) -> Tensor:
        """Name and seed as bytes, because another baseline or seed would generate other weights from the same parameters."""
        return torch.frombuffer(bytearray(self._identity().encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Checks that a state dict belongs to this baseline and seed.

        Raises:
            PlanError: it does not.
        """
        found = bytes(state.cpu().round().to(torch.uint8).tolist()).decode(
            errors="replace"
        )  # a mean of states is a float
        if found != self._identity():
            raise PlanError(f"the state dict belongs to the control {found:.100}, this model's is {self._identity()}")

    def _identity(self) -> str:
        return json.dumps({"control": self.control, "seed": self.seed}, sort_keys=True)

    def extra_repr(self) -> str:
        """Name of the baseline, and its sizes."""
        parameters = sum(p.numel() for p in self.parameters())
        return f"{self.control}: {parameters} parameters for {sum(w.numel for w in self.weights)} elements"


def draw_for(seed: int, what: str) -> np.random.RandomState:
    """A random stream that depends only on the seed and a name, and that numpy keeps stable for ever."""
    digest = hashlib.sha256(f"control/{seed}/{what}".encode()).digest()
    return np.random.RandomState(int.from_bytes(digest[:4], "little"))


def normal(draw: np.random.RandomState, shape: tuple[int, ...], std: float) -> np.ndarray:
    """Normal values with a root mean square of exactly `std`."""
    values = draw.standard_normal(shape)
    return values * (std / np.sqrt(np.square(values).mean()) if values.size > 1 else std)
