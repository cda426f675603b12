"""Arithmetic of the budget: from groups of weights to bank sizes and slots.

A plan uses its whole budget, with two exceptions:
- A bank of "offset" may have one element less, so that its size is odd.
- If each group is a single weight and the budget is at least their sum, all weights stay dense and the rest is unused.

Each element of a bank is read by a weight, with these exceptions:
- elements that do not fill the templates of "inter" and "wavg-up" or a chunk of "hash" (which also draws its chunks at random);
- in a bank larger than the sum of the weights, elements beyond the number of templates that the user fixed, or the 8 of "emb";
- a few elements below the size at which the next template pays, if that template would cost more than it reads.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dist_ssn.model.specs import LayerSpec
from dist_ssn.plan.mapping import Groups
from dist_ssn.plan.rules import EMBEDDING_SIZE, MAX_TEMPLATES, Morph, cut, reach
from dist_ssn.plan.slots import Group, Slot

_GAINS_SHARE = 0.3
"""Automatic gains are used if they take at most this fraction of a weight's share of the budget."""
_WITH_EXTRAS = ("offset", "hash")
_AVERAGES = ("avg", "wavg")


class Infeasible(Exception):
    """The budget is too small for the parameters that each weight must have."""


Demand = Mapping[str, int]
"""Weight name → importance of each of its elements in the split of a budget, in any unit."""


def allocate(groups: Groups, budget: int, morph: Morph, demand: Demand | None = None) -> tuple[Group, ...]:
    """Chooses the size of each bank and the slot of each weight.

    The budget is split in proportion to the groups' sizes, or to their weights' demand. A group of one weight whose share is at
    least the weight's size stays dense ("repeat" of a bank of n elements), and the rest of its share goes to the others. A group
    whose share is too small gets the least that it needs, at the expense of the others.

    Args:
        groups: name → weights.
        budget: number of parameters.
        morph: for all weights.
        demand: see `Demand`; None: sizes.

    Raises:
        Infeasible: the groups need more than the budget even with banks of one element.
    """
    shares = split(budget, groups, {}, demand)
    solved = {name: _solve(name, weights, shares[name], morph) for name, weights in groups.items()}
    if None in solved.values():
        leasts = {name: _least(tuple(weights), morph)[0] for name, weights in groups.items()}
        floors: dict[str, int] = {}
        while short := {name: leasts[name] for name in groups if shares[name] < leasts[name]}:
            floors |= short
            shares = split(budget, groups, floors, demand)
        solved = {name: _solve(name, weights, shares[name], morph) for name, weights in groups.items()}
    banks = tuple(group for group in solved.values() if group is not None)
    assert len(banks) == len(groups)  # each share is at least the group's need
    return banks


def least(groups: Groups, morph: Morph) -> int:
    """A budget that is enough for the groups, and rarely more than the smallest one."""
    return sum(_least(tuple(weights), morph)[0] for weights in groups.values())


def split(budget: int, groups: Groups, floors: dict[str, int], demand: Demand | None = None) -> dict[str, int]:
    """Each group's share of `budget`, by largest remainder.

    A group of a single weight is capped at its size while other groups remain. With a demand, and a budget below the sum of all
    weights, every group is.

    Args:
        budget: number of parameters.
        groups: name → weights.
        floors: fixed shares of some groups.
        demand: see `Demand`; None: sizes.

    Raises:
        Infeasible: `floors` is above the budget.
    """
    sizes = {name: sum(weight.numel for weight in weights) for name, weights in groups.items()}
    parts = sizes
    if demand is not None:
        parts = {
            name: sum(weight.numel * demand[weight.name] for weight in weights) for name, weights in groups.items()
        }
    capped = {
        name for name in groups if len(groups[name]) == 1 or (demand is not None and budget < sum(sizes.values()))
    }
    fixed = dict(floors)
    while True:
        rest = budget - sum(fixed.values())
        if rest < 0:
            raise Infeasible
        shares = _in_proportion(rest, {name: part for name, part in parts.items() if name not in fixed})
        full = {name: sizes[name] for name in shares if name in capped and shares[name] >= sizes[name]}
        fixed |= full
        if not full:
            return fixed | shares


def _in_proportion(total: int, parts: dict[str, int]) -> dict[str, int]:
    whole = sum(parts.values())
    shares = {name: total * part // whole for name, part in parts.items()}
    by_remainder = sorted(parts, key=lambda name: -(total * parts[name] % whole))
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def _solve(name: str, weights: Sequence[LayerSpec], share: int, morph: Morph) -> Group | None:
    """The group with the largest bank that `share` allows besides the weights' own parameters; None if the share is too small.

    The number of own parameters depends on the bank's size in turn.
    """
    if len(weights) == 1 and share == weights[0].numel:
        return Group(name, share, (cut(weights[0], share, Morph("repeat")),))
    sizes = _bracket(weights, share, morph)
    if sizes is None:
        least, bank = _least(tuple(weights), morph)
        if share < least:
            return None
        morph = replace(morph, gains=morph.gains or False)  # without automatic gains
        sizes = bank, share + 1
    bank, too_large = sizes
    slots, rest = _attempt(weights, share, bank, morph)
    while rest > bank and too_large - bank > 1:
        middle = (bank + too_large) // 2
        tried, left = _attempt(weights, share, middle, morph)
        if left < middle:
            too_large = middle
        else:
            bank, slots, rest = middle, tried, left
    size = _out_of_step(rest, slots)
    return Group(name, size, _place(slots, size))


def _bracket(weights: Sequence[LayerSpec], share: int, morph: Morph) -> tuple[int, int] | None:
    """Sizes of a bank (one that fits, a larger one that does not), tried from above; None if none was found."""
    bank, too_large = share, share + 1
    while bank >= 1:
        rest = _attempt(weights, share, bank, morph)[1]
        if rest >= bank:
            return bank, too_large
        # If a larger bank needs fewer own parameters ("mask"), no size between rest and bank fits; if it needs more ("wavg"),
        # rest may be far too low.
        bank, too_large = max(rest, bank // 2), bank
    return None


@functools.lru_cache(maxsize=4096)
def _least(weights: tuple[LayerSpec, ...], morph: Morph) -> tuple[int, int]:
    """The smallest share that is enough for the group without automatic gains, and the bank's size in it."""

    def need(bank: int) -> int:
        return bank - _attempt(weights, 0, bank, morph)[1]

    banks = [1]
    while banks[-1] < 2 * max(weight.numel for weight in weights):
        banks.append(banks[-1] * 3 // 2 + 1)
    best = min(banks, key=need)
    step = best
    while step := step // 2:
        best = min((best, max(1, best - step), best + step), key=need)
    if len(weights) == 1 and need(best) > weights[0].numel:
        return weights[0].numel, weights[0].numel
    return need(best), best


def _attempt(weights: Sequence[LayerSpec], share: int, bank: int, morph: Morph) -> tuple[list[Slot], int]:
    """The slots for a bank of this size, and the part of `share` that their own parameters leave for the bank."""
    total = sum(weight.numel for weight in weights)
    cover = _cover([weight.numel for weight in weights], bank, morph)
    slots = [_with_extras(cut(weight, bank, morph, cover), share * weight.numel / total, morph) for weight in weights]
    projections = {slot.templates for slot in slots if slot.morph == "emb"}
    return slots, share - sum(slot.extras for slot in slots) - EMBEDDING_SIZE * sum(projections)


def _cover(sizes: Sequence[int], bank: int, morph: Morph) -> int:
    """The smallest K with which weights of these sizes together read all of the bank, if any K does."""

    def read(templates: int) -> int:
        """Number of elements that averages read: one stretch if B < 2n, at most as many templates as fit the bank."""
        return sum(min(max(1, bank // n), templates) * n for n in sizes)

    low, high = -(-bank // sum(sizes)), bank // min(sizes)
    if morph.down not in _AVERAGES or read(max(low, MAX_TEMPLATES)) >= bank or read(high) < bank:
        return low
    while high - low > 1:  # low is too small, high is enough
        middle = (low + high) // 2
        low, high = (low, middle) if read(middle) >= bank else (middle, high)
    return high


def _with_extras(slot: Slot, share: float, morph: Morph) -> Slot:
    """Adds the low-rank difference that the morph asks for, and gains if they fit in the weight's share.

    Gains are automatic for matrices only: most convolutions have norms around them, whose factors do the same
    (docs/results/quality.md). A difference is never automatic: the bank loses more by it than the weight gains.
    """
    automatic = slot.morph in _WITH_EXTRAS and len(slot.shape) == 2
    around = slot.rows + slot.columns
    gains = morph.gains
    if gains is None:
        gains = automatic and around <= _GAINS_SHARE * share
    if not gains and not morph.rank:
        return slot
    return replace(slot, row_gains=gains, column_gains=gains, rank=min(morph.rank or 0, slot.rows, slot.columns))


def _out_of_step(bank: int, slots: list[Slot]) -> int:
    """The bank's size, one less if it is even, so that rows begin at other elements in each pass over the bank.

    If rows of several weights begin at the same elements of the bank, learning is much worse (benchmarks/results/quality:
    mapping "shape").
    """
    return bank - 1 if bank % 2 == 0 and bank > 1 and all(slot.morph == "offset" for slot in slots) else bank


def _place(slots: list[Slot], bank: int) -> tuple[Slot, ...]:
    """Gives each slot the stretch after the previous slot's, so that each element of the bank is used equally often.

    "hash" is an exception, because each weight draws its own order: near a budget of 1, no weight draws some parts of the bank.
    """
    placed, start = [], 0
    for slot in slots:
        placed.append(replace(slot, start=start))
        start = (start + reach(slot, bank)) % bank
    return tuple(placed)
