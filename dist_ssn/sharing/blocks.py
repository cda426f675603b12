"""`Block`: consecutive weights of an "offset" bank, generated at once, and their gradients reduced at once.

The weights are one stretch of the bank, repeated, times one factor per chunk (sign, scale, row gain), times the column gains. On a
GPU with triton, `kernels.py` does that; else a few operations for the whole block.

Letters: n elements in a block, q = n / chunk (rounded up), B elements in the bank.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_ssn.plan.slots import Slot
from dist_ssn.sharing.morphs import sign_start, sign_table
from dist_ssn.sharing.signed_stretch import SignedStretch
from dist_ssn.torch_private import multiply_each

_BLOCK = {"cpu": 2**18}
"""Device → elements of a block that holds more than one weight: on a processor, what its cache holds."""
_LARGE_BLOCK = 2**24
"""On other devices, few launches count more; it bounds what backward needs beside the gradients."""
_OLDEST = (8, 0)
"""Oldest compute capability for which the kernels have been compiled."""


def fits(slot: Slot) -> bool:
    """True if a slot's weight is a stretch of the bank times one factor per chunk, and gains."""
    return (
        slot.morph == "offset"
        and slot.templates == 1
        and not slot.coefficients
        and not slot.rank
        and slot.zero_row is None
        and slot.row_gains == slot.column_gains
    )


def kernels_on(device: torch.device) -> Any:
    """The module of the kernels where they run: on CUDA with triton, if DIST_SSN_KERNELS=1 asks for them; else None."""
    if device.type != "cuda" or os.environ.get("DIST_SSN_KERNELS") != "1" or importlib.util.find_spec("triton") is None:
        return None
    if torch.cuda.get_device_capability(device) < _OLDEST:
        return None
    from dist_ssn.sharing import kernels  # triton is not everywhere, and importing it takes a second

    return kernels


class Placed(NamedTuple):
    """A slot, its index in the bank, and the start of its gains in the bank's parameter `gains`."""

    index: int
    slot: Slot
    gains: int


class Given(NamedTuple):
    """The tensors that the weights of a bank are made of."""

    bank: Tensor
    """[B]."""
    all_scales: Tensor
    """[1 + slots], as in `BankValues`."""
    scales: tuple[Tensor, ...]
    """The scale of each slot."""
    gains: Tensor | None
    """All gains of the bank."""

    @staticmethod
    def of(bank: Tensor, scales: Tensor, gains: Tensor | None) -> Given:
        """The tensors of a bank [B] or [B, 1]; 16-bit values in float32."""
        dtype = torch.promote_types(bank.dtype, torch.float32)
        return Given(bank.to(dtype).view(-1), scales, scales[1:].unbind(), None if gains is None else gains.to(dtype))


class Block:
    """Slots of a bank whose weights are made at once.

    Args:
        slots: all with one chunk. Without kernels, each starts where the one before ends, and only the last may end inside a chunk.
        seed: of the plan.
        bank: number of elements in the bank.
        lowered: whether the weights are made in a lower precision under autocast.
        device: of the bank.
        kernels: see `kernels_on`.
    """

    def __init__(
        self, slots: Sequence[Placed], seed: int, bank: int, lowered: bool, device: torch.device, kernels: Any = None
    ):
        self.slots, self.seed, self.lowered = slots, seed, lowered
        self.chunk = slots[0].slot.chunk
        self.numel = sum(placed.slot.numel for placed in slots)
        self.parts: list[_Part] = []
        start = 0
        for placed in slots:
            self.parts.append(_Part(placed, start, sign_start(seed, placed.slot.name, 0)))
            start += placed.slot.numel
        self.with_gains = [part for part in self.parts if part.slot.row_gains]
        self.stretch = SignedStretch(slots[0].slot.start, self.numel, self.chunk, bank)
        self.kernels: Any = None
        if kernels is not None and max(placed.slot.numel for placed in slots) < 2**31:
            self.kernels = kernels.Kernels([part.place() for part in self.parts], bank, self.chunk, device)

    def dtype(self, usual: torch.dtype, lower: torch.dtype | None) -> torch.dtype:
        """Dtype of the weights: the usual one, or the one that autocast lowers to, where there is one."""
        return lower if lower is not None and self.lowered else usual

    def table(self, like: Tensor) -> Tensor:
        """The table of signs, in the dtype and on the device of `like`."""
        return sign_table(self.seed, max(part.chunks for part in self.parts) + 1, like.device, like.dtype)

    def signs(self, like: Tensor) -> Tensor:
        """The sign of each chunk [q, 1]."""
        table = self.table(like)
        return torch.cat([table[part.sign : part.sign + part.chunks] for part in self.parts]).unsqueeze(1)

    def factor(self, signs: Tensor, given: Given) -> Tensor:
        """Factor of each chunk [q, 1]: sign, scale, and the row gain where a row is a whole number of chunks.

        Args:
            signs: see `signs`.
            given: what the weights are made of.
        """
        factor = signs.clone()
        views = [part.per_row(factor) for part in self.parts]
        multiply_each(views, [given.scales[part.index] for part in self.parts])
        if (gains := given.gains) is not None and (rows := [p for p in self.with_gains if p.rows_are_chunks]):
            multiply_each([part.per_row(factor) for part in rows], [part.row_gains(gains) for part in rows])
        return factor

    def apply_gains(self, values: Tensor, gains: Tensor | None) -> None:
        """Multiplies `values` [n] by the column gains, and by the row gains that are not in the factor, in place."""
        if gains is None or not self.with_gains:
            return
        multiply_each(
            [part.matrix(values) for part in self.with_gains], [part.column_gains(gains) for part in self.with_gains]
        )
        if rows := [part for part in self.with_gains if not part.rows_are_chunks]:
            multiply_each([part.matrix(values) for part in rows], [part.row_gains(gains) for part in rows])

    def generate(self, given: Given, out: Tensor) -> None:
        """Writes the block's weights to `out` [n]; a lower dtype than the bank's is rounded to once, at the end."""
        if self.kernels is not None:
            self.kernels.generate(given.bank, self.table(given.bank), given.all_scales[1:], given.gains, out)
            return
        values = out if out.dtype == given.bank.dtype else given.bank.new_empty(self.numel)
        self.stretch.multiply(given.bank, self.factor(self.signs(given.bank), given), values)
        self.apply_gains(values, given.gains)
        if values is not out:
            out.copy_(values)

    def pull_back(self, gradient: Tensor, given: Given, bank_sum: Tensor | None, gains_sum: Tensor | None) -> None:
        """Adds to the gradients of the bank and of the gains.

        Args:
            gradient: of the block's weights [n]; is overwritten.
            given: what the weights are made of.
            bank_sum: gradient of the bank; None if it needs none.
            gains_sum: gradient of all gains; None if they need none.
        """
        bank, gains = given.bank, given.gains
        if self.kernels is not None:
            scales = given.all_scales[1:]
            self.kernels.pull_back(gradient, bank, self.table(bank), scales, gains, bank_sum, gains_sum)
            return
        gradient, signs = gradient.to(bank.dtype), self.signs(bank)
        if gains is not None and gains_sum is not None and self.with_gains:
            product = torch.empty_like(gradient)
            self.stretch.multiply(bank, signs, product)
            product.mul_(gradient)
            for part in self.with_gains:
                matrix, scale = part.matrix(product), given.scales[part.index]
                part.row_gains(gains_sum).view(-1).addmv_(matrix, part.column_gains(gains) * scale)
                part.column_gains(gains_sum).addmv_(matrix.T, part.row_gains(gains).view(-1) * scale)
        if bank_sum is None:
            return
        self.apply_gains(gradient, gains)
        self.stretch.give(gradient, self.factor(signs, given), bank_sum)


class _Part:
    """Place of one slot in its block: views of the block's arrays."""

    def __init__(self, placed: Placed, start: int, sign: int):
        self.index, self.slot, self.gains = placed
        self.start, self.sign = start, sign
        slot = self.slot
        self.chunks = -(-slot.numel // slot.chunk)
        self.rows_are_chunks = slot.columns % slot.chunk == 0

    def place(self) -> tuple[int, ...]:
        """A `kernels.Place`."""
        slot, gains = self.slot, self.gains if self.slot.row_gains else -1
        return self.start, slot.rows, slot.columns, slot.start, self.sign, self.index, gains

    def per_row(self, factor: Tensor) -> Tensor:
        """The slot's factors [R, chunks in a row], or [chunks, 1] if a row is not a whole number of chunks."""
        shape = (self.slot.rows, self.chunks // self.slot.rows) if self.rows_are_chunks else (self.chunks, 1)
        return factor.as_strided(shape, (shape[1], 1), self.start // self.slot.chunk)

    def matrix(self, values: Tensor) -> Tensor:
        """The slot's elements of `values` [n] as [R, C]."""
        slot = self.slot
        return values.as_strided((slot.rows, slot.columns), (slot.columns, 1), values.storage_offset() + self.start)

    def row_gains(self, gains: Tensor) -> Tensor:
        """[R, 1]."""
        return gains.as_strided((self.slot.rows, 1), (1, 1), gains.storage_offset() + self.gains)

    def column_gains(self, gains: Tensor) -> Tensor:
        """[C]."""
        return gains.as_strided((self.slot.columns,), (1,), gains.storage_offset() + self.gains + self.slot.rows)


def make_blocks(
    slots: Sequence[Placed], seed: int, bank: int, lowered: Collection[int], device: torch.device
) -> list[Block]:
    """Cuts slots into blocks.

    Args:
        slots: in the plan's order; all of them `fits`.
        seed: of the plan.
        bank: number of elements in the bank.
        lowered: indices of the slots whose weights are made in a lower precision under autocast.
        device: of the bank.
    """
    blocks: list[list[Placed]] = []
    size, end, most, kernels = 0, -1, _BLOCK.get(device.type, _LARGE_BLOCK), kernels_on(device)
    for placed in slots:
        slot = placed.slot
        follows = kernels is not None or (slot.start == end and size % slot.chunk == 0)
        alike = blocks and (slot.chunk, placed.index in lowered) == (
            blocks[-1][0].slot.chunk,
            blocks[-1][0].index in lowered,
        )
        if not alike or not follows or size + slot.numel > most:
            blocks.append([])
            size = 0
        blocks[-1].append(placed)
        size, end = size + slot.numel, (slot.start + slot.numel) % bank
    return [Block(block, seed, bank, block[0].index in lowered, device, kernels) for block in blocks]
