"""The file of a difference: `write`, and `read`, which checks it.

A folder holds one file, `difference.safetensors`: the banks as `bank/NAME`, what was trained whole and the model's buffers as
`own/NAME`. Its metadata has the plan, fingerprint, dtype and shape of every tensor of the base, fingerprints of its own
tensors, and one of all that.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from dist_ssn.errors import CheckpointError, PlanError
from dist_ssn.files import parse_json, read_tensors, replace_bytes
from dist_ssn.plan import Plan
from dist_ssn.sharing.bank_set import BankSet
from dist_ssn.sharing.bases import FINGERPRINT_BYTES, fingerprint
from dist_ssn.sharing.columns import load_flat

FILE = "difference.safetensors"
_KEY = "dist_ssn"
"""Name of the entry in the file's metadata."""
_FORMAT = 1
_NOT_SAVED = ("_extra_state", "fingerprints")
"""Entries of the banks' state that the metadata has."""
Fingerprint = tuple[str, str, tuple[int, ...]]
"""(digest, dtype, shape) of a tensor of the base."""


@dataclass(frozen=True)
class Saved:
    """Content of a file.

    Args:
        path: of the file.
        plan: of the banks.
        train: names of the parameters that were trained whole.
        base: name → fingerprint, of every tensor that was kept.
        banks: tensors of the banks, by their name in the `BankSet`.
        own: parameters that were trained whole, and buffers.
    """

    path: Path
    plan: Plan
    train: tuple[str, ...]
    base: Mapping[str, Fingerprint]
    banks: dict[str, Tensor]
    own: Mapping[str, Tensor]

    def require_base(self, base: Mapping[str, Fingerprint]) -> None:
        """Checks that a model keeps the values beside which this was trained.

        Raises:
            CheckpointError: it does not; the message has the first tensor that differs, and how.
        """
        for name, (digest, dtype, shape) in self.base.items():
            if name not in base:
                raise CheckpointError(f"{self.path} was trained on a model with {name}, which this one does not have")
            mine = base[name]
            if mine[2] != shape:
                raise CheckpointError(f"{self.path} was trained on {name} of shape {shape}, and here it has {mine[2]}")
            if mine[1] != dtype:
                raise CheckpointError(
                    f"{self.path} was trained on {name} in {dtype}, and here it is in {mine[1]}: load the pretrained model in "
                    "that dtype"
                )
            if mine[0] != digest:
                others = sum(base.get(other, entry) != entry for other, entry in self.base.items())
                raise CheckpointError(
                    f"{self.path} was trained on other values of {name} ({others} of {len(self.base)} tensors differ): load the "
                    "pretrained model that it was trained on"
                )


def write(
    folder: str | os.PathLike[str],
    plan: Plan,
    train: Iterable[str],
    base: Mapping[str, Fingerprint],
    tensors: Mapping[str, Tensor],
) -> Path:
    """Writes a file; a former one is replaced, at once or not at all.

    Args:
        folder: is made if it does not exist.
        plan: see `Saved`.
        train: see `Saved`.
        base: see `Saved`.
        tensors: by their names in the file, such as "bank/all.bank".

    Returns:
        The file's path.

    Raises:
        CheckpointError: the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = {
        "format": _FORMAT,
        "plan": json.loads(plan.to_json()),
        "train": list(train),
        "base": dict(base),
        "tensors": {name: fingerprint(tensor) for name, tensor in tensors.items()},
    }
    content["metadata"] = _digest(content)
    path = Path(folder) / FILE
    data = to_bytes(tensors, {_KEY: json.dumps(content)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, data)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    return path


def read(folder: str | os.PathLike[str]) -> Saved:
    """The content of a file.

    Args:
        folder: that `write` was given.

    Raises:
        CheckpointError: it cannot be read, is damaged, or is another kind of file.
    """
    path = Path(folder) / FILE
    try:
        tensors, content = read_tensors(path), _metadata_of(path)
        plan = Plan.from_json(json.dumps(content.get("plan")))
        train, base = content.get("train"), content.get("base")
        if not plan.keep or not isinstance(train, list) or not isinstance(base, dict):
            raise ValueError("its metadata is incomplete")
        prints = {str(name): (str(d), str(t), tuple(map(int, shape))) for name, (d, t, shape) in base.items()}
    except (OSError, ValueError, TypeError, PlanError) as error:
        raise CheckpointError(f"{path} is not what dist_ssn.save writes: {error}") from None
    prints_of_tensors = content.get("tensors")  # files of an older version have none
    if isinstance(prints_of_tensors, dict):
        changed = [name for name in tensors if prints_of_tensors.get(name) != fingerprint(tensors[name])]
        if changed:
            raise CheckpointError(f"{path} is damaged: {changed[0]} was changed after it was written")
    parts: dict[str, dict[str, Tensor]] = {"bank": {}, "own": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        parts.setdefault(kind, {})[name] = tensor
    saved = Saved(path, plan, tuple(map(str, train)), prints, parts["bank"], parts["own"])
    banks_of_file(saved)
    if slots := {slot.name for _, slot in plan.slots()} - prints.keys():
        raise CheckpointError(f"{path} is damaged: it has no fingerprint of {min(slots)}")
    if missing := [name for name in saved.train if name not in saved.own]:
        raise CheckpointError(f"{path} is damaged: {missing[0]} was trained and is not in it")
    return saved


def _metadata_of(path: Path) -> dict[str, Any]:
    """The metadata of a file, of which no bit has changed.

    Raises:
        ValueError: there is none, or it was changed.
        OSError: the file cannot be read.
    """
    with safe_open(path, "pt") as file:
        content = parse_json((file.metadata() or {}).get(_KEY, "null"))
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"it has no entry {_KEY!r} of format {_FORMAT}")
    digest = content.pop("metadata", None)  # files of an older version have none
    if digest is not None and digest != _digest(content):
        raise ValueError("its plan or its names were changed after it was written")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    """Hex digest of metadata, before and after it is written as JSON."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=FINGERPRINT_BYTES).hexdigest()


def banks_of_file(saved: Saved) -> BankSet:
    """The banks of a file, which generate differences from nothing."""
    kinds = {tensor.dtype for name, tensor in saved.banks.items() if name.endswith(".bank")}
    dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    empty = {g.name: (0.0, *[1.0] * len(g.slots)) for g in saved.plan.groups}
    try:
        banks = BankSet(saved.plan, empty, (), torch.device("cpu"), dtype)
    except PlanError as error:
        raise CheckpointError(f"{saved.path} is damaged: {error}") from None
    state = state_of(banks)
    load_flat(saved.banks, {name: tensor.shape for name, tensor in state.items()})
    for name in sorted(state.keys() | saved.banks.keys()):
        if name not in state or name not in saved.banks or state[name].shape != saved.banks[name].shape:
            raise CheckpointError(f"{saved.path} is damaged: bank/{name} is not that of its plan")
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(saved.banks[name])
    for bank in banks.banks():
        bank.empty = False
    return banks


def state_of(banks: BankSet) -> dict[str, Tensor]:
    """The tensors of banks that a file has, by name."""
    state = banks.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in _NOT_SAVED}
