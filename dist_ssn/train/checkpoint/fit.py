"""Checks that a checkpoint belongs to a model: its plan, its tensors, and the values that it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dist_ssn.errors import CheckpointError, ShareError
from dist_ssn.plan import Plan
from dist_ssn.plan.compare import plan_difference
from dist_ssn.sharing.bank import Bank
from dist_ssn.sharing.bases import fingerprint
from dist_ssn.train.checkpoint.damage import Damaged, remedy, text_of


def check_plan(path: Path, plan: Plan | None) -> None:
    """Checks that a checkpoint is of this plan; None: of a dense model."""
    text = text_of(path / "plan.json")
    saved = None if text.strip() == "null" else Plan.from_json(text)
    if saved is None and plan is None:
        return
    if saved is None or plan is None:
        there, here = ("dense", "shared") if saved is None else ("shared", "dense")
        raise CheckpointError(
            f"the checkpoint {path} is of a {there} model and this model is {here}: set share.budget as it was"
        )
    if difference := plan_difference(plan, saved):
        raise CheckpointError(
            f"the checkpoint {path} is of another plan: {difference}; set share.plan to its plan.json, or give another name"
        )


def check_tensors(path: Path, loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Checks that a checkpoint has the tensors that a model expects, by name, kind and shape."""
    missing, unknown = sorted(expected.keys() - loaded.keys()), sorted(loaded.keys() - expected.keys())
    if missing or unknown:
        parts = [
            f"{len(names)} {what}, the first is {names[0]}"
            for names, what in (
                (missing, "tensors of the model are not in it"),
                (unknown, "of its tensors are not in the model"),
            )
            if names
        ]
        raise CheckpointError(f"the checkpoint {path} is of another model: {'; '.join(parts)}")
    for name, tensor in expected.items():
        if name.endswith("_extra_state"):  # which its module reads and checks itself
            continue
        shape = shape_of(tensor)
        if loaded[name].is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(
                f"the checkpoint {path} is of another model: {name} is of {loaded[name].dtype} there and {tensor.dtype} here"
            )
        if loaded[name].shape != shape:
            raise CheckpointError(
                f"the checkpoint {path} is of another model: {name} has the shape {tuple(loaded[name].shape)} there "
                f"and {tuple(shape)} here"
            )


def check_base(path: Path, loaded: Mapping[str, Tensor], model: nn.Module) -> None:
    """Checks that a checkpoint was trained on the values that the banks of `model` keep."""
    try:
        for name, module in model.named_modules():
            if isinstance(module, Bank) and module.bases is not None:
                module.require_base(loaded[f"{name}.fingerprints"], f"the checkpoint {path} was")
    except ShareError as error:
        raise CheckpointError(str(error)) from None


def kept_parameters(path: Path, prints: Any, mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of `mine` whose fingerprints a checkpoint has, checked."""
    if not isinstance(prints, dict):
        raise Damaged(f"the checkpoint {path} is damaged: in state.json, kept must be of type dict{remedy(path)}")
    found = {name: value for name, value in mine.items() if name in prints}
    if others := [name for name, value in found.items() if fingerprint(value) != prints[name]]:
        raise CheckpointError(
            f"the checkpoint {path} was trained on other kept values of {others[0]} ({len(others)} of {len(found)} frozen "
            "parameters differ): load the same pretrained values, in the same dtype, before share(model, keep=True)"
        )
    return found


def shape_of(tensor: Tensor) -> Any:
    """A parameter's shape; DeepSpeed's stage 3 empties the parameter and keeps its shape in another attribute."""
    return getattr(tensor, "ds_shape", tensor.shape)
