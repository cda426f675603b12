"""Snapshots: a copy of a run's state, taken between two steps, and writing it as a checkpoint while the run goes on.

Copying takes as long as reading the banks once. Writing happens on another thread and may take longer.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_ssn.engines.base import Engine, OptimizerState
from dist_ssn.errors import CheckpointError
from dist_ssn.plan import Plan
from dist_ssn.sharing.bases import fingerprint, kept_values
from dist_ssn.train.checkpoint import folder as folders
from dist_ssn.train.checkpoint.parts import COMMON, Part, collect, name_of, split_state

FORMAT = 1
BASE = "base.safetensors"
"""File of the values that a model keeps, by their names in the dense model, if a run wants it."""


class NotFinite(CheckpointError):
    """A parameter is not finite, so that the run could not resume from it."""


@dataclass(frozen=True)
class Snapshot:
    """Content of a checkpoint, on the CPU, in memory of its own.

    Args:
        step: number of steps that were made.
        model: tensors of `model.safetensors`, by name.
        optimizer: tensors of `optimizer.safetensors`, as `<key>/<name of the parameter>`.
        texts: text of the other files except `state.json`, by name.
        state: entries of `state.json` for the run, the modules and the optimizer.
        parts: tensors of further files, by name: what local updates need.
        workers: number of processes that write a part of their own; 0 without local updates.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    texts: dict[str, str]
    state: dict[str, Any]
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    workers: int = 0


def take(
    *,
    step: int,
    engine: Engine,
    recipe_json: str,
    plan: Plan | None,
    run: Mapping[str, Any] | None = None,
    base: bool = False,
) -> Snapshot | Part | None:
    """Takes a snapshot. All processes call it, and sharded state is gathered.

    With local updates, the model in it is that of the last round.

    Args:
        step: number of steps that were made.
        engine: holds model and optimizer.
        recipe_json: the recipe.
        plan: of the model, None if it is dense.
        run: counters of the run, as JSON.
        base: with the values that the model keeps, in a file of their own.

    Returns:
        The snapshot on rank 0. On the other ranks None, or their parts with local updates.

    Raises:
        NotFinite: a parameter is not finite.
        CheckpointError: the model's state has a value that is neither a tensor nor JSON.
    """
    common, own = _local_state(engine)
    with engine.common():
        parameters, optimizer_state = engine.gathered()
        kept = engine.kept()
        if engine.rank != 0:
            return Part(step, engine.rank, own) if own else None
        taken = _taken(step, engine, parameters, optimizer_state, kept)
    texts = {"plan.json": "null" if plan is None else plan.to_json(), "recipe.json": recipe_json}
    parts = {COMMON: common, name_of(0): own} if own else {}
    if base and (values := kept_values(engine.module, kept)):
        parts[BASE] = {name: _copied(value) for name, value in values.items()}
    workers = engine.world_size if own else 0
    sync = {"sync": {"workers": workers}} if own else {}
    return replace(
        taken, texts=texts, state={"run": dict(run or {}), **taken.state, **sync}, parts=parts, workers=workers
    )


def _local_state(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of the tensors of local updates that all processes have in common, and of this one's own; empty without them."""
    if engine.local is None:
        return {}, {}
    tensors, scalars = _split_state(engine.gathered()[1])
    found = split_state(engine.local.state_dict(), {"tensors": tensors, "scalars": scalars})
    common, own = ({name: _copied(tensor) for name, tensor in part.items()} for part in found)
    return common, own


def _taken(
    step: int,
    engine: Engine,
    parameters: dict[str, Tensor],
    optimizer_state: OptimizerState,
    kept: Mapping[str, Tensor],
) -> Snapshot:
    """Copies of the model and of the optimizer's state; fingerprints of what it keeps beside its banks."""
    if bad := [name for name, tensor in parameters.items() if not torch.isfinite(tensor).all()]:
        raise NotFinite(f"after step {step} {bad[0]} is not finite, so no checkpoint was written")
    entries = entries_of(engine.module)
    tensors = {**entries.tensors, **{entries.first_names[name]: tensor for name, tensor in parameters.items()}}
    for name in kept:
        del tensors[entries.first_names[name]]
    optimizer_tensors, scalars = _split_state(optimizer_state)
    return Snapshot(
        step,
        {name: _copied(tensor) for name, tensor in tensors.items()},
        {name: _copied(tensor) for name, tensor in optimizer_tensors.items()},
        {},
        {
            "extra": entries.extra,
            **(
                {"kept": {entries.first_names[name]: fingerprint(tensor) for name, tensor in kept.items()}}
                if kept
                else {}
            ),
            "optimizer": {"class": type(engine.optimizer).__name__, "scalars": scalars},
        },
    )


def write(
    snapshot: Snapshot, folder: str | os.PathLike[str], keep: int, give_up: Callable[[], bool] = lambda: False
) -> Path:
    """Writes `folder/step-<step>` atomically, then removes all checkpoints but the newest `keep`.

    Args:
        snapshot: the content.
        folder: of the run's checkpoints.
        keep: number of checkpoints to keep.
        give_up: True when the other processes' parts are not waited for any more.

    Returns:
        The checkpoint's path.

    Raises:
        CheckpointError: it could not be written; earlier checkpoints are untouched and nothing is left over.
    """
    folder = Path(folder)
    target = folder / folders.name_of(snapshot.step)
    temporary = folders.temporary(target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folders.clean(folder)
        temporary.mkdir()
        save_file(snapshot.model, temporary / "model.safetensors")
        save_file(snapshot.optimizer, temporary / "optimizer.safetensors")
        for name, text in snapshot.texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        for name, tensors in snapshot.parts.items():
            save_file(tensors, temporary / name)
        collect(folder, snapshot.step, snapshot.workers, temporary, give_up)
        state = {
            "format": FORMAT,
            "step": snapshot.step,
            **snapshot.state,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "files": {file.name: folders.size_and_hash(file) for file in sorted(temporary.iterdir())},
        }
        (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            folders.sync(path)
        if target.exists():
            folders.set_aside(target)
        os.replace(temporary, target)
        folders.sync(folder)
        for old in folders.checkpoints(folder)[:-keep]:
            folders.set_aside(old)
        folders.clean(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"cannot write the checkpoint {target}: {error}; earlier checkpoints are untouched, "
            f"so free some disk space or correct the path, and resume"
        ) from error
    return target


def _copied(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that owns its memory: the next step changes the original."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Entries:
    """A model's `state_dict`, with tied tensors and other values separated.

    Args:
        tensors: name → tensor; a tied tensor once, under its first name.
        first_names: name of every tensor → its name in `tensors`.
        extra: name → value, of entries that are not tensors.
    """

    tensors: dict[str, Tensor]
    first_names: dict[str, str]
    extra: dict[str, Any]


def entries_of(model: nn.Module) -> Entries:
    """The entries of a model's `state_dict`.

    Raises:
        CheckpointError: a value is neither a tensor nor JSON.
    """
    entries = Entries({}, {}, {})
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)  # the parameters themselves: ties are found by identity
    for name, value in state.items():
        if isinstance(value, Tensor):
            entries.first_names[name] = first.setdefault(id(value), name)
            entries.tensors.setdefault(first[id(value)], value)
            continue
        try:
            entries.extra[name] = json.loads(json.dumps(value))
        except TypeError:
            raise CheckpointError(
                f"{name} is of type {type(value).__name__}: a checkpoint holds tensors and JSON only, so that "
                "loading it cannot run code"
            ) from None
    return entries


def _split_state(state: OptimizerState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as `<key>/<name of the parameter>`: its tensors, and its scalars."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, entries in state.items():
        for key, value in entries.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{key}/{name}"] = value
    return tensors, scalars
