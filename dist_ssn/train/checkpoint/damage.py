"""The files of a checkpoint: read them, and check that they are whole and as they were written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from dist_ssn.errors import CheckpointError
from dist_ssn.files import parse_json, read_json, read_tensors, read_text
from dist_ssn.train.checkpoint.folder import checkpoints, size_and_hash
from dist_ssn.train.checkpoint.snapshot import FORMAT

FILES = ("model.safetensors", "optimizer.safetensors", "plan.json", "recipe.json")  # no other name is opened
_STATE = {"step": int, "run": dict, "extra": dict, "optimizer": dict, "files": dict}  # the fields of state.json


class Damaged(CheckpointError):
    """A checkpoint that is incomplete or was changed after it was written."""


def verified_state(path: Path) -> dict[str, Any]:
    """The content of state.json, after all files have been compared with their sizes and hashes."""
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}: expected a folder like step-00000100")
    try:
        state = read_json(path / "state.json")
    except (OSError, ValueError) as error:
        raise Damaged(
            f"{path} is not a complete checkpoint: its state.json cannot be read ({error}){remedy(path)}"
        ) from None
    version = state.get("format") if isinstance(state, dict) else None
    if version != FORMAT:
        raise CheckpointError(f"the checkpoint {path} has format {version}, this version of dist_ssn reads {FORMAT}")
    for key, kind in _STATE.items():
        if not isinstance(state.get(key), kind):
            raise Damaged(
                f"the checkpoint {path} is damaged: in state.json, {key} must be of type {kind.__name__}{remedy(path)}"
            )
    if isinstance(state["step"], bool) or state["step"] < 0:
        raise Damaged(
            f"the checkpoint {path} is damaged: its step is {state['step']}, and must be 0 or more{remedy(path)}"
        )
    for name in FILES:
        verify(path, name, state["files"])
    return state


def verify(path: Path, name: str, files: dict[str, Any]) -> None:
    """Checks that a file of a checkpoint is whole and as it was written."""
    file, end = path / name, remedy(path)
    if not file.is_file() or not isinstance(files.get(name), dict) or "bytes" not in files[name]:
        raise Damaged(f"the checkpoint {path} is damaged: {name} is missing{end}")
    found, expected = size_and_hash(file), files[name]
    if found["bytes"] != expected["bytes"]:
        raise Damaged(
            f"the checkpoint {path} is damaged: {name} has {found['bytes']} bytes and was written with "
            f"{expected['bytes']}{end}"
        )
    if found != expected:
        raise Damaged(f"the checkpoint {path} is damaged: {name} was changed after it was written{end}")


def remedy(path: Path) -> str:
    """The remedy for a damaged checkpoint, as the end of a message."""
    others = [str(other) for other in reversed(checkpoints(path.parent)) if other != path]
    return f"; remove that folder to go on from {others[0]}" if others else "; remove that folder to begin anew"


def read_checked(file: Path) -> dict[str, Tensor]:
    """The tensors of a file; nothing in it is run."""
    try:
        return read_tensors(file)
    except (ValueError, OSError) as error:
        raise Damaged(f"{file} is not a safetensors file ({error}); nothing in it was run or loaded") from None


def text_of(file: Path) -> str:
    """The text of a file."""
    try:
        return read_text(file)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


def recipe_in(path: Path) -> dict[str, Any]:
    """The recipe of a checkpoint, as JSON."""
    try:
        recipe = parse_json(text_of(path / "recipe.json"))
    except ValueError as error:
        raise CheckpointError(f"{path / 'recipe.json'} is not JSON: {error}") from None
    if not isinstance(recipe, dict):
        raise CheckpointError(f"{path / 'recipe.json'} is not a recipe: a JSON object is needed")
    return recipe
