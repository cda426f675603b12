"""Parameter groups for an optimizer: what decays, and at which rate a bank learns."""

from __future__ import annotations

from typing import Any

from torch import nn

from .bank import Bank

_EXPONENT = 3 / 8
"""How a bank's rate under Adam grows with the number of its uses (docs/quality.md: between 1/4 and 1/2 all do)."""


def parameter_groups(model: nn.Module, weight_decay: float = 0.01, lr: float | None = None) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: banks, differences and matrices decay; gains, coefficients, biases and norms don't.

    Works on dense models too, so that both are trained alike.

    Args:
        weight_decay: of those that decay.
        lr: the dense model's learning rate, for Adam and its relatives. They move every number by about the rate, however many
            weights pull at it; a number that stands for many must move further. So each bank gets a rate of its own, `bank_rate`,
            and a decay that is as strong as at `lr`. Leave it out with SGD, whose steps grow with the uses by themselves.
    """
    banks = {id(m.bank): m for m in model.modules() if isinstance(m, Bank)}
    differences = {id(m.differences) for m in banks.values()}
    mixed = {id(p) for m in banks.values() for p in (m.coefficients, m.projections, m.gains)}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        bank = banks.get(id(parameter))
        decays = (
            bank is not None or id(parameter) in differences or (parameter.ndim >= 2 and id(parameter) not in mixed)
        )
        factor = bank_rate(1.0, bank) if bank is not None and lr is not None else 1.0
        groups.setdefault((factor, decays), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay / factor if decays else 0.0}
        | ({} if lr is None else {"lr": lr * factor})
        for (factor, decays), parameters in groups.items()
    ]


def bank_rate(lr: float, bank: Bank) -> float:
    """The rate at which a bank learns under Adam where the dense model's is `lr`."""
    return lr * max(1.0, bank.group.numel / bank.group.size) ** _EXPONENT
