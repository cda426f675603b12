"""Small integers in bytes, row by row: 2, 4 and 12 bits each.

Values that share a byte lie a quarter (2 bits) or half (4 bits) of the row apart, so that packing reads and writes in order. A row
whose length does not divide is filled up with zeros.

Letters: R = rows, L = values of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _parts(codes: Tensor, parts: int) -> tuple[Tensor, ...]:
    missing = -codes.shape[1] % parts
    return (F.pad(codes, (0, missing)) if missing else codes).to(torch.uint8).chunk(parts, 1)


def pack_nibbles(codes: Tensor) -> Tensor:
    """[R, L] integers from 0 to 15 → uint8 [R, ⌈L / 2⌉]."""
    low, high = _parts(codes, 2)
    return low | (high << 4)


def unpack_nibbles(packed: Tensor, length: int) -> Tensor:
    """The inverse of `pack_nibbles`: uint8 [R, length]."""
    return torch.cat([packed & 15, packed >> 4], 1)[:, :length]


def pack_pairs(codes: Tensor) -> Tensor:
    """[R, L] integers from 0 to 3 → uint8 [R, ⌈L / 4⌉]."""
    a, b, c, d = _parts(codes, 4)
    return a | (b << 2) | (c << 4) | (d << 6)


def unpack_pairs(packed: Tensor, length: int) -> Tensor:
    """The inverse of `pack_pairs`: uint8 [R, length]."""
    return torch.cat([packed & 3, (packed >> 2) & 3, (packed >> 4) & 3, packed >> 6], 1)[:, :length]


def packed_places(number: int) -> int:
    """Bytes of a number of places."""
    return -(-3 * number // 2)


def pack_places(places: Tensor) -> Tensor:
    """[R, L] integers from 0 to 4095 → uint8 [R, ⌈1.5 L⌉]: two neighbours a, b share three bytes, lowest bits of a first."""
    number = places.shape[1]
    pairs = F.pad(places, (0, number % 2)).view(len(places), -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    triples = torch.stack([a & 255, (a >> 8) | ((b & 15) << 4), b >> 4], 2)
    return triples.to(torch.uint8).flatten(1)[:, : packed_places(number)]


def unpack_places(packed: Tensor, number: int) -> Tensor:
    """The inverse of `pack_places`: int64 [R, number]."""
    triples = F.pad(packed.long(), (0, -packed.shape[1] % 3)).view(len(packed), -1, 3)
    first, middle, last = triples.unbind(2)
    return torch.stack([first | ((middle & 15) << 8), (middle >> 4) | (last << 4)], 2).flatten(1)[:, :number]
