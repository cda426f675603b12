"""The budget's arithmetic: from groups of weights to bank sizes and slots. Never over the budget, and nothing of it left idle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..specs import LayerSpec
from .mapping import group_std
from .rules import EMBEDDING_SIZE, Morph, cut, reach
from .types import Group, Slot

_GAINS_SHARE = 0.3
"""Automatic gains are used where they take at most this part of a weight's share of the budget."""
_WITH_EXTRAS = ("offset", "hash")


class Infeasible(Exception):
    """The budget is too small for what each weight must have."""


def allocate(groups: dict[str, list[LayerSpec]], budget: int, morph: Morph) -> tuple[Group, ...]:
    """Sizes every bank and cuts every weight.

    The budget is split in proportion to the groups' sizes; a group of one weight that would get at least the weight's own
    size keeps it as it is ("repeat" of a bank of n numbers), and what it has to spare goes to the others.

    Raises:
        Infeasible: some group's share cannot hold one number of bank and what its weights must have beside it.
    """
    shares = split(budget, groups)
    return tuple(_solve(name, weights, shares[name], morph) for name, weights in groups.items())


def split(budget: int, groups: dict[str, list[LayerSpec]]) -> dict[str, int]:
    """Each group's share of `budget`, by largest remainder; single weights are capped at their size while others remain."""
    sizes = {name: sum(weight.numel for weight in weights) for name, weights in groups.items()}
    capped: dict[str, int] = {}
    while True:
        open_sizes = {name: size for name, size in sizes.items() if name not in capped}
        shares = _in_proportion(budget - sum(capped.values()), open_sizes)
        full = {name: sizes[name] for name in shares if len(groups[name]) == 1 and shares[name] >= sizes[name]}
        capped |= full
        if not full:
            return capped | shares


def _in_proportion(total: int, sizes: dict[str, int]) -> dict[str, int]:
    whole = sum(sizes.values())
    shares = {name: total * size // whole for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (-(total * sizes[name] % whole), list(sizes).index(name)))
    for name in by_remainder[: total - sum(shares.values())] if sizes else []:
        shares[name] += 1
    return shares


def _solve(name: str, weights: Sequence[LayerSpec], share: int, morph: Morph) -> Group:
    """The largest bank that `share` allows beside the numbers of the weights' own, which depend on the bank's size in turn."""
    std = group_std(weights)
    total = sum(weight.numel for weight in weights)
    if len(weights) == 1 and share == total:
        slot = replace(cut(weights[0], total, Morph("repeat")), scale=weights[0].init_std / std)
        return Group(name, total, std, (slot,))

    def slots_for(bank: int) -> tuple[list[Slot], int]:
        """The slots in a bank of this size, and the bank that the share can pay beside them."""
        cover = -(-bank // total)
        slots = [
            _with_extras(cut(weight, bank, morph, cover), share * weight.numel / total, morph) for weight in weights
        ]
        projections = {slot.templates for slot in slots if slot.morph == "emb"}
        return slots, share - sum(slot.extras for slot in slots) - EMBEDDING_SIZE * sum(projections)

    if share < 1:
        raise Infeasible(name)
    low, high = share, share
    while (rest := slots_for(low)[1]) < low:
        if rest < 1:
            raise Infeasible(name)
        low, high = rest, low
    # `high` asks for more than the share, `low` may leave some of it over: the largest bank that can be paid lies between.
    high = min(high, rest + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if slots_for(middle)[1] >= middle else (low, middle)
    slots, rest = slots_for(low)
    size = _out_of_step(rest, slots)
    return Group(name, size, std, _place(slots, size, std))


def _with_extras(slot: Slot, share: float, morph: Morph) -> Slot:
    """Adds the low-rank difference that was asked for, and gains where they fit beside the bank in the weight's share.

    A difference is never automatic: what it takes from the bank costs more than it brings (benchmarks/results/quality).
    """
    automatic = slot.morph in _WITH_EXTRAS
    around = slot.rows + slot.columns
    gains = morph.gains
    if gains is None:
        gains = automatic and around <= _GAINS_SHARE * share
    return replace(slot, row_gains=gains, column_gains=gains, rank=min(morph.rank or 0, slot.rows, slot.columns))


def _out_of_step(bank: int, slots: list[Slot]) -> int:
    """The bank's size, one less where a power of two divides it: with each pass over it, rows must begin elsewhere.

    Where rows of several weights lie one upon the other in the bank, learning is much worse (benchmarks/results/quality:
    mapping "shape").
    """
    return bank - 1 if bank % 2 == 0 and bank > 1 and all(slot.morph == "offset" for slot in slots) else bank


def _place(slots: list[Slot], bank: int, std: float) -> tuple[Slot, ...]:
    """Gives every slot the stretch after its predecessor's, so that each number of the bank is used equally often.

    Not so for "hash", where each weight draws its own order: near a budget of 1 a part of the bank is drawn by none.

    The scale makes up for the morph's own spread (already in `slot.scale`) and for the bank's standard deviation.
    """
    placed, start = [], 0
    for slot in slots:
        placed.append(replace(slot, start=start, scale=slot.scale * slot.init_std / std))
        start = (start + reach(slot, bank)) % bank
    return tuple(placed)
