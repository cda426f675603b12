"""Growing exactly: a bank that is tiled gives the same weights, bit for bit, and several times the parameters. A prototype.

Element i of a weight is bank[(start + i) mod B] · sign_i · scale · gains. In a bank of f copies, one after the other, any start
that is congruent to the old one modulo B reads the same values. The signs are the same without being carried: their place in the
table depends on the plan's seed, the weight's name and the template, and the table on the seed (`sharing.morphs.sign_start`,
`sign_table`); neither knows the bank's size or the weight's start. So seed, names, chunks, scales and gains stay, and nothing else
is needed. The order of "hash" does depend on the bank's size, so it cannot grow in this way.

A plan's slots follow each other, and go on following each other in the grown bank: these starts are congruent, and each copy gets
an equal part of the uses, up to one.

Letters: B elements in the bank, f the factor.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import dist_ssn
from dist_ssn.errors import PlanError
from dist_ssn.plan import Group, Plan
from dist_ssn.sharing.bank import banks_of

MOMENTS: dict[str, tuple[float, float] | None] = {
    "equal": (-1, -2),
    "independent": (-1, -1),
    "as they were": (0, 0),
    "from zero": None,
}
"""Name → powers of f that Adam's two moments of a bank are multiplied by; None: the bank starts without moments.

The gradients of the f copies add up to the old one. Where the copies get equal gradients, each is 1/f of it and its square 1/f².
Where they are independent and equally large, its mean square is 1/f."""


def grown_plan(plan: Plan, factor: int = 3) -> Plan:
    """The plan whose banks are `factor` times as large, and whose weights are the same if the bank is tiled.

    A bank stays as it is if its weights do not have `factor` times its elements, so that a part of it would have no use.

    Args:
        plan: of "offset" with one template.
        factor: odd, so that an odd size stays odd.

    Raises:
        PlanError: the factor is even or below 3, or no bank can grow.
    """
    if factor < 3 or factor % 2 == 0:
        raise PlanError(f"a bank grows by an odd factor of at least 3, so that its size stays odd, got {factor}")
    groups = tuple(_grown(group, factor) for group in plan.groups)
    added = sum(new.size - old.size for new, old in zip(groups, plan.groups, strict=True))
    if not added:
        raise PlanError(
            f"no bank can grow {factor} times: that needs the morph 'offset', and weights as large together"
        )
    return replace(plan, groups=groups, budget=plan.budget + added)


def _grown(group: Group, factor: int) -> Group:
    signed = all(slot.morph == "offset" and slot.templates == 1 for slot in group.slots)
    size = factor * group.size
    if not signed or size > group.numel:
        return group
    slots, end = [], group.slots[0].start
    for slot in group.slots:
        start = (end + (slot.start - end) % group.size) % size  # the first congruent one from the last slot's end on
        slots.append(replace(slot, start=start))
        end = start + slot.numel
    return replace(group, size=size, slots=tuple(slots))


def grown(model: nn.Module, dense: nn.Module, factor: int = 3) -> nn.Module:
    """A model with the same weights, bit for bit, from banks `factor` times as large.

    Args:
        model: shared.
        dense: the same architecture, which is shared; its values do not matter.
        factor: see `grown_plan`.

    Raises:
        PlanError: see `grown_plan`.
    """
    old = model.state_dict()
    dist_ssn.share(dense, plan=grown_plan(dist_ssn.plan_of(old), factor))
    new = dense.state_dict()
    kept = {key: tiled(value, new[key]) for key, value in old.items() if not key.endswith("_extra_state")}
    dense.load_state_dict({**new, **kept})
    return dense


def tiled(values: Tensor, like: Tensor) -> Tensor:
    """Copies of `values`, one after the other, as long as `like`."""
    if values.shape == like.shape:
        return values
    return values.repeat(len(like) // len(values), *[1] * (values.ndim - 1))


def carry_moments(
    model: nn.Module, optimizer: Optimizer, former: nn.Module, former_optimizer: Optimizer, moments: str
) -> None:
    """Gives an Adam of a grown model the moments of the former one.

    Args:
        model: the grown one.
        optimizer: of `model`; it has made no step.
        former: the model before.
        former_optimizer: of `former`; it has made a step.
        moments: a key of MOMENTS.
    """
    before = dict(former.named_parameters())
    for name, parameter in model.named_parameters():
        was = before[name]
        state = former_optimizer.state[was]
        powers = MOMENTS[moments] if was.shape != parameter.shape else (0, 0)
        if powers is None:
            continue
        factor = parameter.numel() / was.numel()
        optimizer.state[parameter] = {
            "step": state["step"].clone(),
            **{
                key: tiled(state[key], parameter) * factor**power
                for key, power in zip(("exp_avg", "exp_avg_sq"), powers, strict=True)
            },
        }


@torch.no_grad()
def likeness(model: nn.Module, factor: int = 3) -> float:
    """Mean square of the copies' gradients over that of their sum: 1/f² if all are equal, 1/f if they are independent.

    Args:
        model: grown, after a backward.
        factor: f, by which all its banks have grown.
    """
    parts = [bank.bank.grad.view(factor, -1) for bank in banks_of(model) if bank.bank.grad is not None]
    whole = torch.cat([part.sum(0) for part in parts])
    return float(torch.cat(parts, 1).square().mean() / whole.square().mean())
