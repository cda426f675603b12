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
"""Device → elements per run from which on runs are quicker. On one thread of an AMD EPYC (2026-11-29) a copy took a tenth of the
time with runs of 2,700 elements, half of it with 14,000, and as long with 26,000."""
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
        if self._is_copied(bank):
            self._by_chunk(self._stretch.take(bank.view(-1)), factor, out)
        else:
            for run in self._runs:
                torch.mul(run.of(bank), run.of_chunks(factor), out=run.at(out))

    def add(self, bank: Tensor, factor: Tensor, out: Tensor) -> None:
        """Adds the elements times their factors to `out`; arguments as of `multiply`."""
        if self._is_copied(bank):
            product = self._stretch.take(bank.view(-1))
            out.view(-1).add_(self._by_chunk(product, factor, torch.empty_like(product)))
        else:
            for run in self._runs:
                run.at(out).addcmul_(run.of(bank), run.of_chunks(factor))

    def give(self, gradient: Tensor, factor: Tensor, total: Tensor) -> None:
        """Adds to the bank's gradient.

        Args:
            gradient: of what `multiply` writes, n elements, contiguous.
            factor: one entry per chunk, [q, 1].
            total: the bank's gradient, [B] or [B, 1].
        """
        if self._is_copied(total):
            self._stretch.give(total.view(-1), self._by_chunk(gradient.view(-1), factor, torch.empty_like(gradient)))
        else:
            for run in self._runs:
                run.of(total).addcmul_(run.at(gradient), run.of_chunks(factor))

    def _is_copied(self, bank: Tensor) -> bool:
        length = self._stretch.length
        runs = 1 + 3 * ((self._stretch.start + length - 1) // self._bank)
        return runs > 1 and length < runs * _LONG_RUN.get(bank.device.type, _LONG_RUN_ELSEWHERE)

    def _by_chunk(self, values: Tensor, factor: Tensor, out: Tensor) -> Tensor:
        """`values` [n] times the factors of their chunks, in `out`; returns `out` as [n]."""
        out, whole = out.view(-1), self._stretch.length // self.chunk
        inside = whole * self.chunk
        torch.mul(values[:inside].view(whole, self.chunk), factor[:whole], out=out[:inside].view(whole, self.chunk))
        if inside < self._stretch.length:
            torch.mul(values[inside:], factor[whole], out=out[inside:])
        return out

    @cached_property
    def _runs(self) -> list[_Run]:
        return _cut_runs(self._stretch.start, self._stretch.length, self.chunk, self._bank)


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
