"""What a checkpoint will hold, copied out of a run between two steps; and writing it, which needs the run no more.

Copying takes as long as reading the banks once; writing can take as long as it likes, on another thread.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_ssn.engines.base import Engine, OptimizerState
from dist_ssn.errors import CheckpointError
from dist_ssn.plan import Plan
from dist_ssn.train.checkpoint import folder as folders

FORMAT = 1


class NotFinite(CheckpointError):
    """A parameter is no number any more, so that nobody could go on from it."""


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint, on the CPU, in memory of its own.

    Args:
        step: steps that were made
        model: tensors of `model.safetensors`, by name
        optimizer: tensors of `optimizer.safetensors`, as `<key>/<name of the parameter>`
        texts: the other files but `state.json`, by name
        state: what `state.json` says of the run, the modules and the optimizer
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    texts: dict[str, str]
    state: dict[str, Any]


def take(
    *, step: int, engine: Engine, recipe_json: str, plan: Plan | None, run: Mapping[str, Any] | None = None
) -> Snapshot | None:
    """A snapshot on rank 0, None on the others: all processes call it, and what they hold in parts comes together.

    Raises:
        NotFinite: a parameter is not finite.
        CheckpointError: the model keeps what no checkpoint can hold.
    """
    parameters, optimizer_state = engine.gathered()
    if engine.rank != 0:
        return None
    if bad := [name for name, tensor in parameters.items() if not torch.isfinite(tensor).all()]:
        raise NotFinite(f"after step {step} {bad[0]} is not finite, so no checkpoint was written")
    entries = entries_of(engine.module)
    tensors = {**entries.tensors, **{entries.first_names[name]: tensor for name, tensor in parameters.items()}}
    optimizer_tensors, scalars = _sorted_out(optimizer_state)
    return Snapshot(
        step,
        {name: _copied(tensor) for name, tensor in tensors.items()},
        {name: _copied(tensor) for name, tensor in optimizer_tensors.items()},
        {"plan.json": "null" if plan is None else plan.to_json(), "recipe.json": recipe_json},
        {
            "run": dict(run or {}),
            "extra": entries.extra,
            "optimizer": {"class": type(engine.optimizer).__name__, "scalars": scalars},
        },
    )


def write(snapshot: Snapshot, folder: str | os.PathLike[str], keep: int) -> Path:
    """Writes `folder/step-<step>` so that it appears whole or not at all, then removes all but the newest `keep`.

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
            (temporary / name).write_text(text)
        state = {
            "format": FORMAT,
            "step": snapshot.step,
            **snapshot.state,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "files": {file.name: folders.fingerprint(file) for file in sorted(temporary.iterdir())},
        }
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        for path in (*temporary.iterdir(), temporary):
            folders.to_disk(path)
        if target.exists():
            folders.set_aside(target)
        os.replace(temporary, target)
        folders.to_disk(folder)
        for old in folders.checkpoints(folder)[:-keep]:
            folders.set_aside(old)
        folders.clean(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"cannot write the checkpoint {target}: {error}; earlier checkpoints are untouched, "
            f"so make room or correct the path and resume"
        ) from error
    return target


def _copied(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that owns its memory: the next step changes the original."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Entries:
    """A model's `state_dict`, sorted out."""

    tensors: dict[str, Tensor]  # tied ones once, under their first name
    first_names: dict[str, str]  # every tensor's name → the name under which it is in `tensors`
    extra: dict[str, Any]  # what modules keep beside tensors


def entries_of(model: nn.Module) -> Entries:
    """Raises: CheckpointError, when a module keeps what is neither tensor nor JSON."""
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


def _sorted_out(state: OptimizerState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as `<key>/<name of the parameter>`: its tensors, and its plain numbers."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, entries in state.items():
        for key, value in entries.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{key}/{name}"] = value
    return tensors, scalars
