"""Checkpoints: folders of safetensors and JSON, written atomically, that load on any number of ranks and cannot run code.

A checkpoint `step-00000100/` holds

    model.safetensors      banks, trained parameters and buffers; a tied tensor once, under its first name
    optimizer.safetensors  the optimizer's tensors, each as `<key>/<name of the parameter>`
    plan.json              the plan of a shared model, `null` for a dense one
    recipe.json            the run's recipe
    state.json             step, counters, the optimizer's scalars, versions; size and SHA-256 of the other files; fingerprints of
                           the frozen parameters beside kept weights, which no file has
    base.safetensors       what the model keeps (`share.keep`), if `checkpoint.base` asks for it; nothing reads it

and with local updates

    sync.safetensors          what all processes hold in common: anchor, outer state, a mean that is on its way
    worker-00000.safetensors  a process's own state: parameters in a round that is not over, feedback, optimizer

`torch.distributed.checkpoint` is not used for the optimizer's state, because it keeps its metadata as a pickle.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_ssn.engines.base import Engine, OptimizerState
from dist_ssn.engines.overlap.delay import without_delay
from dist_ssn.errors import CheckpointError, describe
from dist_ssn.plan import Plan
from dist_ssn.sharing.bases import frozen_beside
from dist_ssn.sharing.columns import load_flat
from dist_ssn.sharing.plan_of import recorded_scales
from dist_ssn.sync.local_updates import LocalUpdates
from dist_ssn.train.checkpoint.damage import Damaged, read_checked, recipe_in, remedy, verified_state, verify
from dist_ssn.train.checkpoint.fit import check_base, check_plan, check_tensors, kept_parameters, shape_of
from dist_ssn.train.checkpoint.folder import latest, name_of
from dist_ssn.train.checkpoint.parts import COMMON, Part, read_state, write_part
from dist_ssn.train.checkpoint.parts import name_of as worker_file
from dist_ssn.train.checkpoint.snapshot import Entries, NotFinite, Snapshot, entries_of, take, write

__all__ = ["Damaged", "NotFinite", "State", "latest", "load", "load_model", "save"]

_LIKE_PARAMETER = (
    "exp_avg",
    "exp_avg_sq",
    "momentum_buffer",
)  # entries of an optimizer's state that have the shape of their parameter
_ADAM = frozenset({"step", "exp_avg", "exp_avg_sq"})
_NEEDED = {"Adam": _ADAM, "AdamW": _ADAM}  # entries that a parameter's state must have, unless it is empty


@dataclass(frozen=True)
class State:
    """Content of a checkpoint besides tensors."""

    path: Path
    step: int
    run: dict[str, Any]  # the run's own counters, as given to `save`
    recipe: dict[str, Any]


def save(
    folder: str | os.PathLike[str],
    *,
    step: int,
    engine: Engine,
    recipe_json: str,
    plan: Plan | None,
    keep: int = 2,
    run: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `folder/step-<step>` atomically, then removes all checkpoints but the newest `keep`.

    All processes call it: sharded state is gathered, and rank 0 writes. A training run does the same in two parts
    (`snapshot.py`), the second of them in the background.

    Args:
        folder: of the run's checkpoints.
        step: number of steps that were made.
        engine: holds model and optimizer.
        recipe_json: the recipe.
        plan: of the model, None if it is dense.
        keep: number of checkpoints to keep.
        run: counters of the run, as JSON.

    Returns:
        The checkpoint's path.

    Raises:
        NotFinite: a parameter is not finite.
        CheckpointError: it could not be written; earlier checkpoints are untouched and nothing is left over.
    """
    if keep < 1:
        raise CheckpointError(f"checkpoint.keep is {keep}: at least one checkpoint must be kept")
    snapshot = take(step=step, engine=engine, recipe_json=recipe_json, plan=plan, run=run)
    if isinstance(snapshot, Part):
        write_part(snapshot, Path(folder))
    return write(snapshot, folder, keep) if isinstance(snapshot, Snapshot) else Path(folder) / name_of(step)


def load(path: str | os.PathLike[str], *, engine: Engine, plan: Plan | None) -> State:
    """Loads a checkpoint into the model and optimizer of `engine`; if anything does not fit, nothing is loaded.

    Number of ranks and engine may differ from those that wrote it. The tensors of the optimizer, and of the outer one of local
    updates, are restored; their settings (learning rates, weight decay) stay, because the caller's recipe sets them.

    Args:
        path: a checkpoint, or a folder of checkpoints, of which the newest is loaded.
        engine: holds model and optimizer.
        plan: the plan of the engine's model, None if it is dense.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of another model, plan or optimizer.
    """
    model = engine.module
    path, state, entries, loaded = _fitting(Path(path), model, plan, engine.kept())
    trained = {name: shape_of(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}
    local, own_optimizer = _local_state(path, state, engine)
    optimizer_state = _optimizer_state(path, state["optimizer"], engine.optimizer, trained, own_optimizer)
    recipe = recipe_in(path)
    parameters = {name: loaded[entries.first_names[name]] for name, _ in model.named_parameters()}
    # The rest is outside of an engine: buffers, and values of modules that are not tensors.
    rest = {name: loaded[first] for name, first in entries.first_names.items() if first not in parameters}
    _put(model, {**rest, **entries.extra, **state["extra"]}, path)
    engine.scatter(parameters, optimizer_state)
    if engine.local is not None:
        _restore_local(engine.local, local, state["step"], path)
    return State(path, state["step"], state["run"], recipe)


def load_model(path: str | os.PathLike[str], model: nn.Module, plan: Plan | None) -> None:
    """Loads only the model of a checkpoint, into a model that no engine has prepared.

    Args:
        path: as for `load`.
        model: takes the tensors.
        plan: as for `load`.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of another model or plan.
    """
    path, state, entries, loaded = _fitting(Path(path), model, plan, frozen_beside(model))
    tensors = {name: loaded[first] for name, first in entries.first_names.items()}
    _put(model, {**tensors, **entries.extra, **state["extra"]}, path)


def _fitting(
    path: Path, model: nn.Module, plan: Plan | None, kept: Mapping[str, Tensor]
) -> tuple[Path, dict[str, Any], Entries, dict[str, Tensor]]:
    """A checkpoint (the newest one of a folder), its state, the entries of `model`, and the tensors, which fit the model.

    `kept`, the model's own frozen parameters beside its banks, take the places of those that the checkpoint has fingerprints of.
    """
    if not (path / "state.json").exists() and (newest := latest(path)) is not None:
        path = newest
    state = verified_state(path)
    check_plan(path, plan)
    entries = entries_of(model)
    loaded = read_checked(path / "model.safetensors")
    for name in entries.tensors.keys() - loaded.keys():
        if (scales := recorded_scales(loaded, name.removesuffix("scales"))) is not None:
            loaded[name] = torch.tensor(scales, dtype=torch.float32)
    load_flat(loaded, {name: shape_of(tensor) for name, tensor in entries.tensors.items()})
    loaded |= kept_parameters(
        path, state.get("kept", {}), {entries.first_names[name]: value for name, value in kept.items()}
    )
    check_tensors(path, loaded, entries.tensors)
    check_base(path, loaded, model)
    if strangers := sorted(state["extra"].keys() - entries.extra.keys()):
        raise CheckpointError(f"the checkpoint {path} is of another model: {strangers[0]} is not in this one")
    return path, state, entries, loaded


def _local_state(
    path: Path, state: dict[str, Any], engine: Engine
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The state of local updates for this process, and that of its optimizer; None for what the checkpoint or the run has not."""
    sync = state.get("sync")
    if sync is None or engine.local is None:
        return None, None
    workers = sync.get("workers") if isinstance(sync, dict) else None
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise Damaged(
            f"the checkpoint {path} is damaged: in state.json, sync must have a number of workers{remedy(path)}"
        )
    for name in (COMMON, worker_file(engine.rank if engine.rank < workers else 0)):
        verify(path, name, state["files"])
    try:
        return read_state(path, workers, engine.rank)
    except (OSError, ValueError) as error:
        raise Damaged(
            f"the checkpoint {path} is damaged: the state of local updates cannot be read ({error}){remedy(path)}"
        ) from None


def _restore_local(local: LocalUpdates, state: dict[str, Any] | None, step: int, path: Path) -> None:
    if state is None:
        return local.restart(step)
    try:
        _check_codec(local, state)
        # As of the optimizer, only tensors are restored. The caller compares recipes and says which settings differ.
        state["outer"]["param_groups"] = local.outer.state_dict()["param_groups"]
        state["settings"] = {}
        local.load_state_dict(state)
    except CheckpointError as error:
        raise CheckpointError(f"the checkpoint {path}: {error}") from None
    except (TypeError, KeyError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise Damaged(
            f"the checkpoint {path} is damaged: the state of local updates is malformed ({describe(error)}){remedy(path)}"
        ) from None


def _check_codec(local: LocalUpdates, state: dict[str, Any]) -> None:
    saved, mine = state["feedback"]["codec"], local.exchange.codec.name
    if saved != mine:
        raise CheckpointError(
            f"what its rounds have not sent yet is in the codec {saved}, and sync.codec is {mine}: set sync.codec={saved}"
        )


def _put(model: nn.Module, values: Mapping[str, Any], path: Path) -> None:
    try:
        model.load_state_dict(values, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"the checkpoint {path} does not fit this model: {' '.join(str(error).split())}"
        ) from None


def _optimizer_state(
    path: Path,
    saved: dict[str, Any],
    optimizer: Optimizer,
    trained: Mapping[str, Any],
    own: dict[str, Any] | None,
) -> OptimizerState:
    """The optimizer's state by parameter name, checked.

    Args:
        path: of the checkpoint, for messages.
        saved: the optimizer's entry in state.json.
        optimizer: of this run.
        trained: name → shape, of each trainable parameter.
        own: tensors and scalars of this process instead of those that all share.
    """
    if not isinstance(saved.get("scalars"), dict) or not isinstance(saved.get("class"), str):
        raise CheckpointError(
            f"the checkpoint {path} is damaged: in state.json, optimizer must have a class and scalars{remedy(path)}"
        )
    if saved["class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"the checkpoint {path} was written with the optimizer {saved['class']} and this run uses "
            f"{type(optimizer).__name__}: set optimizer.name as it was"
        )
    state: OptimizerState = {}
    whole = {"tensors": read_checked(path / "optimizer.safetensors"), **saved} if own is None else own
    load_flat(
        whole["tensors"], {e: trained[name] for e in whole["tensors"] if (name := e.partition("/")[2]) in trained}
    )
    for entry, value in {**whole["tensors"], **whole["scalars"]}.items():
        key, _, name = entry.partition("/")
        state.setdefault(name, {})[key] = value
    if strangers := sorted(state.keys() - trained):
        raise CheckpointError(
            f"the checkpoint {path} has optimizer state for {strangers[0]}, which this run's optimizer does not train"
        )
    needed = _NEEDED.get(saved["class"], frozenset[str]())
    for name, entries in without_delay(state).items():
        if entries and (missing := sorted(needed - entries.keys())):
            raise CheckpointError(
                f"the checkpoint {path} is damaged: the optimizer's state of {name} has no {missing[0]}{remedy(path)}"
            )
        if "step" in entries and not _is_number(entries["step"]):
            raise CheckpointError(
                f"the checkpoint {path} is damaged: the optimizer's step of {name} is not one number{remedy(path)}"
            )
        for key, value in entries.items():
            shape = tuple(getattr(value, "shape", ()))
            if key in _LIKE_PARAMETER and shape != tuple(trained[name]):
                raise CheckpointError(
                    f"the checkpoint {path} is of another model: {key} of {name} has the shape {shape} there and "
                    f"{tuple(trained[name])} here"
                )
    return state


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.is_floating_point() and bool(value.isfinite())
    return isinstance(value, (int, float)) and math.isfinite(value)
