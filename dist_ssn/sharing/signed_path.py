"""The fast path of "offset": few passes over a weight's n elements, and a hand-written gradient.

It computes the same as `morphs.mix` and `finish`, with as few passes as eager torch allows, because reading and writing n elements
is the whole cost of generation:

    W = Σ_k  scale · α_k · row_i · sign_k,ij · T_k,ij · column_j  +  U·V

Signs are constant within a chunk, so the weight is a grid of chunks (`signed_stretch.py`). If a row is a whole number of chunks,
then sign, coefficient, scale and row gain are one factor per chunk.

Letters: R rows, C columns, n = R·C, K templates, q = n / chunk, B elements in the bank. A bank is read by strides: [B] or [B, 1].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_ssn.plan.slots import Slot
from dist_ssn.sharing.morphs import sign_start, sign_table, split_difference, split_gains
from dist_ssn.sharing.signed_stretch import SignedStretch


def fast_path(slot: Slot, seed: int, bank: int) -> SignedPath | None:
    """The fast path of a weight in a bank of `bank` elements; None unless its morph is "offset" with whole chunks."""
    fits = slot.morph == "offset" and slot.numel % slot.chunk == 0 and slot.zero_row is None
    return SignedPath(slot, seed, bank) if fits else None


class SignedPath:
    """One weight's fast path; everything that does not change between steps is computed once, when it is made."""

    def __init__(self, slot: Slot, seed: int, bank: int):
        self.slot, self.seed = slot, seed
        self.rows, self.columns = slot.rows, slot.columns
        self.chunks = slot.numel // slot.chunk
        self.rows_are_chunks = slot.columns % slot.chunk == 0
        self.starts = [sign_start(seed, slot.name, k) for k in range(slot.templates)]
        self.stretches = [
            SignedStretch((slot.start + k * slot.numel) % bank, slot.numel, slot.chunk, bank)
            for k in range(slot.templates)
        ]

    def generate(self, bank: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """The weight in its shape, from a bank [B] and the slot's `own` tensors: as `morphs.mix` and `finish`, without a graph."""
        row_gains, column_gains = split_gains(self.slot, own["gains"])
        weight = bank.new_empty(self.rows, self.columns)
        for k, stretch in enumerate(self.stretches):
            write = stretch.multiply if k == 0 else stretch.add
            write(bank, self._factor(k, bank, row_gains, own), weight)
        if row_gains is not None and not self.rows_are_chunks:
            weight.mul_(row_gains.unsqueeze(1))
        if column_gains is not None:
            weight.mul_(column_gains)
        if self.slot.rank:
            weight.addmm_(*split_difference(self.slot, own["differences"]))
        return weight.view(self.slot.shape)

    def pull_back(
        self,
        gradient: Tensor,
        bank: Tensor,
        own: Mapping[str, Tensor],
        bank_sum: Tensor | None,
        own_sums: Mapping[str, Tensor],
    ) -> None:
        """Adds to the gradients of the bank and of the slot's own parameters.

        Args:
            gradient: the weight's.
            bank: [B].
            own: values of the slot's own parameters, and its scale.
            bank_sum: the bank's gradient [B]; None if it is not needed.
            own_sums: the gradients of the slot's own parameters, of those that are needed.
        """
        slot, gradient = self.slot, gradient.reshape(self.rows, self.columns)
        row_gains, column_gains = split_gains(slot, own["gains"])
        if "differences" in own_sums:
            left, right = split_difference(slot, own["differences"])
            left_sum, right_sum = split_difference(slot, own_sums["differences"])
            left_sum.addmm_(gradient, right.T)
            right_sum.addmm_(left.T, gradient)
        work = bank.new_empty(self.rows, self.columns)
        if "gains" in own_sums or "coefficients" in own_sums:
            self._pull_back_factors(gradient, bank, own, own_sums, work)
        if bank_sum is None:
            return
        inner = work.copy_(gradient) if column_gains is None else torch.mul(gradient, column_gains, out=work)
        if row_gains is not None and not self.rows_are_chunks:
            inner.mul_(row_gains.unsqueeze(1))
        for k, stretch in enumerate(self.stretches):
            stretch.give(inner, self._factor(k, bank, row_gains, own), bank_sum)

    def _pull_back_factors(
        self, gradient: Tensor, bank: Tensor, own: Mapping[str, Tensor], sums: Mapping[str, Tensor], work: Tensor
    ) -> None:
        """Adds to the gradients of gains and coefficients; overwrites `work` [R, C]."""
        slot, scale = self.slot, own["scale"]
        row_gains, column_gains = split_gains(slot, own["gains"])
        row_sum, column_sum = split_gains(slot, sums["gains"]) if "gains" in sums else (None, None)
        rows = bank.new_ones(self.rows) if row_gains is None else row_gains
        columns = bank.new_ones(self.columns) if column_gains is None else column_gains
        for k in range(slot.templates):
            product = self._signed(k, bank, work).mul_(
                gradient
            )  # d W / d (scale · α · row · column), times the gradient
            if slot.coefficients:
                coefficient = own["coefficients"][k]
                if "coefficients" in sums:
                    sums["coefficients"][k].add_((rows @ product @ columns) * scale)
                product.mul_(coefficient)
            if row_sum is not None:
                row_sum.addmv_(product, columns * scale)
            if column_sum is not None:
                column_sum.addmv_(product.T, rows * scale)

    def _factor(self, k: int, bank: Tensor, row_gains: Tensor | None, own: Mapping[str, Tensor]) -> Tensor:
        """Factor of each chunk of template k, [q, 1]; it includes the row gains if a row is a whole number of chunks."""
        scale = own["scale"] * own["coefficients"][k] if self.slot.coefficients else own["scale"]
        if row_gains is None or not self.rows_are_chunks:
            return self._signs(k, bank, self.chunks, 1) * scale
        signs = self._signs(k, bank, self.rows, self.chunks // self.rows)
        return (signs * (row_gains * scale).unsqueeze(1)).view(-1, 1)

    def _signs(self, k: int, bank: Tensor, *shape: int) -> Tensor:
        """The signs of template k, one per chunk, in a matrix."""
        table = sign_table(self.seed, self.chunks + 1, bank.device, bank.dtype)
        return table.as_strided(shape, (shape[1], 1), self.starts[k])

    def _signed(self, k: int, bank: Tensor, work: Tensor) -> Tensor:
        """Template k times its signs, in `work` [R, C]."""
        self.stretches[k].multiply(bank, self._signs(k, bank, self.chunks, 1), work)
        return work
