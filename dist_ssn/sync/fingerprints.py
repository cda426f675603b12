"""Sums of bits: a process notices by them that a tensor has changed, and workers that theirs differ."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sum(tensors: Iterable[Tensor]) -> int:
    """The tensors' elements as integers, summed modulo 2⁶⁴ and mixed; a change of a single element changes it."""
    total = 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
        total = mixed(total, int(flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64)))
    return total


def digest(anchor: int, others: Mapping[str, int]) -> int:
    """A number below 2⁶⁴ that stands for an anchor and for other parameters.

    Args:
        anchor: sum of its bits.
        others: name → a number below 2⁶⁴ that stands for its values.
    """
    total = anchor
    for name, value in others.items():
        total = mixed(mixed(total, zlib.crc32(name.encode())), value)
    return total


def mixed(total: int, further: int) -> int:
    """A number below 2⁶⁴ that depends on both and on their order."""
    return (31 * total + further) % 2**64


def halves(total: int) -> tuple[float, float]:
    """The lower and the upper 32 bits of a number below 2⁶⁴; float64 holds each."""
    return float(total % 2**32), float(total // 2**32)
