"""`save`, `load` and `merge`: what was trained beside kept values, as a small file that goes onto the same base.

The file itself is in `saved_file.py`.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_ssn.errors import CheckpointError, PlanError, ShareError
from dist_ssn.plan.compare import plan_difference
from dist_ssn.sharing.agreement import is_wrapper
from dist_ssn.sharing.attach import share, specs_of_plan
from dist_ssn.sharing.bank_set import BankSet, bank_sets
from dist_ssn.sharing.bases import fingerprint, frozen_beside
from dist_ssn.sharing.parts import outside, slots_of
from dist_ssn.sharing.saved_file import Fingerprint, Saved, banks_of_file, read, state_of, write
from dist_ssn.sharing.train_beside import train_only
from dist_ssn.torch_private import inside_compiled


def save(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Writes what was trained beside kept values into a folder, without the kept values.

    A former file there is replaced, at once or not at all. With several processes, one of them calls it.

    Args:
        model: shared with `keep=True`, perhaps inside of DDP.
        folder: is made if it does not exist.

    Returns:
        The file's path.

    Raises:
        ShareError: the model is not shared as a whole with `keep=True`, or its parameters are sharded or on "meta".
        CheckpointError: the file cannot be written.
    """
    model = _inside(model)
    banks = _kept_banks(model, "torch.save(model.state_dict(), file) saves it")
    _require_values(model)
    whole = _trained_whole(model, banks)
    trained = {
        n: p for n, p in model.named_parameters() if (p.requires_grad or id(p) in whole) and not _is_of(banks, p)
    }
    tensors = {f"bank/{name}": tensor for name, tensor in state_of(banks).items()}
    tensors |= {f"own/{name}": tensor for name, tensor in {**trained, **_buffers(model, banks)}.items()}
    base = {name: entry for name, entry in _base_of(model, banks).items() if name not in trained}
    return write(folder, banks.plan, trained, base, tensors)


def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Puts what `save` wrote onto the model that it was trained on, in place.

    Args:
        model: dense, with the pretrained values: it is shared by the saved plan. Or shared with the same plan, as after another
            `load`: its values are replaced. What trains is what trained in the saved model; but a shared model that is frozen
            as a whole, as for inference, stays so.
        folder: see `save`.

    Returns:
        The model itself.

    Raises:
        CheckpointError: the file cannot be read, or the model has another base or another plan; the model is unchanged.
        ShareError: the model is shared without `keep=True`, or in part, or its parameters are sharded or on "meta".
    """
    saved, given, model = read(folder), model, _inside(model)
    banks = _switched(model, saved) if bank_sets(model) or outside(model) else _shared(model, saved)
    targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in state_of(banks).items():
            tensor.copy_(saved.banks[name])
        for bank in banks.banks():
            bank.at_start = False
        for name, tensor in saved.own.items():
            targets[name].copy_(tensor)
    return given


def merge(model: nn.Module, weights: Mapping[str | os.PathLike[str], float]) -> nn.Module:
    """A dense copy of a model with a weighted sum of saved differences: base + Σ weight · (trained − base).

    The differences may follow different plans. Buffers are not extrapolated, so that a variance stays one: only positive weights
    count, and if they sum to more than 1, they are divided by their sum. Buffers that are no floating-point numbers stay those
    of the base.

    Args:
        model: the dense base.
        weights: folder of `save` → weight of its difference, such as {"a": 0.5, "b": 0.5}.

    Raises:
        CheckpointError: a file cannot be read, or was trained on another base.
        ShareError: the model is shared, sharded or on "meta", or a weight is no finite number.
    """
    if not isinstance(weights, Mapping):
        raise ShareError(f'merge takes folders with their weights, such as {{"a": 0.5}}, got {type(weights).__name__}')
    for folder, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
            raise ShareError(f"the weight of {folder} must be a finite number, got {weight!r}")
    model = _inside(model)
    if bank_sets(model) or outside(model):
        raise ShareError(f"{type(model).__name__} is shared: merge onto the dense base, or materialize(model)")
    parts: list[tuple[Saved, BankSet, float]] = []
    for folder, weight in weights.items():
        saved = read(folder)
        _require_dense(saved, model)
        parts.append((saved, banks_of_file(saved), float(weight)))
    result = copy.deepcopy(model)
    targets, buffers = dict(result.named_parameters()), dict(result.named_buffers())
    sums: dict[str, Tensor] = {}
    seen: dict[str, list[tuple[Tensor, float]]] = {}

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
                if name in buffers:
                    seen.setdefault(name, []).append((tensor, weight))
                else:
                    base = targets[name].detach()
                    add(name, _wide(tensor.to(base.device)) - _wide(base), weight)
        for name, total in sums.items():
            targets[name].copy_(total)
        for name, values in seen.items():
            if buffers[name].is_floating_point():
                buffers[name].copy_(_mean(buffers[name], values))
    return result


def _mean(base: Tensor, values: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Mean of a buffer and of what it became, which lies between them; the buffer itself if it did not change.

    Args:
        base: the buffer.
        values: what it became, each with the weight of its difference.
    """
    if all(torch.equal(value.to(base.device), base) for value, _ in values):
        return base
    total = sum(max(weight, 0.0) for _, weight in values)
    shares = [(base, max(1 - total, 0.0)), *((value, weight / max(total, 1.0)) for value, weight in values)]
    # A factor of zero is left out, for it makes NaN of the -inf of a mask.
    terms = [_wide(value.to(base.device)) * factor for value, factor in shares if factor > 0]
    return torch.stack(terms).sum(0)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _inside(model: Any) -> nn.Module:
    """The model inside of `torch.compile` and of DDP."""
    if not isinstance(model, nn.Module):
        raise ShareError(f"an object of type {type(model).__name__} is no model: give a torch.nn.Module")
    model = inside_compiled(model)
    inner = getattr(model, "module", None) if is_wrapper(model) else None
    return inside_compiled(inner) if isinstance(inner, nn.Module) else model


def _kept_banks(model: nn.Module, remedy: str) -> BankSet:
    """The banks of a model that was shared as a whole with `keep=True`, so that a plan's names are the model's.

    Args:
        model: any.
        remedy: end of the message for a model of which nothing was shared with `keep=True`.

    Raises:
        ShareError: the model was not, or only a part of it was, whose name the message has.
    """
    kept = [banks for banks in bank_sets(model) if banks.plan.keep]
    if len(bank_sets(model)) == 1 and kept and _is_root_of(model, kept[0]):
        return kept[0]
    parts = [path for path, part in model.named_modules() if path and any(_is_root_of(part, b) for b in kept)]
    if parts:
        remedy = f"share() was called on its part {' and '.join(parts)}, so give model.get_submodule({parts[0]!r})"
    elif kept:
        remedy = "its layers were replaced or renamed since share(): save and load before that"
    elif outside(model):
        remedy = "it is a part of a model that is shared: give that model"
    raise ShareError(f"{type(model).__name__} is not shared as a whole with keep=True: {remedy}")


def _is_root_of(part: nn.Module, banks: BankSet) -> bool:
    """True if the layers of a part read the weights of a plan, each by its name there."""
    modules = dict(part.named_modules(remove_duplicate=False))
    places = ((slot.name.rpartition("."), bank, i) for bank in banks.banks() for i, slot in enumerate(bank.group.slots))
    return all(
        path in modules and slots_of(modules[path]).get(local) == (bank, index)
        for (path, _, local), bank, index in places
    )


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


def _buffers(model: nn.Module, banks: BankSet | None) -> dict[str, Tensor]:
    """The buffers of a model's state dict outside of its banks."""
    inside = {id(buffer) for buffer in banks.buffers()} if banks is not None else set[int]()
    state = model.state_dict(keep_vars=True)
    return {n: b for n, b in model.named_buffers() if n in state and id(b) not in inside}


def _print(tensor: Tensor) -> Fingerprint:
    return fingerprint(tensor), _dtype(tensor), tuple(tensor.shape)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _prints(model: nn.Module, names: Mapping[str, Any]) -> dict[str, Fingerprint]:
    return {n: _print(p) for n, p in model.named_parameters(remove_duplicate=False) if n in names}


def _base_of(model: nn.Module, banks: BankSet) -> dict[str, Fingerprint]:
    """Fingerprints of everything that a shared model keeps."""
    found: dict[str, Fingerprint] = {}
    for bank in banks.banks():
        assert bank.bases is not None
        for slot, digest, tensor in zip(bank.group.slots, bank.bases.fingerprints, bank.bases.tensors, strict=True):
            found[slot.name] = digest, _dtype(tensor), tuple(tensor.shape)
    return found | {name: _print(parameter) for name, parameter in frozen_beside(model).items()}


def _shared(model: nn.Module, saved: Saved) -> BankSet:
    """Shares a dense model by a saved plan, in place."""
    _require_dense(saved, model)
    share(model, plan=saved.plan, keep=True, train=saved.train)
    return bank_sets(model)[0]


def _switched(model: nn.Module, saved: Saved) -> BankSet:
    """The banks of a shared model, which trains what the saved model trained."""
    banks = _kept_banks(model, "load onto the dense base")
    _require_values(model)
    if difference := plan_difference(banks.plan, saved.plan):
        raise CheckpointError(f"{saved.path} follows another plan: {difference}; load it onto the dense base")
    slots = {slot.name for _, slot in saved.plan.slots()}
    others = {name: _print(p) for name, p in model.named_parameters() if name in saved.base and name not in slots}
    saved.require_base({**_base_of(model, banks), **others})
    _require_own(saved, model)
    _require_wide(saved, banks)
    if any(parameter.requires_grad for parameter in model.parameters()):
        train_only(model, saved.train)
    banks.trained_whole = saved.train
    return banks


def _require_dense(saved: Saved, model: nn.Module) -> None:
    """Checks a dense model: its kept values, its weights and which of them are tied, and everything beside them.

    Raises:
        CheckpointError: it is not the model that was trained.
        ShareError: it is sharded or on "meta".
    """
    _require_values(model)
    saved.require_base(_prints(model, saved.base))
    try:
        specs_of_plan(model, saved.plan, keep=True)
    except PlanError as error:
        raise CheckpointError(f"{saved.path} was trained on another model: {error}") from None
    _require_own(saved, model)


def _require_own(saved: Saved, model: nn.Module) -> None:
    """Checks what was trained whole, and the buffers, against a model, and that it has no other parameters."""
    banks = next(iter(bank_sets(model)), None)
    mine = {**dict(model.named_parameters()), **_buffers(model, banks)}
    for name, tensor in saved.own.items():
        if name not in mine:
            raise CheckpointError(f"{saved.path} has {name}, which this model does not have")
        if mine[name].shape != tensor.shape:
            raise CheckpointError(
                f"{saved.path} has {name} of shape {tuple(tensor.shape)}, and here it has {tuple(mine[name].shape)}"
            )
        if mine[name].dtype != tensor.dtype:
            raise CheckpointError(
                f"{saved.path} has {name} in {_dtype(tensor)}, and here it is in {_dtype(mine[name])}: convert it to that dtype "
                "first"
            )
    known = saved.base.keys() | saved.own.keys()
    inside = set[int]() if banks is None else {id(parameter) for parameter in banks.parameters()}
    if more := [n for n, p in model.named_parameters() if n not in known and id(p) not in inside]:
        raise CheckpointError(
            f"{saved.path} was trained on a model without {more[0]}, which this one has: build the same model"
        )


def _require_wide(saved: Saved, banks: BankSet) -> None:
    """Checks that banks hold the values of a file without rounding."""
    for name, tensor in state_of(banks).items():
        if torch.promote_types(tensor.dtype, saved.banks[name].dtype) != tensor.dtype:
            raise CheckpointError(
                f"{saved.path} has {name} in {_dtype(saved.banks[name])}, and here it is in {_dtype(tensor)}: load it onto the "
                "dense base"
            )


def _require_values(model: nn.Module) -> None:
    """Checks that a model has its values, and has them whole."""
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    if sharded := [name for name, value in state.items() if hasattr(value, "device_mesh")]:
        raise ShareError(f"{sharded[0]} is sharded: save and load before fully_shard, or write a checkpoint of the run")
    if empty := [name for name, value in state.items() if value.is_meta]:
        raise ShareError(
            f"{empty[0]} is on 'meta' and has no values: load the pretrained ones first, "
            "model.load_state_dict(safetensors.torch.load_file(file), assign=True) copies nothing"
        )
