"""`Bases`: what a model's weights were when it was shared with `keep=True`. They never change, and nobody sends them.

They are neither parameters nor buffers: an optimizer, a state dict and every wrapper that broadcasts, shards or averages leaves
them out. Each process has them whole. A fingerprint of each travels instead, in a buffer of its bank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_ssn.sharing.start_values import check_starts

FINGERPRINT_BYTES = 16


class Bases:
    """The frozen values W₀ of a bank's weights, one tensor for each slot.

    Copies of a model, such as an average of its weights, have the same tensors: they are never written to.

    Args:
        tensors: in the order of the slots, each in its weight's shape, all of one dtype.
        fingerprints: of the tensors; None: they are computed, which reads each tensor once.
    """

    def __init__(self, tensors: Sequence[Tensor], fingerprints: Sequence[str] | None = None):
        self.tensors = tuple(tensor.detach() for tensor in tensors)
        self.fingerprints = tuple(map(fingerprint, self.tensors) if fingerprints is None else fingerprints)

    def __deepcopy__(self, memo: Any) -> Bases:
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.tensors[0].dtype

    def moved(self, fn: Callable[[Tensor], Tensor]) -> Bases:
        """The result of `model.to(...)` and the like."""
        tensors = [fn(tensor) for tensor in self.tensors]
        return Bases(tensors, self.fingerprints if tensors[0].dtype == self.dtype else None)

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
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=FINGERPRINT_BYTES)
    flat = tensor.detach().reshape(-1)
    for block in flat.split(2**24):  # so that a model on a GPU is never copied whole
        digest.update(block.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def as_rows(fingerprints: Iterable[str], device: torch.device, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Fingerprints as a tensor [n, 16] of their bytes.

    Args:
        fingerprints: see `fingerprint`.
        device: of the result.
        dtype: of the result.
    """
    rows = [list(bytes.fromhex(digest)) for digest in fingerprints]
    return torch.tensor(rows, dtype=dtype, device=device).view(-1, FINGERPRINT_BYTES)


def different(names: Sequence[str], mine: Sequence[str], rows: Tensor) -> list[str]:
    """Names of the tensors whose fingerprints differ.

    Args:
        names: of the tensors.
        mine: their fingerprints here.
        rows: their fingerprints elsewhere, by `as_rows`.
    """
    wanted = as_rows(mine, torch.device("cpu"), torch.float32)
    if wanted.shape != rows.shape:
        return list(names)
    equal = (wanted == rows.detach().float().cpu()).all(1).tolist()
    return [name for name, same in zip(names, equal, strict=True) if not same]


def frozen_beside(model: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen parameters of a model that was shared with `keep=True`: kept values outside of its banks; none for other models.

    Args:
        model: shared or dense, or a wrapper around it.
    """
    keeping = [module for module in model.modules() if isinstance(getattr(module, "bases", None), Bases)]
    banks = {id(p) for bank in keeping for p in bank.parameters(recurse=False)}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad and id(p) not in banks}
    return frozen if keeping else {}


def kept_values(model: nn.Module, beside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name → value of everything that a model keeps; none without `keep=True`.

    Args:
        model: see `frozen_beside`.
        beside: the values outside of its banks, whole.
    """
    found = dict(beside)
    for module in model.modules():
        if isinstance(bases := getattr(module, "bases", None), Bases):
            slots: Any = getattr(module, "group").slots  # noqa: B009 - a Bank, whose file imports this one
            found |= {slot.name: tensor for slot, tensor in zip(slots, bases.tensors, strict=True)}
    return found


def kept_fingerprints(model: nn.Module) -> dict[str, str]:
    """Name → fingerprint of each value that a model keeps, in its banks and beside them; none without `keep=True`."""
    found: dict[str, str] = {}
    for module in model.modules():
        if isinstance(bases := getattr(module, "bases", None), Bases):
            slots: Any = getattr(module, "group").slots  # noqa: B009 - a Bank, whose file imports this one
            found |= {slot.name: digest for slot, digest in zip(slots, bases.fingerprints, strict=True)}
    return found | {name: fingerprint(parameter) for name, parameter in frozen_beside(model).items()}


def sent_at_the_start(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers that rank 0 sends to all others before the first step: all but kept values."""
    check_starts(model)
    kept = {id(parameter) for parameter in frozen_beside(model).values()}
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in kept]
