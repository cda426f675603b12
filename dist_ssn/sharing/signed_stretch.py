"""A stretch of a bank times one factor per chunk, which is how a weight is made, and the gradient of that.

A bank that is shorter than the stretch is read again and again, in one of two ways:

- **Runs** are read straight from the bank. One ends at the bank's end, and there also at the borders of the chunk, so each reading
  of the bank takes some three calls. Each element passes the processor once.
- **A copy** holds the whole stretch. It takes a few calls in all, and each element passes twice.

Letters: n elements of the stretch, q = n / chunk (rounded up), B elements of the bank.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dist_ssn.sharing.morphs import Stretch

_LONG_RUN = {"cpu": 2**14}
"""Device → elements per run from which on runs are read. `multiply` of 262,144 elements, one thread of an AMD EPYC (2026-11-29), by
runs and by a copy: 4.85 and 0.09 ms with runs of 350 elements, 0.69 and 0.08 with 2,800, 0.16 and 0.08 with 13,800, 0.09 and 0.11
with 65,500."""
_LONG_RUN_ELSEWHERE = 2**20
"""On other devices a call costs more. Not measured yet."""


class SignedStretch:
    """The elements of a bank from one on, wrapping around at its end, in chunks with a factor each.

    Args:
        start: index of the first element in the bank.
        numel: n.
        chunk: elements with one factor; the last chunk may be shorter.
        bank: B.
    """

    def __init__(self, start: int, numel: int, chunk: int, bank: int):
        self.chunk, self._bank = chunk, bank
        self._stretch = Stretch(start, numel)

    def multiply(self, bank: Tensor, factor: Tensor, out: Tensor) -> None:
        """Writes the elements times their factors to `out`.

        Args:
            bank: [B] or [B, 1].
            factor: one entry per chunk, [q, 1].
            out: n elements, contiguous, of any shape.
        """
        source, runs = self._read(bank)
        for run in runs:
            torch.mul(run.of(source), run.of_chunks(factor), out=run.at(out))

    def add(self, bank: Tensor, factor: Tensor, out: Tensor) -> None:
        """Adds the elements times their factors to `out`; arguments as of `multiply`."""
        source, runs = self._read(bank)
        for run in runs:
            run.at(out).addcmul_(run.of(source), run.of_chunks(factor))

    def give(self, gradient: Tensor, factor: Tensor, total: Tensor) -> None:
        """Adds to the bank's gradient.

        Args:
            gradient: of what `multiply` writes, n elements, contiguous.
            factor: one entry per chunk, [q, 1].
            total: the bank's gradient, [B] or [B, 1].
        """
        if self._is_copied(total):
            product = torch.empty_like(gradient)
            for run in self._runs_of_a_copy:
                torch.mul(run.at(gradient), run.of_chunks(factor), out=run.at(product))
            self._stretch.give(total.view(-1), product.view(-1))
        else:
            for run in self._runs:
                run.of(total).addcmul_(run.at(gradient), run.of_chunks(factor))

    def _read(self, bank: Tensor) -> tuple[Tensor, list[_Run]]:
        """The bank or a copy of the stretch, and its runs. Both give the same weights, bit by bit."""
        if self._is_copied(bank):
            return self._stretch.take(bank.view(-1)), self._runs_of_a_copy
        return bank, self._runs

    def _is_copied(self, bank: Tensor) -> bool:
        length = self._stretch.length
        runs = 1 + 3 * ((self._stretch.start + length - 1) // self._bank)
        return runs > 1 and length < runs * _LONG_RUN.get(bank.device.type, _LONG_RUN_ELSEWHERE)

    @cached_property
    def _runs(self) -> list[_Run]:
        return _cut_runs(self._stretch.start, self._stretch.length, self.chunk, self._bank)

    @cached_property
    def _runs_of_a_copy(self) -> list[_Run]:
        return _cut_runs(0, self._stretch.length, self.chunk, self._stretch.length)


class _Run(NamedTuple):
    """Elements of a template that are contiguous in the bank: some whole chunks, or a part of one."""

    bank_start: int
    """Index of its first element in the bank."""
    weight_start: int
    """Index of its first element in the weight."""
    first: int
    """Its first chunk in the weight."""
    shape: tuple[int, int]
    """Number of chunks, and of elements in each."""
    stride: tuple[int, int]

    def of(self, bank: Tensor) -> Tensor:
        """Its elements of the bank [B], as [chunks, width]."""
        return bank.as_strided(self.shape, self.stride, bank.storage_offset() + self.bank_start)

    def at(self, weight: Tensor) -> Tensor:
        """Its elements of the contiguous weight [R, C], as [chunks, width]."""
        return weight.as_strided(self.shape, self.stride, weight.storage_offset() + self.weight_start)

    def of_chunks(self, factor: Tensor) -> Tensor:
        """The entries for its chunks, of factors with one entry per chunk [q, 1]."""
        return factor.narrow(0, self.first, self.shape[0])


def _cut_runs(bank_start: int, numel: int, chunk: int, bank: int) -> list[_Run]:
    """Runs of the `numel` elements from `bank_start` on, split at the bank's end, and there also at the borders of the chunk."""
    runs, weight_start = [], 0
    while weight_start < numel:
        length = min(bank - bank_start, numel - weight_start)
        to_border = -weight_start % chunk
        if to_border:
            length = min(length, to_border)
        elif length > chunk:
            length -= length % chunk
        width = min(chunk, length)
        runs.append(_Run(bank_start, weight_start, weight_start // chunk, (length // width, width), (width, 1)))
        bank_start, weight_start = (bank_start + length) % bank, weight_start + length
    return runs
