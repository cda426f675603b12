"""Checkpoints: folders of safetensors and JSON, whole or absent, that load on any number of ranks and cannot run code.

A checkpoint `step-00000100/` holds

    model.safetensors      banks, own parameters and buffers; a tied tensor once, under its first name
    optimizer.safetensors  the optimizer's tensors, each as `<key>/<name of the parameter>`
    plan.json              the plan of a shared model, `null` for a dense one
    recipe.json            what the run was asked to do
    state.json             step, counters, the optimizer's plain numbers, versions; size and SHA-256 of the others

The optimizer's state is not written by `torch.distributed.checkpoint`, which keeps its metadata as a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_ssn import errors
from dist_ssn.engines.protocol import Engine, OptimizerState
from dist_ssn.errors import CheckpointError, UserError
from dist_ssn.plan import Plan
from dist_ssn.share import plan_difference

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_SENTENCE_BYTES = 2048  # what a failing rank may tell the others
_STATE = {"step": int, "run": dict, "extra": dict, "optimizer": dict, "files": dict}  # the fields of state.json
T = TypeVar("T")


class NotFinite(CheckpointError):
    """A parameter is no number any more, so that nobody could go on from it."""


@dataclass(frozen=True)
class State:
    """What a checkpoint tells besides tensors."""

    path: Path
    step: int
    run: dict[str, Any]  # the run's own counters, as given to `save`
    recipe: dict[str, Any]


# ---------------------------------------------------------------- writing


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
    """Writes `folder/step-<step>` so that it appears whole or not at all, then removes all but the newest `keep`.

    All processes call it, and what they hold in parts comes together; rank 0 writes.

    Args:
        run: counters of the run, as JSON.

    Returns: the checkpoint's path.

    Raises:
        NotFinite: a parameter is not finite.
        CheckpointError: it could not be written; earlier checkpoints are untouched and nothing is left over.
    """
    folder = Path(folder)
    if keep < 1:
        raise CheckpointError(f"checkpoint.keep is {keep}: at least one checkpoint must be kept")
    target = folder / f"step-{step:08d}"
    parameters, optimizer_state = engine.gathered()
    if engine.rank != 0:
        return target
    if bad := [name for name, tensor in parameters.items() if not torch.isfinite(tensor).all()]:
        raise NotFinite(f"after step {step} {bad[0]} is not finite, so no checkpoint was written")
    temporary = _temporary(target)
    entries = _entries(engine.module)
    tensors = {**entries.tensors, **{entries.first_names[name]: tensor for name, tensor in parameters.items()}}
    optimizer_tensors, scalars = _sorted_out(optimizer_state)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clean(folder)
        temporary.mkdir()
        save_file({name: _plain(tensor) for name, tensor in tensors.items()}, temporary / "model.safetensors")
        save_file(
            {name: _plain(tensor) for name, tensor in optimizer_tensors.items()}, temporary / "optimizer.safetensors"
        )
        (temporary / "plan.json").write_text("null" if plan is None else plan.to_json())
        (temporary / "recipe.json").write_text(recipe_json)
        state = {
            "format": FORMAT,
            "step": step,
            "run": dict(run or {}),
            "extra": entries.extra,
            "optimizer": {"class": type(engine.optimizer).__name__, "scalars": scalars},
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "files": {file.name: _fingerprint(file) for file in sorted(temporary.iterdir())},
        }
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        for path in (*temporary.iterdir(), temporary):
            _to_disk(path)
        if target.exists():
            _set_aside(target)
        os.replace(temporary, target)
        _to_disk(folder)
        for _, old in _steps(folder)[:-keep]:
            _set_aside(old)
        _clean(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"cannot write the checkpoint {target}: {error}; earlier checkpoints are untouched, "
            f"so make room or correct the path and resume"
        ) from error
    return target


def _temporary(target: Path) -> Path:
    return target.parent / f".{target.name}.{os.getpid()}.tmp"


def _set_aside(checkpoint: Path) -> None:
    """Renames a checkpoint to a leftover, in one step: a kill while it is being removed must not leave half of it."""
    os.replace(checkpoint, checkpoint.parent / f".{checkpoint.name}.old.tmp")


def _clean(folder: Path) -> None:
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _plain(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor that owns its memory: safetensors refuses views into a shared storage."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


@dataclass(frozen=True)
class _Entries:
    """A model's `state_dict`, sorted out."""

    tensors: dict[str, Tensor]  # tied ones once, under their first name
    first_names: dict[str, str]  # every tensor's name → the name under which it is in `tensors`
    extra: dict[str, Any]  # what modules keep beside tensors


def _entries(model: nn.Module) -> _Entries:
    entries = _Entries({}, {}, {})
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


# ---------------------------------------------------------------- finding and reading


def _steps(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint in `folder`, None if there is none; what a killed save left over is not looked at."""
    found = _steps(Path(folder))
    return found[-1][1] if found else None


def load(path: str | os.PathLike[str], *, engine: Engine, plan: Plan | None) -> State:
    """Loads a checkpoint into what `engine` trains, on any number of ranks and by any engine; nothing unless all of it fits.

    The optimizer's tensors are restored, its settings (rates, decay) left as they are: the caller's recipe sets them.

    Args:
        path: a checkpoint, or a folder of checkpoints, whose newest is meant.
        plan: the plan of the engine's model, None if it is dense.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of another model, plan or optimizer.
    """
    path = Path(path)
    if not (path / "state.json").exists() and (newest := latest(path)) is not None:
        path = newest
    state = _verified_state(path)
    _check_plan(path, plan)
    model = engine.module
    entries = _entries(model)
    loaded = _read_tensors(path / "model.safetensors")
    _check_tensors(path, loaded, entries.tensors)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer_state = _optimizer_state(path, state["optimizer"], engine.optimizer, trained)
    parameters = {name: loaded[entries.first_names[name]] for name, _ in model.named_parameters()}
    # What no engine looks after: running statistics, and what modules keep beside tensors.
    rest = {name: loaded[first] for name, first in entries.first_names.items() if first not in parameters}
    try:
        model.load_state_dict({**rest, **entries.extra, **state["extra"]}, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"the checkpoint {path} does not fit this model: {' '.join(str(error).split())}"
        ) from None
    engine.scatter(parameters, optimizer_state)
    return State(path, state["step"], state["run"], json.loads((path / "recipe.json").read_text()))


def _verified_state(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}: expected a folder like step-00000100")
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole checkpoint: its state.json cannot be read ({error}){_remedy(path)}"
        ) from None
    version = state.get("format") if isinstance(state, dict) else None
    if version != FORMAT:
        raise CheckpointError(f"the checkpoint {path} has format {version}, this version of dist_ssn reads {FORMAT}")
    for key, kind in _STATE.items():
        if not isinstance(state.get(key), kind):
            raise CheckpointError(
                f"the checkpoint {path} is damaged: in state.json, {key} must be of type {kind.__name__}{_remedy(path)}"
            )
    files: dict[str, dict[str, Any]] = state["files"]
    remedy = _remedy(path)
    for name in ("model.safetensors", "optimizer.safetensors", "plan.json", "recipe.json"):
        file = path / name
        if not file.is_file() or name not in files:
            raise CheckpointError(f"the checkpoint {path} is damaged: {name} is missing{remedy}")
        found, expected = _fingerprint(file), files[name]
        if found["bytes"] != expected["bytes"]:
            raise CheckpointError(
                f"the checkpoint {path} is damaged: {name} has {found['bytes']} bytes and was written with "
                f"{expected['bytes']}{remedy}"
            )
        if found != expected:
            raise CheckpointError(f"the checkpoint {path} is damaged: {name} was changed after it was written{remedy}")
    return state


def _remedy(path: Path) -> str:
    """What to do about a damaged checkpoint, as the end of a sentence."""
    others = [str(other) for _, other in reversed(_steps(path.parent)) if other != path]
    return f"; remove that folder to go on from {others[0]}" if others else "; remove that folder to begin anew"


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a safetensors file ({error}); nothing in it was run or loaded") from None


def _check_plan(path: Path, plan: Plan | None) -> None:
    text = (path / "plan.json").read_text()
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


def _check_tensors(path: Path, loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
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
        shape = getattr(
            tensor, "ds_shape", tensor.shape
        )  # DeepSpeed's stage 3 empties a parameter and keeps its shape there
        if loaded[name].shape != shape:
            raise CheckpointError(
                f"the checkpoint {path} is of another model: {name} has the shape {tuple(loaded[name].shape)} there "
                f"and {tuple(shape)} here"
            )


def _optimizer_state(path: Path, saved: dict[str, Any], optimizer: Optimizer, trained: set[str]) -> OptimizerState:
    """The optimizer's state by parameter name."""
    if saved["class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"the checkpoint {path} was written with the optimizer {saved['class']} and this run uses "
            f"{type(optimizer).__name__}: set optimizer.name as it was"
        )
    state: OptimizerState = {}
    for entry, value in {**_read_tensors(path / "optimizer.safetensors"), **saved["scalars"]}.items():
        key, _, name = entry.partition("/")
        state.setdefault(name, {})[key] = value
    if strangers := sorted(state.keys() - trained):
        raise CheckpointError(
            f"the checkpoint {path} has optimizer state for {strangers[0]}, which this run's optimizer does not train"
        )
    return state


# ---------------------------------------------------------------- several ranks


def together(action: Callable[[], T], device: torch.device) -> T:
    """Runs `action` on every rank; if it is a user's mistake on any of them, all raise it, and none waits for ever.

    Costs one all-reduce of 8 bytes, and a broadcast of the sentence when there is one.

    Raises:
        UserError: what the failing rank with the highest number raised.
    """
    failure: UserError | None = None
    result: Any = None
    try:
        result = action()
    except UserError as error:
        failure = error
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        if failure is not None:
            raise failure
        return result
    teller = torch.tensor([0 if failure is None else dist.get_rank() + 1], device=device)
    dist.all_reduce(teller, op=dist.ReduceOp.MAX)
    if not (source := int(teller.item())):
        return result
    text = torch.zeros(_SENTENCE_BYTES, dtype=torch.uint8, device=device)
    if failure is not None and source == dist.get_rank() + 1:
        sentence = f"{type(failure).__name__}:{failure}".encode()[:_SENTENCE_BYTES]
        text[: len(sentence)] = torch.tensor(list(sentence), dtype=torch.uint8)
    dist.broadcast(text, src=source - 1)
    if failure is not None:
        raise failure
    kind, _, sentence_text = bytes(text.tolist()).rstrip(b"\0").decode(errors="ignore").partition(":")
    raise getattr(errors, kind, UserError)(sentence_text)
