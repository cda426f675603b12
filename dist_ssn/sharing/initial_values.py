"""Initial values of a bank: they depend only on the plan and the bank's standard deviation, the same on every rank and machine."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_ssn.plan import Group, Slot
from dist_ssn.plan.rules import EMBEDDING_SIZE

Arrays = dict[str, np.ndarray]
_AT_ONCE = 2**24
"""Elements whose squares are in memory at once."""


def initial_values(group: Group, seed: int, std: float) -> Arrays:
    """The initial values of a bank's parameters, each flat, by name; empty arrays for those that it does not have.

    - The bank is normal, with exactly the standard deviation `std`.
    - Coefficients of weights that mix the same number of templates are orthogonal, with unit rows; signed templates are mixed in
      equal parts.
    - Gains are 1.
    - Of a difference U·V, U has variance 1/rank and V is zero: its first step moves the weight as far as a dense step would.
    """
    draw = np.random.RandomState(_seed_of(seed, group.name))
    bank = draw.standard_normal(group.size)
    values = torch.from_numpy(bank)  # in place from here on, without a copy of the bank
    squares = torch.stack([part.square().sum() for part in values.split(_AT_ONCE)]).sum()
    values.div_((squares / group.size).sqrt()).mul_(std)
    rows = {
        k: orthogonal_rows(sum(_mixes(s) == k for s in group.slots), k, draw) for k in {_mixes(s) for s in group.slots}
    }
    used = dict.fromkeys(rows, 0)
    projections = {k: orthogonal_rows(k, EMBEDDING_SIZE, draw).T for k in group.projections}
    own: dict[str, list[np.ndarray]] = {"coefficients": [], "gains": [], "differences": []}
    for slot in group.slots:
        if slot.coefficients:
            mixed = None
            if slot.morph in ("wavg", "emb", "inter"):
                mixed = rows[slot.templates][used[slot.templates]]
                used[slot.templates] += 1
            own["coefficients"].append(_coefficients(slot, mixed, projections, draw))
        own["gains"].append(np.ones(slot.gains))
        if slot.differences:
            left = draw.standard_normal(slot.rows * slot.rank) / math.sqrt(slot.rank)
            own["differences"] += [left, np.zeros(slot.columns * slot.rank)]
    flat = {name: np.concatenate([*parts, np.zeros(0)]) for name, parts in own.items()}
    return {
        "bank": bank,
        "projections": np.concatenate([*(p.reshape(-1) for p in projections.values()), np.zeros(0)]),
    } | flat


def _coefficients(
    slot: Slot, mixed: np.ndarray | None, projections: Mapping[int, np.ndarray], draw: np.random.RandomState
) -> np.ndarray:
    if slot.morph in ("offset", "hash"):
        return np.full(slot.templates, slot.templates**-0.5)
    if slot.morph == "mask":
        return draw.randint(0, 2, slot.coefficients) * 2.0 - 1.0
    if slot.morph == "wavg-up":
        return orthogonal_rows(slot.template_shape[0], slot.templates, draw).reshape(-1)
    assert mixed is not None
    return projections[slot.templates] @ mixed if slot.morph == "emb" else mixed


def write(parameter: nn.Parameter, values: np.ndarray) -> None:
    """Writes values [n] into a parameter of n elements, or each rank's part of them into a parameter that FSDP2 has sharded."""
    source = torch.from_numpy(np.ascontiguousarray(values)).view(parameter.shape)
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor  # half a second, which only a sharded bank needs

        sharded: Any = parameter
        source = source.to(sharded.device_mesh.device_type, parameter.dtype)
        source = distribute_tensor(source, sharded.device_mesh, sharded.placements, src_data_rank=None)
    with torch.no_grad():
        parameter.copy_(source)


def _mixes(slot: Slot) -> int:
    """K of a slot whose coefficients start orthogonal to those of other slots with the same K; 0 for other slots."""
    return slot.templates if slot.coefficients and slot.morph in ("wavg", "emb", "inter") else 0


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"bank/{seed}/{name}".encode()).digest()[:4], "little")


def orthogonal_rows(count: int, size: int, draw: np.random.RandomState) -> np.ndarray:
    """Random unit rows [count, size], orthogonal within each block of `size` rows."""
    if not count or not size:
        return np.zeros((count, size))
    blocks = [np.linalg.qr(draw.standard_normal((size, size)))[0] for _ in range(-(-count // size))]
    return np.concatenate(blocks)[:count]
