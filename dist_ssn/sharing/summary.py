"""`summary`: sizes of a model, shared or dense, and the parameters that are not shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dist_ssn.plan import Plan
from dist_ssn.sharing.bank_set import bank_sets


@dataclass(frozen=True)
class Summary:
    """Sizes of a model.

    Args:
        parameters: number of trainable parameters.
        own_parameters: number of trainable parameters that belong to no bank.
        plans: plan of each shared part; empty for a dense model.
        left_out: (name, reason) of each parameter of two or more dimensions that is not shared.
    """

    parameters: int
    own_parameters: int
    plans: tuple[Plan, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def plan(self) -> Plan | None:
        """The plan of a model that was shared as a whole."""
        return self.plans[0] if len(self.plans) == 1 else None

    def __str__(self) -> str:
        if not self.plans:
            return f"dense model, {self.parameters:,} trainable parameters"
        plans = ", and ".join(map(str, self.plans))
        text = f"{self.parameters:,} trainable parameters: {plans}, and {self.own_parameters:,} of the model's own"
        text += f"; left as they are: {left_out_text(self.left_out)}" if self.left_out else ""
        return f"{text}; optimizer: dist_ssn.parameter_groups(model, lr=...)"


def summary(model: nn.Module) -> Summary:
    """Counts the trainable parameters of a model, shared or dense."""
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sets = bank_sets(model)
    shared = sum(p.numel() for banks in sets for p in banks.parameters() if p.requires_grad)
    left_out = tuple(entry for banks in sets for entry in banks.left_out)
    return Summary(total, total - shared, tuple(banks.plan for banks in sets), left_out)


def left_out_text(left_out: Sequence[tuple[str, str]], most: int = 8) -> str:
    """The parameters that are not shared, with the reasons, as one line."""
    more = f", and {len(left_out) - most} more" if len(left_out) > most else ""
    return ", ".join(f"{name} ({reason})" for name, reason in left_out[:most]) + more
