"""Checks of a saved state of local updates, before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_ssn.errors import CheckpointError
from dist_ssn.sharing.bank_set import shared_plan
from dist_ssn.sharing.columns import COLUMNS
from dist_ssn.sync.anchor import Anchor
from dist_ssn.sync.replica import Replica

FORMAT = 1
KEYS = {
    "format": int,
    "plan": str,
    "shapes": dict,
    "workers": int,
    "place": int,
    "step": int,
    "outer_class": str,
    "outer": dict,
    "feedback": dict,
    "anchor": list,
    "parameters": list,
    "start": list,
    "buffers": dict,
    "own_buffers": dict,
    "sent": dict,
    "settings": dict,
}
"""Entries of a state, with their types."""
OWN = ("workers", "place", "feedback", "parameters", "start", "own_buffers")
"""Entries that each worker has for itself; all others are the same on all."""


def plan_of(model: nn.Module) -> str:
    """Fingerprint of the model's plan; "dense" without a plan."""
    plan = shared_plan(model)
    return "dense" if plan is None else plan.fingerprint


def shapes_of(anchor: Anchor) -> dict[str, list[int]]:
    """Name → shape of the trained parameters on this process, in the anchor's order."""
    return {t.name: list(t.values.shape) for t in anchor.trained}


def on_device(value: Any, device: torch.device) -> Any:
    """A nested value with its tensors on this device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: on_device(part, device) for key, part in value.items()}
    return [on_device(part, device) for part in value] if isinstance(value, list) else value


def check_state(state: Mapping[str, Any], model: nn.Module, replica: Replica, outer: Optimizer) -> None:
    """Checks that a state belongs to this model, plan and outer optimizer, before anything of it is loaded.

    Raises:
        CheckpointError: it does not, or it is not a state of local updates.
    """
    _check_entries(state)
    _check_model(state, model, replica)
    if state["outer_class"] != (kind := type(outer).__name__):
        raise CheckpointError(
            f"the state of LocalUpdates was saved with the outer optimizer {state['outer_class']}, and this one is {kind}: give "
            "the same outer"
        )
    _check_parts(state, replica.anchor, outer)


def _check_entries(state: Mapping[str, Any]) -> None:
    """Checks the format, and the types of all entries."""
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(
            f"this is no state of LocalUpdates that this version reads (format {found}, needed is {FORMAT})"
        )
    for key, kind in KEYS.items():
        found = state.get(key, {} if key == "settings" else None)  # earlier states have none
        if not isinstance(found, kind) or isinstance(found, bool):
            raise CheckpointError(f"the state of LocalUpdates is damaged: {key} must be of type {kind.__name__}")


def _check_model(state: Mapping[str, Any], model: nn.Module, replica: Replica) -> None:
    """Checks the plan, and the shapes of parameters and averaged buffers."""
    if state["plan"] != plan_of(model):
        raise CheckpointError(
            f"the state of LocalUpdates is of another plan ({state['plan']}, the model's is {plan_of(model)}): share the model "
            "with the plan that it was saved with"
        )
    mine, saved = shapes_of(replica.anchor), state["shapes"]
    for name in (*mine, *saved):
        if (shape := mine.get(name)) != (other := saved.get(name)) and not _was_flat(name, shape, other):
            raise CheckpointError(
                f"the state of LocalUpdates is of another model: {name} has the shape {_shown(other)} there and "
                f"{_shown(shape)} here"
            )
    if list(mine) != list(saved):
        raise CheckpointError("the state of LocalUpdates is of another model: its parameters have another order")
    for name, buffer in replica.buffers.base.items():
        for key in ("buffers", "own_buffers"):
            if (shape := getattr(state[key].get(name, buffer), "shape", None)) != buffer.shape:
                raise CheckpointError(
                    f"the state of LocalUpdates is of another model: the buffer {name} has the shape {_shown(shape)} there and "
                    f"{_shown(buffer.shape)} here"
                )


def _check_parts(state: Mapping[str, Any], anchor: Anchor, outer: Optimizer) -> None:
    """Checks the tensors of a state of this model, and what is beside them."""
    flats, trained = [flat.numel() for flat in anchor.flats], [t.values.numel() for t in anchor.trained]
    for key, sizes in (("anchor", flats), ("parameters", trained), ("start", trained)):
        if _sizes(state[key]) != sizes and (key == "anchor" or state[key]):
            raise CheckpointError(f"the state of LocalUpdates is damaged: its {key} must have {sizes} elements")
    sent, saved = state["sent"], state["outer"]
    groups, entries = saved.get("param_groups"), saved.get("state")
    if not isinstance(groups, list) or not isinstance(entries, dict) or len(groups) != len(outer.param_groups):
        raise CheckpointError("the state of LocalUpdates is damaged: outer must be the state_dict() of an optimizer")
    kinds = {"mean": Tensor, "norms": list, "left_out": list, "step": int}
    if sent and (
        not all(isinstance(sent.get(key), kind) for key, kind in kinds.items()) or len(sent["mean"]) != anchor.size
    ):
        raise CheckpointError(
            f"the state of LocalUpdates is damaged: sent must have a mean of {anchor.size} values, norms, left_out and step"
        )


def _sizes(tensors: list[Any]) -> list[int]:
    return [tensor.numel() if isinstance(tensor, Tensor) else -1 for tensor in tensors]


def changed(others: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The settings that differ from the others, such as "lr 0.7 (not 1.0)"; "" if none does."""
    both = (key for key in settings if key in others and settings[key] != others[key])
    return ", ".join(f"{key} {settings[key]} (not {others[key]})" for key in both)


def outer_settings(outer: Optimizer, state: Mapping[str, Any]) -> str:
    """The settings of a saved outer optimizer that differ from this one's, such as "lr 0.7 (not 1.0)"; "" if none does."""
    return changed(_settings_of(outer.state_dict()), _settings_of(state))


def _settings_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the outer optimizer's first group."""
    groups = state.get("param_groups") or [{}]
    return {key: value for key, value in groups[0].items() if key != "params" and isinstance(value, bool | int | float)}


def _was_flat(name: str, shape: list[int] | None, other: Any) -> bool:
    """True for a column that was flat in version 0.1.0."""
    return shape is not None and name.rpartition(".")[2] in COLUMNS and isinstance(other, list) and [*other, 1] == shape


def _shown(shape: Sequence[int] | None) -> str:
    return "no place" if shape is None else str(tuple(shape))
