"""Codecs: float32 values to packed bytes and back.

A vector is cut into slices of `SLICE` values, the last one shorter. Each slice travels by itself: first its scales, then its codes,
as `dist_ssn.sync.packing` lays them out. Scales are bfloat16: 16 bits with the range of float32, so that neither gradients of 1e-9
nor scaled losses leave it.

What is not finite stays visible: a slice with a NaN or an infinity decodes to values that are not finite ("fp16" also makes
infinities of values beyond 65,504).

Letters: n = values of a vector, R = slices of one length, L = values of a slice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_ssn.errors import UserError, unknown_choice
from dist_ssn.sync.packing import (
    pack_nibbles,
    pack_pairs,
    pack_places,
    packed_places,
    unpack_nibbles,
    unpack_pairs,
    unpack_places,
)

SLICE = 4096
"""Values that share scales. A place within a slice has 12 bits."""

DENSITY = 64
"""Number of values of which "sparse" sends one: 64 of a slice."""

BINS_END = 1.0
"""Distance of the outer bins of "bins2" from the slice's mean, in standard deviations."""

_SCALE = torch.bfloat16
_BLOCK = 32
"""Slices that are coded at once: their intermediate results stay in the processor's cache."""


@dataclass(frozen=True)
class Codec:
    """A pair of pure functions on packed bytes: what is counted is what travels.

    Args:
        name: key in `CODECS`.
        encode: float32 [n] → uint8 [packed_bytes(n)].
        decode: (uint8 [packed_bytes(n)], n) → float32 [n].
        packed_bytes: bytes of n values; a function of n alone.
        feedback_decay: factor of what was not sent, when it is added to the next vector.
        is_sparse: most values are not sent at all.
    """

    name: str
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, int], Tensor]
    packed_bytes: Callable[[int], int]
    feedback_decay: float = 1.0
    is_sparse: bool = False

    @property
    def is_exact(self) -> bool:
        """True if decoding gives back what was encoded, so that there is no feedback."""
        return self.name == "none"

    @property
    def is_rough(self) -> bool:
        """True if it has fewer than four bits per value, so that a vector and what is sent of it have little in common."""
        return 2 * self.packed_bytes(SLICE) < SLICE


def find_codec(codec: str | Codec) -> Codec:
    """The codec of this name; a codec itself is returned as it is.

    Raises:
        UserError: there is no such codec; the message lists those there are.
    """
    if isinstance(codec, Codec):
        return codec
    if not isinstance(codec, str) or codec not in CODECS:
        raise UserError(unknown_choice("codec", str(codec), CODECS))
    return CODECS[codec]


def _cast(name: str, dtype: torch.dtype) -> Codec:
    """A codec that only changes the type."""

    def encode(values: Tensor) -> Tensor:
        return values.to(dtype).contiguous().view(torch.uint8)

    def decode(packed: Tensor, n: int) -> Tensor:
        if packed.storage_offset() % dtype.itemsize:
            packed = packed.clone()
        return packed.view(dtype)[:n].float()

    return Codec(name, encode, decode, lambda n: n * dtype.itemsize)


def _by_slices(
    name: str,
    encode_slices: Callable[[Tensor], tuple[Tensor, Tensor]],
    decode_slices: Callable[[Tensor, Tensor, int], Tensor],
    scales: Callable[[int], int],
    code_bytes: Callable[[int], int],
    *,
    feedback_decay: float = 1.0,
    is_sparse: bool = False,
) -> Codec:
    """A codec from functions on slices of one length.

    Args:
        name: key in `CODECS`.
        encode_slices: float32 [R, L] → (scales, float32 [R, scales]; codes, uint8 [R, code_bytes(L)]).
        decode_slices: (scales, codes, L) → float32 [R, L].
        scales: number of scales of a slice of L values.
        code_bytes: bytes of a slice's codes.
        feedback_decay: see `Codec`.
        is_sparse: see `Codec`.
    """

    def slice_bytes(length: int) -> int:
        return _SCALE.itemsize * scales(length) + code_bytes(length) if length else 0

    def packed_bytes(n: int) -> int:
        return n // SLICE * slice_bytes(SLICE) + slice_bytes(n % SLICE)

    def encode(values: Tensor) -> Tensor:
        packed = values.new_empty(packed_bytes(values.numel()), dtype=torch.uint8)
        for rows, out in _blocks(values, packed):
            found, codes = encode_slices(rows)
            head = found.shape[1] * _SCALE.itemsize
            out[:, :head] = found.to(_SCALE).view(torch.uint8)
            out[:, head:] = codes
        return packed

    def decode(packed: Tensor, n: int) -> Tensor:
        values = packed.new_empty(n, dtype=torch.float32)
        for out, rows in _blocks(values, packed):
            head = scales(out.shape[1]) * _SCALE.itemsize
            found = rows[:, :head].flatten().clone().view(_SCALE).float().view(len(rows), -1)
            out.copy_(decode_slices(found, rows[:, head:], out.shape[1]))
        return values

    def _blocks(values: Tensor, packed: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Blocks of slices, [R, L], beside their bytes; the last slice alone if it is shorter."""
        full = values.numel() // SLICE
        at, rest = full * slice_bytes(SLICE), values.numel() - full * SLICE
        whole = values[: full * SLICE].view(full, SLICE), packed[:at].view(full, slice_bytes(SLICE))
        blocks = list(zip(*(tensor.split(_BLOCK) for tensor in whole), strict=True)) if full else []
        return blocks + ([(values[full * SLICE :].view(1, rest), packed[at:].view(1, -1))] if rest else [])

    return Codec(name, encode, decode, packed_bytes, feedback_decay, is_sparse)


def _linear(name: str, bits: int, shares: tuple[float, ...] = (1.0,)) -> Codec:
    """Multiples of a scale, from −(2^(bits − 1) − 1) to 2^(bits − 1) − 1, rounded to the nearest.

    Args:
        name: key in `CODECS`.
        bits: 4 or 8.
        shares: shares of a slice's largest magnitude where the multiples may end; the slice takes the one with the least error.
    """
    top = 2 ** (bits - 1) - 1

    def encode_slices(values: Tensor) -> tuple[Tensor, Tensor]:
        end = values.abs().amax(1, keepdim=True) / top
        # A scale that bfloat16 has rounded down still has its largest value within half a step of `top`.
        scale, codes = _multiples(values, end, top)
        error = _distance(values, scale, codes) if len(shares) > 1 else end
        for share in shares[1:]:
            other_scale, other_codes = _multiples(values, share * end, top)
            other_error = _distance(values, other_scale, other_codes)
            better = other_error < error
            scale, error = torch.where(better, other_scale, scale), torch.where(better, other_error, error)
            codes = torch.where(better, other_codes, codes)
        return scale, codes.to(torch.int8).view(torch.uint8) if bits == 8 else pack_nibbles(codes.add_(8))

    def decode_slices(scale: Tensor, codes: Tensor, length: int) -> Tensor:
        found = codes.view(torch.int8) if bits == 8 else unpack_nibbles(codes, length).view(torch.int8) - 8
        return found * scale

    return _by_slices(name, encode_slices, decode_slices, lambda length: 1, lambda length: -(-length * bits // 8))


def _multiples(values: Tensor, scale: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The scale in bfloat16, and the nearest multiples of it."""
    scale = scale.to(_SCALE).float()
    return scale, (values / torch.where(scale == 0, 1, scale)).round_().clamp_(-top, top)


def _distance(values: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    return torch.linalg.vector_norm(torch.addcmul(values, codes, scale, value=-1), dim=1, keepdim=True)


def _bins(name: str) -> Codec:
    """Two bits: each value becomes the mean of its bin; four bins around the slice's mean."""

    def encode_slices(values: Tensor) -> tuple[Tensor, Tensor]:
        mean = values.mean(1, keepdim=True)
        step = torch.linalg.vector_norm(values - mean, dim=1, keepdim=True) * (BINS_END / values.shape[1] ** 0.5)
        above = [_at_least(values, start) for start in (mean - step, mean, mean + step)]
        bins = [1 - above[0], above[0] - above[1], above[1] - above[2], above[2]]
        return _means(values, bins), pack_pairs((above[0] + above[1] + above[2]).to(torch.uint8))

    def decode_slices(means: Tensor, codes: Tensor, length: int) -> Tensor:
        return _looked_up(means, unpack_pairs(codes, length))

    return _by_slices(name, encode_slices, decode_slices, lambda length: 4, lambda length: -(-length // 4))


def _at_least(values: Tensor, start: Tensor) -> Tensor:
    """1.0 where a value is at least `start`, else 0.0; into floats, which is ten times as fast as a comparison and a cast."""
    return torch.ge(values, start, out=torch.empty_like(values))


def _means(values: Tensor, masks: list[Tensor]) -> Tensor:
    """The mean of the values under each mask of ones and zeros, [R, masks]; 0 under none; not finite where a value is not."""
    return torch.stack([(mask * values).sum(1) / mask.sum(1).clamp_(min=1) for mask in masks], 1)


def _looked_up(table: Tensor, codes: Tensor) -> Tensor:
    """[R, L] values of the tables [R, C] at the codes [R, L]."""
    return table.gather(1, codes.long())


def kept_of(length: int) -> int:
    """Values that "sparse" sends of a slice."""
    return max(1, length // DENSITY)


def _sparse(name: str) -> Codec:
    """The largest values of each slice: 12 bits for the place, a sign, and one bit for one of two mean magnitudes.

    SparseLoCo itself has four bins over 6 sigma for the signed values. The largest values of a slice are nearly always in the two
    inner ones, which is their sign alone. So the second bit tells large magnitudes from small ones here.
    """

    def encode_slices(values: Tensor) -> tuple[Tensor, Tensor]:
        kept = kept_of(values.shape[1])
        places = values.abs().topk(kept, dim=1, sorted=False).indices.sort(1).values
        chosen = values.gather(1, places)
        magnitudes = chosen.abs()
        large = _at_least(magnitudes, magnitudes.mean(1, keepdim=True))
        codes = pack_pairs(large.to(torch.uint8) + 2 * (chosen < 0).to(torch.uint8))
        return _means(magnitudes, [1 - large, large]), torch.cat([pack_places(places), codes], 1)

    def decode_slices(means: Tensor, packed: Tensor, length: int) -> Tensor:
        kept = kept_of(length)
        cut = packed_places(kept)
        places, codes = unpack_places(packed[:, :cut], kept), unpack_pairs(packed[:, cut:], kept)
        values = _looked_up(torch.cat([means, -means], 1), codes)
        return values.new_zeros(len(packed), length).scatter_(1, places, values)

    def code_bytes(length: int) -> int:
        return packed_places(kept_of(length)) + -(-kept_of(length) // 4)

    return _by_slices(
        name, encode_slices, decode_slices, lambda length: 2, code_bytes, feedback_decay=0.95, is_sparse=True
    )


CODECS: dict[str, Codec] = {
    "none": _cast("none", torch.float32),
    "fp16": _cast("fp16", torch.float16),
    "bf16": _cast("bf16", torch.bfloat16),
    "int8": _linear("int8", 8),
    "int4": _linear("int4", 4, shares=(1.0, 0.7, 0.5, 0.35)),
    "bins2": _bins("bins2"),
    "sparse": _sparse("sparse"),
}
"""Name → codec.

Source: bin means and feedback: MuLoCo, arXiv 2505.23725; "sparse": SparseLoCo, arXiv 2508.15706."""
