"""Initial values of a bank: they depend only on the plan, and are the same on every rank and machine."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

from dist_ssn.plan import Slot
from dist_ssn.plan.rules import EMBEDDING_SIZE
from dist_ssn.sharing.bank import Bank


@torch.no_grad()
def initialize(bank: Bank, std: float | None = None) -> None:
    """Gives a bank its initial values, which depend only on the plan and the bank's standard deviation.

    - The bank is normal, with exactly this standard deviation.
    - Coefficients of weights that mix the same number of templates are orthogonal, with unit rows; signed templates are mixed in
      equal parts.
    - Gains are 1.
    - Of a difference U·V, U has variance 1/rank and V is zero: its first step moves the weight as far as a dense step would.

    Args:
        bank: is changed.
        std: standard deviation; None: the one among the bank's scales.
    """
    group, seed = bank.group, bank.seed
    draw = np.random.RandomState(_seed_of(seed, group.name))
    values = torch.from_numpy(draw.standard_normal(group.size))
    bank.bank.copy_(values / values.square().mean().sqrt() * (float(bank.scales[0]) if std is None else std))
    rows = {
        k: orthogonal_rows(sum(_mixes(s) == k for s in group.slots), k, draw) for k in {_mixes(s) for s in group.slots}
    }
    used = dict.fromkeys(rows, 0)
    projections = {k: orthogonal_rows(k, EMBEDDING_SIZE, draw).T for k in group.projections}
    for k, projection in projections.items():
        start, end = bank.projection_range(k)
        assert bank.projections is not None
        bank.projections[start:end].copy_(torch.from_numpy(projection.reshape(-1).copy()))
    for index, slot in enumerate(group.slots):
        for name in ("coefficients", "gains", "differences"):
            target = bank.own(getattr(bank, name), index, name)
            if not target.numel():
                continue
            if name == "gains":
                start = np.ones(slot.gains)
            elif name == "differences":
                left = draw.standard_normal(slot.rows * slot.rank) / math.sqrt(slot.rank)
                start = np.concatenate([left, np.zeros(slot.columns * slot.rank)])
            elif slot.morph in ("offset", "hash"):
                start = np.full(slot.templates, slot.templates**-0.5)
            elif slot.morph == "mask":
                start = draw.randint(0, 2, slot.coefficients) * 2.0 - 1.0
            elif slot.morph == "wavg-up":
                start = orthogonal_rows(slot.template_shape[0], slot.templates, draw).reshape(-1)
            else:
                start = rows[slot.templates][used[slot.templates]]
                used[slot.templates] += 1
                if slot.morph == "emb":
                    start = projections[slot.templates] @ start
            target.copy_(torch.from_numpy(np.ascontiguousarray(start)))


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
