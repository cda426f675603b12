"""`Block`: consecutive weights of an "offset" bank, generated at once, and their gradients reduced at once.

The weights are one stretch of the bank, repeated, times one factor per chunk (sign, scale, row gain), times the column gains. On a
GPU with triton, `kernels.py` does that; else a few operations for the whole block.

Letters: n elements in a block, q = n / chunk (rounded up), B elements in the bank.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection, Sequence
from itertools import compress
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
    scales: Tensor
    """[1 + slots], as in `BankValues`."""
    gains: Tensor | None
    """All gains of the bank."""
    views: dict[Block, Views]
    """Views of scales and gains, which are the same from step to step; the caller keeps them."""

    @staticmethod
    def of(bank: Tensor, scales: Tensor, gains: Tensor | None, views: dict[Block, Views] | None = None) -> Given:
        """The tensors of a bank [B] or [B, 1]; 16-bit values in float32."""
        dtype = torch.promote_types(bank.dtype, torch.float32)
        gains = None if gains is None else gains.to(dtype)
        return Given(bank.to(dtype).view(-1), scales, gains, {} if views is None else views)


class Views(NamedTuple):
    """Views of a bank's scales and gains, for the parts of a block."""

    of: tuple[Tensor, Tensor | None]
    """The scales and gains."""
    scales: list[Tensor]
    """Of all parts."""
    rows: list[Tensor]
    """Row gains [R, 1] of the parts with gains."""
    columns: list[Tensor]
    """Column gains [C] of the parts with gains."""

    def suit(self, given: Given) -> bool:
        """True if the tensors are in the memory of the views."""
        scales, gains = self.of
        same = gains is given.gains if gains is None or given.gains is None else gains.is_set_to(given.gains)
        return same and scales.is_set_to(given.scales)


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
        self._rows_are_chunks = [part.rows_are_chunks for part in self.with_gains]
        self._signs: tuple[Tensor, list[Tensor]] | None = None
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
        table, found = self.table(like), self._signs
        if found is None or found[0] is not table:
            found = self._signs = table, [table[part.sign : part.sign + part.chunks] for part in self.parts]
        return torch.cat(found[1]).unsqueeze(1)

    def views(self, given: Given) -> Views:
        """Views of scales and gains, of this step or of an earlier one."""
        found = given.views.get(self)
        if found is None or not found.suit(given):
            scales, gains = given.scales.detach(), None if given.gains is None else given.gains.detach()
            rows = [] if gains is None else [part.row_gains(gains) for part in self.with_gains]
            columns = [] if gains is None else [part.column_gains(gains) for part in self.with_gains]
            own = [scales[1 + part.index] for part in self.parts]
            found = given.views[self] = Views((scales, gains), own, rows, columns)
        return found

    def factor(self, signs: Tensor, views: Views) -> Tensor:
        """Factor of each chunk [q, 1]: sign, scale, and the row gain where a row is a whole number of chunks.

        Args:
            signs: see `signs`.
            views: see `views`.
        """
        factor = signs.clone()
        multiply_each([part.per_row(factor) for part in self.parts], views.scales)
        if views.rows and any(self._rows_are_chunks):
            parts = compress(self.with_gains, self._rows_are_chunks)
            multiply_each([part.per_row(factor) for part in parts], [*compress(views.rows, self._rows_are_chunks)])
        return factor

    def apply_gains(self, values: Tensor, views: Views) -> None:
        """Multiplies `values` [n] by the column gains, and by the row gains that are not in the factor, in place."""
        if not views.rows:
            return
        matrices = [part.matrix(values) for part in self.with_gains]
        multiply_each(matrices, views.columns)
        if not all(self._rows_are_chunks):
            others = [not whole for whole in self._rows_are_chunks]
            multiply_each([*compress(matrices, others)], [*compress(views.rows, others)])

    def generate(self, given: Given, out: Tensor) -> None:
        """Writes the block's weights to `out` [n]; a lower dtype than the bank's is rounded to once, at the end."""
        if self.kernels is not None:
            self.kernels.generate(given.bank, self.table(given.bank), given.scales[1:], given.gains, out)
            return
        values, views = out if out.dtype == given.bank.dtype else given.bank.new_empty(self.numel), self.views(given)
        self.stretch.multiply(given.bank, self.factor(self.signs(given.bank), views), values)
        self.apply_gains(values, views)
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
            scales = given.scales[1:]
            self.kernels.pull_back(gradient, bank, self.table(bank), scales, gains, bank_sum, gains_sum)
            return
        gradient, signs, views = gradient.to(bank.dtype), self.signs(bank), self.views(given)
        if gains_sum is not None and views.rows:
            product = torch.empty_like(gradient)
            self.stretch.multiply(bank, signs, product)
            product.mul_(gradient)
            for part, rows, columns in zip(self.with_gains, views.rows, views.columns, strict=True):
                matrix, scale = part.matrix(product), given.scales[1 + part.index]
                part.row_gains(gains_sum).view(-1).addmv_(matrix, columns * scale)
                part.column_gains(gains_sum).addmv_(matrix.T, rows.view(-1) * scale)
        if bank_sum is None:
            return
        self.apply_gains(gradient, views)
        self.stretch.give(gradient, self.factor(signs, views), bank_sum)


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
