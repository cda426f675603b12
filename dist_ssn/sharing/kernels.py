"""Triton kernels of "per_step": a block's weights in one launch, the gradients of bank, row gains and column gains in one each.

The bank is cut into tiles, and a list has an entry for every time that a weight reads a tile. So the kernels of weights and of the
bank's gradient need no remainder where the bank wraps around, no search and no atomics. Forward runs a program per entry. Backward
runs one per tile, which adds the tile's entries in the list's order. Gradients are the same in every run: autotuning chooses
only the number of warps, and only where that leaves the order of every sum as it is.

`blocks.Block` does the same by plain operations: it is the fallback, and the tests' oracle. Sums are in float32, or in float64 for
such a bank, whatever the dtypes of weights and gradient.

This file is imported only if triton is there. Weights have less than 2³¹ elements.

Letters: n elements in the block, B in the bank, R rows and C columns of a weight.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

TILE = 1024
"""Elements of the bank in a tile, and of a row that a program reads at once."""
COLUMNS = 64
"""Columns of a program of the column gains."""
_TILE, _ROWS, _COLUMNS = constexpr(TILE), constexpr(16), constexpr(COLUMNS)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_CONFIGS = [triton.Config({}, num_warps=warps) for warps in ((4,) if _INTERPRETED else (2, 4, 8))]


class Place(NamedTuple):
    """One weight, as the kernels read it from a table; all fields in elements."""

    start: int
    """Its begin in the block."""
    rows: int
    columns: int
    bank_start: int
    """The begin of its reading of the bank."""
    sign: int
    """The begin of its reading of the table of signs."""
    scale: int
    """Index of its scale."""
    gains: int
    """The begin of its row gains, which its column gains follow; -1 without gains."""


_FIELDS = constexpr(len(Place._fields))


@triton.jit
def _factor(i, mask, place, signs, scales, gains, CHUNK: constexpr, GAINS: constexpr, SUM: constexpr):
    """Sign, scale and gains of the elements `i` of the weight whose fields are at `place`."""
    factor = tl.load(signs + tl.load(place + 4) + i // CHUNK, mask=mask, other=0.0).to(SUM)
    factor *= tl.load(scales + tl.load(place + 5)).to(SUM)
    if GAINS:
        rows, columns, first = tl.load(place + 1).to(tl.int32), tl.load(place + 2).to(tl.int32), tl.load(place + 6)
        mask = mask & (first + 0 * i >= 0)
        row = i // columns
        factor *= tl.load(gains + first + row, mask=mask, other=1.0).to(SUM)
        factor *= tl.load(gains + first + rows + i - row * columns, mask=mask, other=1.0).to(SUM)
    return factor


@triton.jit
def _wrapped(at, size, SMALL: constexpr):
    """Places of a bank that begin inside of it; they wrap around once, or more often in a bank smaller than a program's reads."""
    return at % size if SMALL else tl.where(at >= size, at - size, at)


@triton.autotune(configs=_CONFIGS, key=["CHUNK", "GAINS"])
@triton.jit
def _generate(
    out, bank, signs, scales, gains, places, entries, size, CHUNK: constexpr, GAINS: constexpr, SUM: constexpr
):
    """Writes what one entry's weight reads of its tile to `out` [n]."""
    entry = entries + 3 * tl.program_id(0)
    place = places + tl.load(entry) * _FIELDS
    element = tl.arange(0, _TILE)
    at = tl.load(entry + 1) * _TILE + element
    i = tl.load(entry + 2).to(tl.int32) + element
    numel = tl.load(place + 1) * tl.load(place + 2)
    mask = (at < size) & (i >= 0) & (i < numel)
    value = tl.load(bank + at, mask=mask, other=0.0).to(SUM)
    value *= _factor(i, mask, place, signs, scales, gains, CHUNK, GAINS, SUM)
    tl.store(out + tl.load(place) + i, value.to(out.dtype.element_ty), mask=mask)


@triton.autotune(configs=_CONFIGS, key=["CHUNK", "GAINS"], restore_value=["bank_sum"])
@triton.jit
def _pull_back(
    bank_sum,
    grad,
    signs,
    scales,
    gains,
    places,
    entries,
    firsts,
    size,
    CHUNK: constexpr,
    GAINS: constexpr,
    SUM: constexpr,
):
    """Adds the gradients of all that read one tile of the bank to `bank_sum` [B]."""
    tile = tl.program_id(0)
    element = tl.arange(0, _TILE)
    at = tile.to(tl.int64) * _TILE + element
    total = tl.load(bank_sum + at, mask=at < size, other=0.0)
    for entry in range(tl.load(firsts + tile), tl.load(firsts + tile + 1)):
        place = places + tl.load(entries + 3 * entry) * _FIELDS
        i = tl.load(entries + 3 * entry + 2).to(tl.int32) + element
        numel = tl.load(place + 1) * tl.load(place + 2)
        mask = (at < size) & (i >= 0) & (i < numel)
        value = tl.load(grad + tl.load(place) + i, mask=mask, other=0.0).to(SUM)
        total += value * _factor(i, mask, place, signs, scales, gains, CHUNK, GAINS, SUM)
    tl.store(bank_sum + at, total, mask=at < size)


@triton.jit
def _row_gains(
    gains_sum, grad, bank, signs, scales, gains, places, lines, size, SMALL: constexpr, CHUNK: constexpr, SUM: constexpr
):
    """Adds the gradient of one row's gain: a sum over its columns."""
    line = lines + 2 * tl.program_id(0)
    place, row = places + tl.load(line) * _FIELDS, tl.load(line + 1)
    rows, columns, first = tl.load(place + 1), tl.load(place + 2), tl.load(place + 6)
    total = tl.zeros([_TILE], SUM)
    for start in range(0, columns, _TILE):
        column = start + tl.arange(0, _TILE)
        mask = column < columns
        i = row * columns + column
        begin = (tl.load(place + 3) + row * columns + start) % size
        at = _wrapped(begin + tl.arange(0, _TILE), size, SMALL)
        value = tl.load(grad + tl.load(place) + i, mask=mask, other=0.0).to(SUM)
        value *= tl.load(bank + at, mask=mask, other=0.0).to(SUM)
        value *= tl.load(signs + tl.load(place + 4) + i // CHUNK, mask=mask, other=0.0).to(SUM)
        total += value * tl.load(gains + first + rows + column, mask=mask, other=0.0).to(SUM)
    gain = gains_sum + first + row
    tl.store(gain, tl.load(gain) + tl.sum(total, 0) * tl.load(scales + tl.load(place + 5)).to(SUM))


@triton.jit
def _column_gains(
    gains_sum, grad, bank, signs, scales, gains, places, lines, size, SMALL: constexpr, CHUNK: constexpr, SUM: constexpr
):
    """Adds the gradients of some column gains of one weight: sums over its rows."""
    line = lines + 2 * tl.program_id(0)
    place = places + tl.load(line) * _FIELDS
    rows, columns, first = tl.load(place + 1), tl.load(place + 2), tl.load(place + 6)
    column = tl.load(line + 1) + tl.arange(0, _COLUMNS)
    total = tl.zeros([_ROWS, _COLUMNS], SUM)
    for start in range(0, rows, _ROWS):
        row = start + tl.arange(0, _ROWS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        i = row[:, None] * columns + column[None, :]
        begin = (tl.load(place + 3) + row * columns + tl.load(line + 1)) % size
        at = _wrapped(begin[:, None] + tl.arange(0, _COLUMNS)[None, :], size, SMALL)
        value = tl.load(grad + tl.load(place) + i, mask=mask, other=0.0).to(SUM)
        value *= tl.load(bank + at, mask=mask, other=0.0).to(SUM)
        value *= tl.load(signs + tl.load(place + 4) + i // CHUNK, mask=mask, other=0.0).to(SUM)
        total += value * tl.load(gains + first + row, mask=row < rows, other=0.0).to(SUM)[:, None]
    gain = gains_sum + first + rows + column
    added = tl.sum(total, 0) * tl.load(scales + tl.load(place + 5)).to(SUM)
    tl.store(gain, tl.load(gain, mask=column < columns, other=0.0) + added, mask=column < columns)


def entries_of(places: Sequence[Place], bank: int, tile: int = TILE) -> tuple[np.ndarray, np.ndarray]:
    """The list of reads, in the order of the tiles, and of the elements of the block.

    Args:
        places: of the weights.
        bank: number of elements in the bank.
        tile: elements of a tile.

    Returns:
        One row [weight, tile, element of the weight at the tile's begin] per entry, and the first entry of each tile [tiles + 1].
        That element is negative where the weight begins inside of the tile.
    """
    numel = np.array([place.rows * place.columns for place in places])
    start = np.array([place.bank_start for place in places])
    weight, turn = _counted(-(-(start + numel) // bank))  # how often it comes to the bank's end
    low = np.where(turn == 0, start[weight], 0)
    high = np.minimum(start[weight] + numel[weight] - turn * bank, bank)
    read, further = _counted((high - 1) // tile - low // tile + 1)
    at = low[read] // tile + further
    entries = np.stack([weight[read], at, turn[read] * bank + at * tile - start[weight[read]]], 1)
    order = np.argsort(at, kind="stable")
    return entries[order], np.searchsorted(at[order], np.arange(-(-bank // tile) + 1))


def _counted(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts [k]: each index, as often as its count says, and the number of the repetition."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)


class Kernels:
    """The kernels of one block, with their tables on the block's device.

    Args:
        places: a `Place` for each of the block's weights.
        bank: number of elements in the bank.
        chunk: number of consecutive elements that have one sign.
        device: of the bank.
    """

    def __init__(self, places: Sequence[tuple[int, ...]], bank: int, chunk: int, device: torch.device):
        def there(table: Any) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(table, dtype=np.int64)).to(device)

        named = [Place(*place) for place in places]
        entries, firsts = entries_of(named, bank)
        self.bank, self.chunk, self.tiles = bank, chunk, len(firsts) - 1
        self.places, self.entries, self.firsts = there(places), there(entries), there(firsts)
        with_gains = [(index, place) for index, place in enumerate(named) if place.gains >= 0]
        self.with_gains = bool(with_gains)
        self.rows = there([(index, row) for index, place in with_gains for row in range(place.rows)])
        self.columns = there([(index, at) for index, place in with_gains for at in range(0, place.columns, COLUMNS)])

    def generate(self, bank: Tensor, signs: Tensor, scales: Tensor, gains: Tensor | None, out: Tensor) -> None:
        """Writes the block's weights.

        Args:
            bank: [B].
            signs: the table of signs.
            scales: of all slots, float32.
            gains: all gains of the bank.
            out: [n], in any dtype.
        """
        given = (*self._given(signs, scales, gains), self.entries, self.bank)
        with _on(out):
            _generate[(len(self.entries),)](out, bank, *given, **self._constants(bank, gains))

    def pull_back(
        self,
        gradient: Tensor,
        bank: Tensor,
        signs: Tensor,
        scales: Tensor,
        gains: Tensor | None,
        bank_sum: Tensor | None,
        gains_sum: Tensor | None,
    ) -> None:
        """Adds to the gradients of the bank and of the gains.

        Args:
            gradient: of the block's weights [n], in any dtype.
            bank: [B].
            signs: see `generate`.
            scales: see `generate`.
            gains: all gains of the bank.
            bank_sum: gradient of the bank, in the dtype of sums; None if it needs none.
            gains_sum: gradient of all gains, in the dtype of sums; None if they need none.
        """
        given, constants = self._given(signs, scales, gains), self._constants(bank, gains)
        with _on(gradient):
            if bank_sum is not None:
                lists = (self.entries, self.firsts, self.bank)
                _pull_back[(self.tiles,)](bank_sum, gradient, *given, *lists, **constants)
            if gains_sum is None or not self.with_gains:
                return
            del constants["GAINS"]
            constants["SMALL"] = self.bank < TILE
            read = (gains_sum, gradient, bank, *given)
            _row_gains[(len(self.rows),)](*read, self.rows, self.bank, **constants)
            _column_gains[(len(self.columns),)](*read, self.columns, self.bank, **constants)

    def _given(self, signs: Tensor, scales: Tensor, gains: Tensor | None) -> tuple[Tensor, ...]:
        return signs, scales, scales if gains is None else gains, self.places

    def _constants(self, bank: Tensor, gains: Tensor | None) -> dict[str, Any]:
        wide = bank.dtype == torch.float64
        return {
            "CHUNK": self.chunk,
            "GAINS": gains is not None and self.with_gains,
            "SUM": tl.float64 if wide else tl.float32,
        }


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which kernels start on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
