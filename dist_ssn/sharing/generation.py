"""`set_generation`: when a shared model generates its weights, each on demand or all once per forward."""

from __future__ import annotations

from typing import Any

from torch import nn

from dist_ssn.errors import ShareError, unknown_choice
from dist_ssn.sharing.bank_set import BankSet, bank_sets
from dist_ssn.torch_private import builds_graph, is_tracing

MODES = ("auto", "on_demand", "per_step")


def set_generation(model: nn.Module, mode: str = "auto") -> None:
    """Chooses when the weights of a shared model are generated; it can be changed between any two steps.

    Args:
        model: a shared model, or one that contains shared parts.
        mode: "on_demand": a layer generates its weight when it runs, and again in backward; no copy of the weights is alive.
            "per_step": every forward of the shared model generates all weights of a bank at once, and keeps them until its
            backward: fewer and larger operations, and the memory of one copy of the weights. "auto": per_step for each bank
            whose weights are small for its device (`per_step.SMALL`).

    Raises:
        ShareError: the model is not shared, or the mode is unknown.
    """
    check_mode(mode)
    found = bank_sets(model)
    if not found:
        raise ShareError(f"{type(model).__name__} is not shared: call share() first")
    for banks in found:
        for bank in banks.banks():
            bank.generate_per_step(mode != "on_demand", only_small=mode == "auto")


def check_mode(mode: str) -> None:
    """Checks the name of a mode.

    Raises:
        ShareError: it is unknown.
    """
    if mode not in MODES:
        raise ShareError(unknown_choice("generate", mode, MODES))


def watch_forward(model: nn.Module, banks: BankSet) -> None:
    """Tells the banks when a forward of the shared model begins and ends."""
    model.register_forward_pre_hook(_Begin(banks))
    model.register_forward_hook(_End(banks), always_call=True)


def unwatch_forward(model: nn.Module) -> None:
    """Removes what `watch_forward` has registered."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for number in [number for number, hook in hooks.items() if isinstance(hook, (_Begin, _End))]:
            del hooks[number]
            model._forward_hooks_always_called.pop(number, None)


class _Begin:
    def __init__(self, banks: BankSet):
        self.banks = banks

    def __call__(self, model: nn.Module, args: Any) -> None:
        if builds_graph():
            self.banks.begin_compiled()
        elif not is_tracing():
            self.banks.begin_forward()


class _End:
    def __init__(self, banks: BankSet):
        self.banks = banks

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        if builds_graph():
            self.banks.end_compiled()
        elif not is_tracing():
            self.banks.end_forward()
