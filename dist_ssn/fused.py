"""The fast path of the morphs that multiply what they read by signs and gains: few passes over n numbers, hand-written gradient.

`morphs.mix` and `finish` say what is computed; here the same is done with as few passes as eager torch allows, since reading
and writing n numbers is all that generation costs. For "offset" and "repeat":

    W = Σ_k  scale · α_k · row_i · sign_k,ij · T_k,ij · column_j  +  U·V

Signs come in chunks. Where a row is a whole number of chunks, sign, row gain, coefficient and scale are one factor per chunk.
Letters: R rows, C columns, n = R·C, K templates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .morphs import sign_start, sign_table, split_difference, split_gains
from .plan.types import Slot

FUSED = frozenset({"offset", "repeat"})


def can_fuse(slot: Slot) -> bool:
    """Whether this slot's factors can be taken per chunk."""
    return slot.morph in FUSED and slot.zero_row is None and (slot.chunk == 0 or slot.columns % slot.chunk == 0)


def _signs(slot: Slot, seed: int, k: int, like: Tensor) -> Tensor | None:
    """[R, C / chunk], None where there are no signs."""
    if not slot.chunk:
        return None
    count = slot.numel // slot.chunk
    first = sign_start(seed, slot.name, k)
    table = sign_table(seed, count + 1, like.device, like.dtype)
    return table[first : first + count].view(slot.rows, -1)


def _factor(
    slot: Slot, signs: Tensor | None, row_gains: Tensor | None, scale: Tensor | float, like: Tensor
) -> Tensor | None:
    """What one chunk is multiplied by, [R, chunks of a row, 1] or broadcastable to it."""
    factor = signs
    if row_gains is not None:
        rows = (row_gains * scale).unsqueeze(1)
        factor = rows if factor is None else factor * rows
    elif isinstance(scale, Tensor) or scale != 1.0:
        factor = factor * scale if factor is not None else like.new_ones(1, 1) * scale
    return None if factor is None else factor.unsqueeze(2)


def _chunked(slot: Slot, values: Tensor) -> Tensor:
    return values.view(slot.rows, slot.columns // (slot.chunk or slot.columns), -1)


def generate(slot: Slot, seed: int, pieces: Sequence[Tensor], own: dict[str, Tensor]) -> Tensor:
    """The weight in its shape. Same arguments and value as `morphs.mix` and `finish`, without a graph."""
    row_gains, column_gains = split_gains(slot, own["gains"])
    total: Tensor | None = None
    for k, piece in enumerate(pieces):
        scale = own["coefficients"][k] * slot.scale if slot.coefficients else slot.scale
        factor = _factor(slot, _signs(slot, seed, k, piece), row_gains, scale, piece)
        chunks = _chunked(slot, piece)
        if total is None:
            total = chunks.clone() if factor is None else chunks * factor
        else:
            assert factor is not None  # several templates have coefficients
            total.addcmul_(chunks, factor)
    assert total is not None
    weight = total.view(slot.rows, slot.columns)
    if column_gains is not None:
        weight.mul_(column_gains)
    if slot.rank:
        weight.addmm_(*split_difference(slot, own["differences"]))
    return weight.view(slot.shape)


def pull_back(
    slot: Slot, seed: int, pieces: Sequence[Tensor], own: dict[str, Tensor], gradient: Tensor
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The gradients of the pieces [n] each, and of the slot's own numbers, from that of the weight [R, C]."""
    gradient = gradient.reshape(slot.rows, slot.columns)
    row_gains, column_gains = split_gains(slot, own["gains"])
    parts: dict[str, Tensor] = {}
    if slot.rank:
        left, right = split_difference(slot, own["differences"])
        parts["differences"] = torch.cat([(gradient @ right.T).view(-1), (left.T @ gradient).view(-1)])
    inner = gradient * column_gains if column_gains is not None else gradient
    pieces_parts = []
    row_part = torch.zeros_like(row_gains) if row_gains is not None else None
    column_part = torch.zeros_like(column_gains) if column_gains is not None else None
    coefficient_parts = []
    for k, piece in enumerate(pieces):
        signs = _signs(slot, seed, k, piece)
        coefficient = own["coefficients"][k] if slot.coefficients else None
        scale = coefficient * slot.scale if coefficient is not None else slot.scale
        if row_gains is not None or column_gains is not None or coefficient is not None:
            signed = _chunked(slot, piece) * (signs.unsqueeze(2) if signs is not None else 1.0)
            product = signed.view(slot.rows, slot.columns).mul_(gradient)
            over_rows = product @ column_gains if column_gains is not None else product.sum(1)
            if row_part is not None:
                row_part += over_rows * scale
            if column_part is not None:
                column_part += (product.T @ row_gains if row_gains is not None else product.sum(0)) * scale
            if coefficient is not None:
                coefficient_parts.append(
                    (over_rows @ row_gains if row_gains is not None else over_rows.sum()) * slot.scale
                )
        factor = _factor(slot, signs, row_gains, scale, piece)
        last = k == len(pieces) - 1 and inner is not gradient
        if factor is None:
            pieces_parts.append(inner.reshape(-1))
        else:
            chunks = _chunked(slot, inner)
            pieces_parts.append((chunks.mul_(factor) if last else chunks * factor).view(-1))
    if row_part is not None or column_part is not None:
        parts["gains"] = torch.cat([part for part in (row_part, column_part) if part is not None])
    if coefficient_parts:
        parts["coefficients"] = torch.stack(coefficient_parts)
    return pieces_parts, parts
