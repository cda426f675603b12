"""Morphs: from elements of a bank to one weight. Pure functions, differentiable, in any floating dtype.

Letters: B elements in the bank, n in the weight (R rows × C columns), K templates, c coefficients.

A weight is made in three steps, which the pure and the fast path of `bank.py` share:

    readings(slot, B)     positions of each template in the bank
    mix(slot, pieces)     base [n], the morph of the K pieces that were read
    finish(slot, base)    W [R, C] = scale · row gains · base · column gains + U·V

"offset" and "hash" are our own: the bank is read from a start of the weight's own, wrapping around, in chunks with pseudo-random
signs ("hash": also in a pseudo-random order). Signs and order depend only on (seed, name, k): they need no parameters and are
never sent.

Source: Plummer et al., arXiv 2006.10598, section 3, with each morph's variance normalized, for the other morphs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_ssn.plan.rules import MASK_WINDOW
from dist_ssn.plan.slots import Slot
from dist_ssn.torch_private import outside_of_modes

_SIGN_ROOM = 65_536
"""Number of positions at which a weight may begin to read the common table of signs."""
_MANY = 64
"""Number of whole readings of a bank up to which they are put together from pieces; beyond it all are one operation."""


@dataclass(frozen=True)
class Stretch:
    """A reading of `length` elements from `start` on, wrapping around at the bank's end."""

    start: int
    length: int

    def at(self, index: Tensor, size: int) -> Tensor:
        """Indices in the bank, of size `size`, of the reading's elements `index`."""
        return (self.start + index) % size

    def take(self, bank: Tensor) -> Tensor:
        """The elements [length]: a view if they are contiguous in the bank."""
        size = bank.numel()
        if self.start + self.length <= size:
            return bank[self.start : self.start + self.length]
        whole, rest = divmod(self.start + self.length - size, size)
        if whole > _MANY:
            return bank.repeat(whole + 2)[self.start : self.start + self.length]
        return torch.cat([bank[self.start :], *[bank] * whole, bank[:rest]])

    def give(self, total: Tensor, part: Tensor) -> None:
        """Adds `part` [length] to `total` [B] at the elements that `take` reads. O(length)."""
        size = total.numel()
        head = min(self.length, size - self.start)
        total[self.start : self.start + head] += part[:head]
        whole, rest = divmod(self.length - head, size)
        if whole:
            total += part[head : head + whole * size].view(whole, size).sum(0)
        if rest:
            total[:rest] += part[self.length - rest :]


@dataclass(frozen=True)
class Chunks:
    """A reading of `length` elements in chunks of `chunk`, in the pseudo-random order that belongs to `key`."""

    key: tuple[int, str, int]
    chunk: int
    length: int

    def order(self, size: int, device: torch.device) -> Tensor:
        """Indices of the chunks in a bank of `size` elements, in the order in which they are read."""
        return chunk_order(*self.key, -(-self.length // self.chunk), size // self.chunk, device)

    def at(self, index: Tensor, size: int) -> Tensor:
        """Indices in the bank, of size `size`, of the reading's elements `index`."""
        order = self.order(size, index.device)
        return order[index // self.chunk] * self.chunk + index % self.chunk

    def take(self, bank: Tensor) -> Tensor:
        """The elements [length], as a copy."""
        order = self.order(bank.numel(), bank.device)
        return self._rows(bank).index_select(0, order).view(-1)[: self.length]

    def give(self, total: Tensor, part: Tensor) -> None:
        """Adds `part` [length] to `total` [B] at the elements that `take` reads. O(length)."""
        order = self.order(total.numel(), total.device)
        part = F.pad(part, (0, order.numel() * self.chunk - self.length))
        self._rows(total).index_add_(0, order, part.view(-1, self.chunk))

    def _rows(self, bank: Tensor) -> Tensor:
        count = bank.numel() // self.chunk
        return bank[: count * self.chunk].view(count, self.chunk)


Reading = Stretch | Chunks


def readings(slot: Slot, seed: int, bank: int) -> tuple[Reading, ...]:
    """The readings of the slot's K templates, in a bank of `bank` elements. O(K)."""
    if slot.morph == "hash":
        return tuple(Chunks((seed, slot.name, k), slot.chunk, slot.numel) for k in range(slot.templates))
    height, width = slot.template_shape
    length = {"inter": height * width, "wavg-up": width}.get(slot.morph, slot.numel)
    return tuple(Stretch((slot.start + k * length) % bank, length) for k in range(slot.templates))


@dataclass(frozen=True)
class Mixture:
    """Input of a morph: a slot, the templates that were read for it, and the learned parameters that mix them."""

    slot: Slot
    seed: int
    bank_size: int
    pieces: tuple[Tensor, ...]
    """K tensors [m]: the templates as read, or their elements at `index`."""
    coefficients: Tensor
    """The weight's own coefficients [c]."""
    projection: Tensor | None = None
    """The group's projection [c, K], for "emb"."""
    index: Tensor | None = None
    """Flat indices of the requested elements of the weight; None for all. Only elementwise morphs have it."""

    def elements(self) -> Tensor:
        """Flat indices of the requested elements [m]."""
        if self.index is not None:
            return self.index
        return torch.arange(self.slot.numel, device=self.pieces[0].device)


def _average(m: Mixture) -> Tensor:
    return torch.stack(m.pieces).mean(0)


def _weighted(m: Mixture) -> Tensor:
    return _combine(m.pieces, m.coefficients)


def _embedded(m: Mixture) -> Tensor:
    assert m.projection is not None
    return _combine(m.pieces, m.coefficients @ m.projection)


def _repeated(m: Mixture) -> Tensor:
    return m.pieces[0]


def _resized(m: Mixture) -> Tensor:
    height, width = m.slot.template_shape
    templates = torch.stack(m.pieces).view(1, len(m.pieces), height, width)
    # Resizing is linear, so mixing the small templates first gives the same result and is K times cheaper.
    if m.slot.coefficients:
        templates = torch.einsum("k,bkhw->bhw", m.coefficients, templates).unsqueeze(1)
    size = (m.slot.rows, m.slot.columns)
    return F.interpolate(templates, size=size, mode="bilinear", align_corners=False).reshape(-1)


def _masked(m: Mixture) -> Tensor:
    """The bank, repeated; each repetition but the first is multiplied by a window of its own."""
    if not m.slot.coefficients:
        return m.pieces[0]
    element = m.elements()
    window = torch.cat([m.coefficients.new_ones(MASK_WINDOW), m.coefficients])
    return m.pieces[0] * window[element // m.bank_size * MASK_WINDOW + element % m.bank_size % MASK_WINDOW]


def _mixed(m: Mixture) -> Tensor:
    matrix = m.coefficients.view(m.slot.template_shape[0], len(m.pieces))
    return (matrix @ torch.stack(m.pieces)).view(-1)[: m.slot.numel]


def _signed(m: Mixture) -> Tensor:
    signed = tuple(apply_signs(m.slot, m.seed, k, piece, m.index) for k, piece in enumerate(m.pieces))
    return _combine(signed, m.coefficients) if m.slot.coefficients else signed[0]


MORPHS: dict[str, Callable[[Mixture], Tensor]] = {
    "avg": _average,
    "wavg": _weighted,
    "emb": _embedded,
    "repeat": _repeated,
    "inter": _resized,
    "mask": _masked,
    "wavg-up": _mixed,
    "offset": _signed,
    "hash": _signed,
}
"""Name → function from a `Mixture` to the base of the weight: [n], or the elements at its index."""

ELEMENTWISE = frozenset({"avg", "wavg", "emb", "repeat", "mask", "offset", "hash"})
"""Morphs that can generate some elements of a weight without the others."""


def _combine(pieces: tuple[Tensor, ...], coefficients: Tensor) -> Tensor:
    total = pieces[0] * coefficients[0]
    for k in range(1, len(pieces)):
        total = torch.addcmul(total, pieces[k], coefficients[k])
    return total


def apply_signs(slot: Slot, seed: int, k: int, piece: Tensor, index: Tensor | None = None) -> Tensor:
    """`piece` times the pseudo-random signs of template k: all n elements, or those at `index`."""
    signs, chunk = sign_table(seed, slot.numel // slot.chunk + 1, piece.device, piece.dtype), slot.chunk
    first = sign_start(seed, slot.name, k)
    if index is not None:
        return piece * signs[first + index // chunk]
    count = -(-slot.numel // chunk)
    if slot.numel % chunk:
        return piece * signs[first : first + count].repeat_interleave(chunk)[: slot.numel]
    return (piece.view(count, chunk) * signs[first : first + count].unsqueeze(1)).view(-1)


# Plain dicts, filled by `prepare` when a bank is built or moved. torch.compile and export can read a dict, but can neither trace a
# hash nor read an lru_cache, which under a fake mode would keep fake tensors for every later use.
_starts: dict[tuple[int, str, int], int] = {}
_tables: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}
_orders: dict[tuple[int, str, int, int, int, torch.device], Tensor] = {}


def prepare(slot: Slot, seed: int, bank: Tensor) -> None:
    """Makes the pseudo-random tables that `slot` needs for a bank of this device and dtype, once per process."""
    for k, reading in enumerate(readings(slot, seed, bank.numel())):
        if slot.chunk:
            sign_start(seed, slot.name, k)
            sign_table(seed, slot.numel // slot.chunk + 1, bank.device, bank.dtype)
        if isinstance(reading, Chunks):
            reading.order(bank.numel(), bank.device)


def sign_start(seed: int, name: str, k: int) -> int:
    """Index in the table of signs at which template k of weight `name` begins to read."""
    key = (seed, name, k)
    if key not in _starts:
        digest = hashlib.sha256(f"sign/{seed}/{name}/{k}".encode()).digest()
        _starts[key] = int.from_bytes(digest[:4], "little") % _SIGN_ROOM
    return _starts[key]


def sign_table(seed: int, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Pseudo-random ±1, one table for all weights and banks of a seed, with at least `length` entries after every start."""
    size = 1 << (length + _SIGN_ROOM).bit_length()
    key = (seed, size, device, dtype)
    if key not in _tables:
        bits = np.frombuffer(hashlib.shake_256(f"signs/{seed}".encode()).digest(size // 8), dtype=np.uint8)
        with torch.inference_mode(False), outside_of_modes():
            table = torch.from_numpy(np.unpackbits(bits) * 2.0 - 1.0).to(device=device, dtype=dtype)
        if type(table) is not Tensor:  # a mode's own, for this once
            return table
        _tables[key] = table
    return _tables[key]


def chunk_order(seed: int, name: str, k: int, count: int, available: int, device: torch.device) -> Tensor:
    """Pseudo-random indices below `available`, `count` of them, each drawn equally often: repeated shuffles of the bank."""
    key = (seed, name, k, count, available, device)
    if key not in _orders:
        digest = hashlib.sha256(f"hash/{seed}/{name}/{k}".encode()).digest()
        draw = np.random.RandomState(int.from_bytes(digest[:4], "little"))  # a stream that numpy keeps stable for ever
        passes = [draw.permutation(available) for _ in range(-(-count // available))]
        with torch.inference_mode(False), outside_of_modes():
            order = torch.from_numpy(np.concatenate(passes)[:count].astype(np.int64)).to(device)
        if type(order) is not Tensor:
            return order
        _orders[key] = order
    return _orders[key]


def finish(
    slot: Slot, base: Tensor, scale: Tensor, gains: Tensor, differences: Tensor, rows: Tensor | None = None
) -> Tensor:
    """The weight in its shape (or its `rows`, [m, C]) from its base.

    Args:
        slot: of the weight.
        base: [n], or [m · C] for m rows.
        scale: a number in float32: the fixed gain that gives the weight its initial standard deviation.
        gains: [R and/or C]: row gains first.
        differences: [rank · (R + C)]: U [R, rank] first, then V [rank, C].
        rows: indices of the rows in `base` [m]; None: all.
    """
    is_low = base.dtype.itemsize < scale.dtype.itemsize  # where some devices would round the scale first
    weight = (base.to(scale.dtype) * scale).to(base.dtype) if is_low else base * scale
    weight = weight.view(-1, slot.columns)
    row_gains, column_gains = split_gains(slot, gains)
    if row_gains is not None:
        weight = weight * (row_gains if rows is None else row_gains[rows]).unsqueeze(1)
    if column_gains is not None:
        weight = weight * column_gains
    if slot.rank:
        left, right = split_difference(slot, differences)
        weight = torch.addmm(weight, left if rows is None else left[rows], right)
    if slot.zero_row is not None:
        place = torch.arange(slot.rows, device=base.device) if rows is None else rows
        weight = weight * (place != slot.zero_row).unsqueeze(1)
    return weight.view(slot.shape) if rows is None else weight


def split_gains(slot: Slot, gains: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Row gains [R] and column gains [C] of a slot; None for those that it does not have."""
    cut = slot.rows if slot.row_gains else 0
    return (gains[:cut] if slot.row_gains else None), (gains[cut:] if slot.column_gains else None)


def split_difference(slot: Slot, differences: Tensor) -> tuple[Tensor, Tensor]:
    """The factors U [R, rank] and V [rank, C] of a slot's difference."""
    cut = slot.rows * slot.rank
    return differences[:cut].view(slot.rows, slot.rank), differences[cut:].view(slot.rank, slot.columns)
