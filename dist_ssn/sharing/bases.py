"""`Bases`: what a model's weights were when it was shared with `keep=True`. They never change, and nobody sends them.

They are neither parameters nor buffers: an optimizer, a state dict and every wrapper that broadcasts, shards or averages leaves them
out. Each process has them whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Bases:
    """The frozen values W₀ of a bank's weights, one tensor for each slot.

    Copies of a model, such as an average of its weights, have the same tensors: they are never written to.

    Args:
        tensors: in the order of the slots, each in its weight's shape.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = tuple(tensor.detach() for tensor in tensors)

    def __deepcopy__(self, memo: Any) -> Bases:
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.tensors[0].dtype

    def moved(self, fn: Callable[[Tensor], Tensor]) -> Bases:
        """The result of `model.to(...)` and the like."""
        return Bases([fn(tensor) for tensor in self.tensors])

    def add(self, index: int, difference: Tensor, rows: Tensor | None, dtype: torch.dtype | None) -> Tensor:
        """The weight: W₀ and a difference.

        Args:
            index: of the slot.
            difference: in the weight's shape, or its `rows` [m, C].
            rows: indices of the rows that are wanted [m]; None: all.
            dtype: of the result; None: that of W₀.
        """
        base = self.tensors[index]
        if rows is not None:
            base = base.reshape(base.shape[0], -1)[rows]
        return (difference + base).to(dtype or base.dtype)


def fingerprint(tensor: Tensor) -> str:
    """Hex digest of a tensor's dtype, shape and bytes: 16 bytes, equal on every machine."""
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    flat = tensor.detach().reshape(-1)
    for block in flat.split(2**24):  # so that a model on a GPU is never copied whole
        digest.update(memoryview(block.cpu().contiguous().view(torch.uint8).numpy()))
    return digest.hexdigest()
