"""`BankSet`: all banks of a shared model, as one module of its root, with the plan that they follow."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_ssn.errors import PlanError, ShareError
from dist_ssn.plan import Plan
from dist_ssn.plan.compare import plan_difference
from dist_ssn.plan.scales import Scales
from dist_ssn.sharing.agreement import agree_under_deepspeed
from dist_ssn.sharing.bank import Bank
from dist_ssn.sharing.plan_of import plan_in


class BankSet(nn.Module):
    """All banks of a model, and the plan that they follow. Returns its input if a container calls it."""

    trained_whole: tuple[str, ...] = ()
    """Names of the parameters that `share(keep=True)` trains whole beside the banks."""

    def __init__(
        self,
        plan: Plan,
        scales: Mapping[str, Scales],
        left_out: tuple[tuple[str, str], ...],
        device: torch.device,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.plan, self.left_out = plan, left_out
        for group in plan.groups:
            if hasattr(self, group.name):
                raise PlanError(f"group name {group.name!r} is taken by torch.nn.Module: choose another")
            self.add_module(group.name, Bank(group, plan.seed, device, dtype, scales[group.name]))

    def banks(self) -> Iterator[Bank]:
        """The banks, in the plan's order."""
        for group in self.plan.groups:
            yield self.get_submodule(group.name)  # type: ignore[misc]

    def begin_forward(self) -> None:
        """A forward of the model begins: weights that are generated once per forward are out of date.

        A bank that some form of FSDP gathers for one layer only is not whole during the forward, so it generates on demand.
        """
        agree_under_deepspeed(self.banks())
        for bank in self.banks():
            whole = bank._parameters.get("bank")
            if bank.per_step is not None and whole is not None and not hasattr(whole, "device_mesh"):
                bank.per_step.begin(whole.device.type)

    def end_forward(self) -> None:
        """The forward has ended, perhaps by an exception."""
        for bank in self.banks():
            if bank.per_step is not None:
                bank.per_step.end()

    def begin_compiled(self) -> None:
        """As `begin_forward`, in a graph that torch.compile makes."""
        for bank in self.banks():
            bank.compile_all()

    def end_compiled(self) -> None:
        """As `end_forward`, in a graph that torch.compile makes."""
        for bank in self.banks():
            bank.compiled = None

    def forward(self, input: Any = None) -> Any:
        """Returns its input."""
        return input

    def get_extra_state(self) -> Tensor:
        """The plan as bytes, so that a state dict contains its plan.

        The bytes are floating-point numbers, so that a mean of state dicts, or one in half precision, still contains the plan.
        Loading in place (`torch.distributed.checkpoint.load`) writes into this tensor, so that the next read of a weight checks it.
        """
        with torch.inference_mode(False):  # inference tensors don't count their versions
            state = torch.frombuffer(bytearray(self.plan.to_json(indent=None).encode()), dtype=torch.uint8).float()
        written, me = state._version, weakref.ref(self)

        def check() -> None:
            nonlocal written
            if state._version != written and (banks := me()) is not None:
                banks.set_extra_state(state)
                written = state._version

        for bank in self.banks():
            bank.check_plan = check
        return state

    def set_extra_state(self, state: Tensor) -> None:
        """Checks that a state dict belongs to this plan.

        Args:
            state: the plan's bytes, as integers or as floating-point numbers.

        Raises:
            PlanError: it belongs to another plan; the message has the first difference.
        """
        for bank in self.banks():
            bank.at_start = False
        difference = plan_difference(self.plan, plan_in(state))
        if difference:
            raise PlanError(
                f"the state dict belongs to another plan: {difference}; build the model with share(model, plan=…)"
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], strict: bool, *lists: list[str]
    ) -> None:
        """Loads the plan; warns of banks without one, which is what a filter by shapes may leave of a state dict."""
        key = f"{prefix}_extra_state"
        if key not in state_dict and any(f"{prefix}{group.name}.scales" in state_dict for group in self.plan.groups):
            warnings.warn(
                f"this state dict has banks but not their plan, {key}: where the plan differs from the model's, the weights are "
                "noise. Load the whole state dict, or first compare plan_of(state_dict) with shared_plan(model)",
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)


def bank_sets(model: nn.Module) -> list[BankSet]:
    """All bank sets of a model: one if it was shared as a whole, none if it is dense."""
    return [module for module in model.modules() if isinstance(module, BankSet)]


def shared_plan(model: nn.Module) -> Plan | None:
    """The plan of a shared model (wrapped or not); None for a dense one.

    Raises:
        ShareError: several parts of the model were shared separately, each with its own plan.
    """
    sets = bank_sets(model)
    if len(sets) > 1:
        raise ShareError(
            f"{type(model).__name__} has {len(sets)} parts that were shared separately: call shared_plan() for each part"
        )
    return sets[0].plan if sets else None
