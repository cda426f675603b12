"""`save`, `load` and `merge`: what was trained beside kept values, as a small file that goes onto the same base.

A folder holds one file, `difference.safetensors`: the banks as `bank/NAME`, what was trained whole and the model's buffers as
`own/NAME`. Its metadata has the plan, fingerprint, dtype and shape of every tensor of the base, and fingerprints of
its own tensors.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from dist_ssn.errors import CheckpointError, PlanError, ShareError
from dist_ssn.files import parse_json, read_tensors, replace_bytes
from dist_ssn.plan import Plan
from dist_ssn.plan.compare import plan_difference
from dist_ssn.sharing.agreement import is_wrapper
from dist_ssn.sharing.attach import share, specs_of_plan
from dist_ssn.sharing.bank_set import BankSet, bank_sets
from dist_ssn.sharing.bases import fingerprint, frozen_beside
from dist_ssn.sharing.columns import load_flat
from dist_ssn.sharing.train_beside import train_only
from dist_ssn.torch_private import inside_compiled

FILE = "difference.safetensors"
_KEY = "dist_ssn"
"""Name of the entry in the file's metadata."""
_FORMAT = 1
_NOT_SAVED = ("_extra_state", "fingerprints")
"""Entries of the banks' state that the metadata has."""
Fingerprint = tuple[str, str, tuple[int, ...]]
"""(digest, dtype, shape) of a tensor of the base."""


@dataclass(frozen=True)
class _Saved:
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


def save(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Writes what was trained beside kept values into a folder, without the kept values.

    A former file there is replaced, at once or not at all. With several processes, one of them calls it.

    Args:
        model: shared with `keep=True`, perhaps inside of DDP.
        folder: is made if it does not exist.

    Returns:
        The file's path.

    Raises:
        ShareError: the model is not shared with `keep=True`, or its parameters are sharded.
        CheckpointError: the file cannot be written.
    """
    model = _inside(model)
    banks = _kept_banks(model, "torch.save(model.state_dict(), file) saves it")
    whole = _trained_whole(model, banks)
    trained = {
        n: p for n, p in model.named_parameters() if (p.requires_grad or id(p) in whole) and not _is_of(banks, p)
    }
    tensors = {f"bank/{name}": tensor for name, tensor in _state(banks).items()}
    tensors |= {f"own/{name}": tensor for name, tensor in {**trained, **_buffers(model, banks)}.items()}
    if sharded := [name for name, tensor in tensors.items() if hasattr(tensor, "device_mesh")]:
        raise ShareError(f"{sharded[0]} is sharded: save before fully_shard, or a checkpoint of the run")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = {
        "format": _FORMAT,
        "plan": json.loads(banks.plan.to_json()),
        "train": list(trained),
        "base": {name: entry for name, entry in _base_of(model, banks).items() if name not in trained},
        "tensors": {name: fingerprint(tensor) for name, tensor in tensors.items()},
    }
    path = Path(folder) / FILE
    data = to_bytes(tensors, {_KEY: json.dumps(content)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, data)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    return path


def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Puts what `save` wrote onto the model that it was trained on, in place.

    Args:
        model: dense, with the pretrained values: it is shared by the saved plan. Or shared with the same plan, as after another
            `load`: its values are replaced.
        folder: see `save`.

    Returns:
        The model itself.

    Raises:
        CheckpointError: the file cannot be read, or the model has another base or another plan; the model is unchanged.
        ShareError: the model is shared without `keep=True`.
    """
    saved, given, model = _read(folder), model, _inside(model)
    sets = bank_sets(model)
    if sets:
        banks = _kept_banks(model, "load onto the dense base")
        if difference := plan_difference(banks.plan, saved.plan):
            raise CheckpointError(f"{saved.path} follows another plan: {difference}; load it onto the dense base")
        slots, base = {slot.name for _, slot in saved.plan.slots()}, _base_of(model, banks)
        others = {name: _print(p) for name, p in model.named_parameters() if name in saved.base and name not in slots}
        saved.require_base({**base, **others})
    else:
        saved.require_base(_prints(model, saved.base))
    _require_own(saved, model)
    if not sets:
        _require_plan(saved, model)
        share(model, plan=saved.plan, keep=True, train=saved.train)
        banks = _kept_banks(model)
    else:
        train_only(model, saved.train)
        banks = sets[0]
        banks.trained_whole = saved.train
    targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in _state(banks).items():
            tensor.copy_(saved.banks[name])
        for bank in banks.banks():
            bank.at_start = False
        for name, tensor in saved.own.items():
            targets[name].copy_(tensor)
    return given


def merge(model: nn.Module, weights: Mapping[str | os.PathLike[str], float]) -> nn.Module:
    """A dense copy of a model with a weighted sum of saved differences: base + Σ weight · (trained − base).

    The differences may follow different plans. Buffers that are no floating-point numbers stay those of the base.

    Args:
        model: the dense base.
        weights: folder of `save` → weight of its difference, such as {"a": 0.5, "b": 0.5}.

    Raises:
        CheckpointError: a file cannot be read, or was trained on another base.
        ShareError: the model is shared, or a weight is no finite number.
    """
    if not isinstance(weights, Mapping):
        raise ShareError(f'merge takes folders with their weights, such as {{"a": 0.5}}, got {type(weights).__name__}')
    for folder, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ShareError(f"the weight of {folder} must be a finite number, got {weight!r}")
    model = _inside(model)
    if bank_sets(model):
        raise ShareError(f"{type(model).__name__} is shared: merge onto the dense base, or materialize(model)")
    parts: list[tuple[_Saved, BankSet, float]] = []
    for folder, weight in weights.items():
        saved = _read(folder)
        saved.require_base(_prints(model, saved.base))
        _require_plan(saved, model)
        _require_own(saved, model)
        parts.append((saved, _banks_of_file(saved), float(weight)))
    result = copy.deepcopy(model)
    targets = {**dict(result.named_parameters()), **dict(result.named_buffers())}
    sums: dict[str, Tensor] = {}

    def add(name: str, difference: Tensor, weight: float) -> None:
        before = sums.get(name)
        before = _wide(targets[name].detach()) if before is None else before
        sums[name] = before + difference.to(before.device) * weight

    with torch.no_grad():
        for saved, banks, weight in parts:
            for bank in banks.banks():
                for index, slot in enumerate(bank.group.slots):
                    add(slot.name, bank(index), weight)
            for name, tensor in saved.own.items():
                if tensor.is_floating_point():
                    base = targets[name].detach()
                    add(name, _wide(tensor.to(base.device)) - _wide(base), weight)
        for name, total in sums.items():
            targets[name].copy_(total)
    return result


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _inside(model: nn.Module) -> nn.Module:
    """The model inside of `torch.compile` and of DDP."""
    model = inside_compiled(model)
    inner = getattr(model, "module", None) if is_wrapper(model) else None
    return inside_compiled(inner) if isinstance(inner, nn.Module) else model


def _kept_banks(model: nn.Module, remedy: str = "torch.save(model.state_dict(), file) saves it") -> BankSet:
    sets = bank_sets(model)
    if len(sets) != 1 or not sets[0].plan.keep:
        raise ShareError(f"{type(model).__name__} is not shared as a whole with keep=True: {remedy}")
    return sets[0]


def _trained_whole(model: nn.Module, banks: BankSet) -> set[int]:
    """Parameters that `train=` named, by id: they are saved also where they are frozen now, as before an export."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if lost := [name for name in banks.trained_whole if name not in parameters]:
        raise ShareError(
            f"{lost[0]} was trained whole, and {type(model).__name__} does not have it any more: save before layers are replaced"
        )
    return {id(parameters[name]) for name in banks.trained_whole}


def _is_of(banks: BankSet, parameter: nn.Parameter) -> bool:
    return any(parameter is p for p in banks.parameters())


def _state(banks: BankSet) -> dict[str, Tensor]:
    state = banks.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in _NOT_SAVED}


def _buffers(model: nn.Module, banks: BankSet | None) -> dict[str, Tensor]:
    """The buffers of a model's state dict outside of its banks."""
    inside = {id(buffer) for buffer in banks.buffers()} if banks is not None else set[int]()
    state = model.state_dict(keep_vars=True)
    return {n: b for n, b in model.named_buffers() if n in state and id(b) not in inside}


def _print(tensor: Tensor) -> Fingerprint:
    return fingerprint(tensor), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _prints(model: nn.Module, names: Mapping[str, Any]) -> dict[str, Fingerprint]:
    return {n: _print(p) for n, p in model.named_parameters(remove_duplicate=False) if n in names}


def _base_of(model: nn.Module, banks: BankSet) -> dict[str, Fingerprint]:
    """Fingerprints of everything that a shared model keeps."""
    found: dict[str, Fingerprint] = {}
    for bank in banks.banks():
        assert bank.bases is not None
        for slot, digest, tensor in zip(bank.group.slots, bank.bases.fingerprints, bank.bases.tensors, strict=True):
            found[slot.name] = digest, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    return found | {name: _print(parameter) for name, parameter in frozen_beside(model).items()}


def _read(folder: str | os.PathLike[str]) -> _Saved:
    path = Path(folder) / FILE
    try:
        tensors = read_tensors(path)
        with safe_open(path, "pt") as file:
            content = parse_json((file.metadata() or {}).get(_KEY, "null"))
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"it has no entry {_KEY!r} of format {_FORMAT}")
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
    saved = _Saved(path, plan, tuple(map(str, train)), prints, parts["bank"], parts["own"])
    _banks_of_file(saved)
    if slots := {slot.name for _, slot in plan.slots()} - prints.keys():
        raise CheckpointError(f"{path} is damaged: it has no fingerprint of {min(slots)}")
    if missing := [name for name in saved.train if name not in saved.own]:
        raise CheckpointError(f"{path} is damaged: {missing[0]} was trained and is not in it")
    return saved


def _banks_of_file(saved: _Saved) -> BankSet:
    """The banks of a file, which generate differences from nothing."""
    kinds = {tensor.dtype for name, tensor in saved.banks.items() if name.endswith(".bank")}
    dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    empty = {g.name: (0.0, *[1.0] * len(g.slots)) for g in saved.plan.groups}
    try:
        banks = BankSet(saved.plan, empty, (), torch.device("cpu"), dtype)
    except PlanError as error:
        raise CheckpointError(f"{saved.path} is damaged: {error}") from None
    state = _state(banks)
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


def _require_plan(saved: _Saved, model: nn.Module) -> None:
    """Checks a dense model's weights, and which of them are tied, against the plan.

    Raises:
        CheckpointError: they differ.
    """
    try:
        specs_of_plan(model, saved.plan, keep=True)
    except PlanError as error:
        raise CheckpointError(f"{saved.path} was trained on another model: {error}") from None


def _require_own(saved: _Saved, model: nn.Module) -> None:
    """Checks what was trained whole, and the buffers, against a model."""
    mine = {**dict(model.named_parameters()), **_buffers(model, next(iter(bank_sets(model)), None))}
    for name, tensor in saved.own.items():
        if name not in mine:
            raise CheckpointError(f"{saved.path} has {name}, which this model does not have")
        if mine[name].shape != tensor.shape:
            raise CheckpointError(
                f"{saved.path} has {name} of shape {tuple(tensor.shape)}, and here it has {tuple(mine[name].shape)}"
            )
