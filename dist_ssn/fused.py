"""The fast path of "offset": few passes over a weight's n numbers, and a hand-written gradient.

`morphs.mix` and `finish` say what is computed; here the same is done with as few passes as eager torch allows, since reading
and writing n numbers is all that generation costs:

    W = Σ_k  scale · α_k · row_i · sign_k,ij · T_k,ij · column_j  +  U·V

Signs come in chunks, so the weight is a grid of chunks; a template is read in runs of whole chunks, and the chunk in which
it passes the bank's end in two parts. Where a row is a whole number of chunks, sign, coefficient, scale and row gain are one
factor per chunk.
Letters: R rows, C columns, n = R·C, K templates, q = n / chunk, B numbers in the bank.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .morphs import sign_start, sign_table, split_difference, split_gains
from .plan.types import Slot


def can_fuse(slot: Slot) -> bool:
    """Whether the weight is made by this file: whole chunks of the morph "offset"."""
    return slot.morph == "offset" and slot.numel % slot.chunk == 0 and slot.zero_row is None


def generate(slot: Slot, seed: int, bank: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """The weight in its shape, from a bank [B]: the value of `morphs.mix` and `finish`, without a graph."""
    row_gains, column_gains = split_gains(slot, own["gains"])
    total = bank.new_empty(slot.numel)
    for k in range(slot.templates):
        factor = _factor(slot, _signs(slot, seed, k, bank), row_gains, own["coefficients"], k)
        for run in _runs(slot, k, bank.numel()):
            if k == 0:
                torch.mul(run.of(bank), run.of_chunks(factor), out=run.at(total))
            else:
                run.at(total).addcmul_(run.of(bank), run.of_chunks(factor))
    weight = total.view(slot.rows, slot.columns)
    if row_gains is not None and not _rows_are_chunks(slot):
        weight.mul_(row_gains.unsqueeze(1))
    if column_gains is not None:
        weight.mul_(column_gains)
    if slot.rank:
        weight.addmm_(*split_difference(slot, own["differences"]))
    return weight.view(slot.shape)


def pull_back(
    slot: Slot, seed: int, bank: Tensor, own: Mapping[str, Tensor], gradient: Tensor, bank_sum: Tensor | None
) -> dict[str, Tensor]:
    """Adds the bank's gradient to `bank_sum` [B]; returns those of the slot's own numbers. `gradient` is the weight's."""
    gradient = gradient.reshape(slot.rows, slot.columns)
    row_gains, column_gains = split_gains(slot, own["gains"])
    parts: dict[str, Tensor] = {}
    if slot.rank:
        left, right = split_difference(slot, own["differences"])
        parts["differences"] = torch.cat([(gradient @ right.T).view(-1), (left.T @ gradient).view(-1)])
    inner = gradient if column_gains is None else gradient * column_gains
    if row_gains is not None and not _rows_are_chunks(slot):
        inner = inner * row_gains.unsqueeze(1)
    inner = inner.view(-1)
    row_part = None if row_gains is None else torch.zeros_like(row_gains)
    column_part = None if column_gains is None else torch.zeros_like(column_gains)
    coefficient_parts = []
    for k in range(slot.templates):
        signs = _signs(slot, seed, k, bank)
        if slot.gains or slot.coefficients:
            product = _signed(slot, k, signs, bank).mul_(gradient)  # d W / d (row · column), times the gradient
            over_rows = product.sum(1) if column_gains is None else product @ column_gains
            coefficient = own["coefficients"][k] if slot.coefficients else 1.0
            if row_part is not None:
                row_part += over_rows * coefficient * slot.scale
            if column_part is not None:
                over_columns = product.sum(0) if row_gains is None else row_gains @ product
                column_part += over_columns * coefficient * slot.scale
            if slot.coefficients:
                both = over_rows.sum() if row_gains is None else over_rows @ row_gains
                coefficient_parts.append(both * slot.scale)
        if bank_sum is not None:
            factor = _factor(slot, signs, row_gains, own["coefficients"], k)
            for run in _runs(slot, k, bank.numel()):
                run.of(bank_sum).addcmul_(run.at(inner), run.of_chunks(factor))
    if slot.gains:
        parts["gains"] = torch.cat([part for part in (row_part, column_part) if part is not None])
    if coefficient_parts:
        parts["coefficients"] = torch.stack(coefficient_parts)
    return parts


def _rows_are_chunks(slot: Slot) -> bool:
    return slot.columns % slot.chunk == 0


class _Run(NamedTuple):
    """Numbers of a template that lie in one piece in the bank: some whole chunks, or a part of one."""

    there: int
    """Where it begins in the bank."""
    here: int
    """Where it begins in the weight."""
    chunks: int
    width: int
    """Numbers of each chunk."""
    first: int
    """Its first chunk in the weight."""

    def of(self, bank: Tensor) -> Tensor:
        """Its numbers in the bank [B], [chunks, width]."""
        return bank.as_strided((self.chunks, self.width), (self.width, 1), bank.storage_offset() + self.there)

    def at(self, weight: Tensor) -> Tensor:
        """Its numbers in the weight [n], [chunks, width]."""
        return weight.as_strided((self.chunks, self.width), (self.width, 1), weight.storage_offset() + self.here)

    def of_chunks(self, factor: Tensor) -> Tensor:
        """Its chunks' part of what there is one of per chunk [q, 1]."""
        return factor[self.first : self.first + self.chunks]


def _runs(slot: Slot, k: int, bank: int) -> tuple[_Run, ...]:
    """Template k, cut where it passes the bank's end, and there at the borders of the chunk too."""
    return _cut((slot.start + k * slot.numel) % bank, slot.numel, slot.chunk, bank)


@functools.lru_cache(maxsize=4096)
def _cut(there: int, numel: int, chunk: int, bank: int) -> tuple[_Run, ...]:
    runs, here = [], 0
    while here < numel:
        length = min(bank - there, numel - here)
        to_border = -here % chunk
        if to_border:
            length = min(length, to_border)
        elif length > chunk:
            length -= length % chunk
        width = min(chunk, length)
        runs.append(_Run(there, here, length // width, width, here // chunk))
        there, here = (there + length) % bank, here + length
    return tuple(runs)


def _signs(slot: Slot, seed: int, k: int, bank: Tensor) -> Tensor:
    """The signs of template k, [q, 1]."""
    count = slot.numel // slot.chunk
    table = sign_table(seed, count + 1, bank.device, bank.dtype)
    return table.as_strided((count, 1), (1, 1), sign_start(seed, slot.name, k))


def _factor(slot: Slot, signs: Tensor, row_gains: Tensor | None, coefficients: Tensor, k: int) -> Tensor:
    """What each chunk of template k is multiplied by, [q, 1]: row gains too where a row is whole chunks."""
    scale: float | Tensor = slot.scale * coefficients[k] if slot.coefficients else slot.scale
    if row_gains is not None and _rows_are_chunks(slot):
        return (signs.view(slot.rows, -1) * (row_gains * scale).unsqueeze(1)).view(-1, 1)
    return signs * scale


def _signed(slot: Slot, k: int, signs: Tensor, bank: Tensor) -> Tensor:
    """Template k times its signs, [R, C]."""
    total = bank.new_empty(slot.numel)
    for run in _runs(slot, k, bank.numel()):
        torch.mul(run.of(bank), run.of_chunks(signs), out=run.at(total))
    return total.view(slot.rows, slot.columns)
