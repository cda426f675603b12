"""`Bank`: the few parameters of a group of weights, and the generation of its weights from them.

The fast path keeps no generated weight, and costs O(K·n) for a weight of n elements, independent of the bank's size:

- A read joins the graph through an anchor (`autograd.py`), and saves no tensor except the requested rows.
- Operations that save the weight for backward keep its origin instead (`layers.py`), and the bank generates it again.

The pure path is `mix` and `finish` under plain autograd. Tests compare the fast path with it, and `torch.compile` and
`torch.func` trace it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import Proxy

from dist_ssn.errors import ShareError
from dist_ssn.plan.rules import EMBEDDING_SIZE
from dist_ssn.plan.scales import Scales
from dist_ssn.plan.slots import Group
from dist_ssn.sharing.agreement import agree_under_fsdp2
from dist_ssn.sharing.autograd import Anchor, Generate, Watcher
from dist_ssn.sharing.bank_values import OWN, BankValues, flat
from dist_ssn.sharing.blocks import Given, Placed, fits
from dist_ssn.sharing.columns import unpickle_flat
from dist_ssn.sharing.compiled import all_weights, register
from dist_ssn.sharing.morphs import ELEMENTWISE, MORPHS, Mixture, finish, readings
from dist_ssn.sharing.per_step import PerStep
from dist_ssn.sharing.signed_path import fast_path
from dist_ssn.sharing.start_values import check_start
from dist_ssn.sharing.weight_source import Values, autocast_dtype
from dist_ssn.torch_private import FAST_PATH, active_ddp, builds_graph, graph_task_id, is_tracing

_ALL = -1
"""Index with which a forward generates the weights of all slots."""
_inside: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()  # DDP → its modules' ids


class Bank(BankValues):
    """One group's bank; `bank(index)` generates the weight of slot `index`.

    Generation runs inside `forward`, also when backward needs a weight again, so that the module hooks of an engine (ZeRO-3's
    gather, FSDP2's unshard) run around every read.

    Args:
        group: see `BankValues`.
        seed: see `BankValues`.
        device: see `BankValues`.
        dtype: see `BankValues`.
        scales: see `BankValues`.
    """

    check_plan: Callable[[], None] | None = None
    """Checks that nobody wrote another plan into the state dict of this bank; None before there is one."""
    lowered: frozenset[int] = frozenset()
    """Indices of the slots that are read only by layers whose weight autocast lowers."""

    def __init__(
        self,
        group: Group,
        seed: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        scales: Scales | None = None,
    ):
        super().__init__(group, seed, device, dtype, scales)
        self.pure = not FAST_PATH
        """True to use the pure path always."""
        self._readings = [readings(slot, seed, group.size) for slot in group.slots]
        self._fast_paths = [fast_path(slot, seed, group.size) for slot in group.slots]
        self.watcher: Watcher | None = None
        self.anchor: Anchor | None = None
        self.per_step: PerStep | None = None
        """The weights that are generated at once for a forward; None if weights are generated on demand."""
        self.compiled: dict[int, Tensor] = {}
        """The same in a graph that torch.compile makes, by slot."""
        self._warned = False  # of ZeRO-3, which would partition the bank again after each use

    def generate_per_step(self, on: bool, only_small: bool = False) -> None:
        """Generates the weights once per forward of the model, all together; or each on demand.

        Args:
            on: True for once per forward.
            only_small: only while the weights are small for the bank's device.
        """
        slots = [
            Placed(index, slot, self._ranges[index]["gains"][0])
            for index, slot in enumerate(self.group.slots if on else ())
            if fits(slot)
        ]
        self.per_step = PerStep(slots, self.seed, self.group.size, self.lowered, only_small) if slots else None
        self._compiled_key = register(slots, self.seed, self.group.size, self.lowered) if slots else ""

    def at_hand(self, index: int) -> Tensor | None:
        """The weight of slot `index`, if weights are generated once per forward; None if it is to be generated on demand."""
        per_step = self.per_step
        if per_step is None or index not in per_step.indices:
            return None
        if not per_step.forwards and (not per_step.made or graph_task_id() == -1):
            return None  # neither in a forward of the model nor where its backward recomputes one
        graph, lower = torch.is_grad_enabled() and not self.stopped, autocast_dtype(self)
        weights = per_step.current(lower, graph, self._tensors)
        if weights is None:
            alone = self.pure or self.thresholds is not None or self.watcher is not None or hasattr(self.bank, "ds_id")
            if alone or is_tracing() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
                return None
            self(_ALL)
            weights = per_step.made[lower].weights
        return weights[index]

    def compile_all(self) -> None:
        """Generates the weights as one operation of a graph that torch.compile makes, where `per_step` would."""
        bank: Any = self._parameters.get("bank")
        if bank is None or self.per_step is None or self.pure or self.empty or self.thresholds is not None:
            return
        if hasattr(bank, "device_mesh") or hasattr(bank, "ds_id") or self.watcher is not None:
            return
        if self.per_step.suits(bank.device.type) and not bank.is_meta:
            values = self._tensors()
            given = Given(values["bank"], values["scales"], (), values["gains"])  # type: ignore[arg-type]
            self.compiled = all_weights(given, self._compiled_key, None if self.bases else autocast_dtype(self))

    def _make_all(self) -> dict[int, Tensor]:
        """The weights of `per_step`, by slot."""
        assert self.per_step is not None
        graph = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters(recurse=False))
        if graph:
            self._require_reduction()
        name, lower = self.weight_name(0), autocast_dtype(self)
        return self.per_step.make(self.values(), name, lower, graph, self.frozen, self.bases)

    def forward(
        self,
        index: int,
        rows: Tensor | None = None,
        dtype: torch.dtype | None = None,
        values: Values | None = None,
    ) -> Tensor | dict[int, Tensor]:
        """The weight of slot `index` in its shape, or only its `rows` [m] as [m, C].

        Args:
            index: of the slot; `_ALL` for all weights that are generated together, by slot.
            rows: indices of the rows to generate; None: the whole weight.
            dtype: of the result, if it differs from the bank's (under autocast).
            values: the parameters of an earlier read, from which the weight is generated again, without a graph.

        Raises:
            ShareError: FSDP1 has flattened the bank, FSDP2 has sharded it outside of the root, DDP wraps a part without it, or
                a state dict with another plan was loaded in place.
        """
        if self.empty:
            self._require_values()
        if values is not None:
            return self.fast(index, rows, dtype, values.checked(self.weight_name(index)))
        if "bank" not in self._parameters:
            raise ShareError(
                f"the bank of {self.weight_name(index)} is no parameter any more, because FullyShardedDataParallel has flattened "
                "it: give it use_orig_params=True, or use fully_shard(model, reshard_after_forward=False) of FSDP2"
            )
        bank: Any = self.bank
        if isinstance(bank, Proxy):  # torch.fx records the call, so that the traced module has the bank
            tracer: Any = bank.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (index,), {})
        if hasattr(bank, "device_mesh"):
            raise ShareError(
                f"the bank of {self.weight_name(index)} is sharded by FSDP2 where it is read: let the root hold it, "
                "fully_shard(model, reshard_after_forward=False), and make the root a module of your own if it is an nn.Sequential"
            )
        if self.stopped and self.bank.requires_grad:  # `model.requires_grad_(True)` has started it again
            self.set_frozen(())
        frozen = index in self.frozen
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            raise ShareError(
                f"torch.jit.trace cannot record how {self.weight_name(index)} is generated: trace materialize(model)"
            )
        if self.pure or is_tracing():
            weight = self._compiled(index, rows, dtype)
            if weight is None:
                weight = self._make(index, rows, self._tensors(), dtype)
            return weight.detach() if frozen else weight
        if self.check_plan is not None:
            self.check_plan()
        if self.at_start:
            check_start(self)
        self._require_agreement()
        if index == _ALL:
            return self._make_all()
        if frozen or not torch.is_grad_enabled() or not any(p.requires_grad for p in self.parameters(recurse=False)):
            return self.fast(index, rows, dtype, self._tensors())
        anchor = self._current_anchor()
        if self.watcher is not None and graph_task_id() == -1:
            self.watcher.read(index)
        return Generate.apply(anchor.tensor, anchor.sums, self, index, rows, dtype)  # type: ignore[no-any-return]

    def _compiled(self, index: int, rows: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
        """The weight in a graph that has generated it with all others; None if it is wanted in another precision."""
        weight = self.compiled.get(index) if rows is None else None
        if weight is None or not builds_graph():
            return None
        lower = autocast_dtype(self) if index in self.lowered else None
        if self.bases is None and weight.dtype != (lower or self.dtype):
            return None
        return self._whole(index, None, weight, dtype)

    @torch.no_grad()
    def fast(
        self, index: int, rows: Tensor | None, dtype: torch.dtype | None, values: Mapping[str, Tensor | None]
    ) -> Tensor:
        """A weight without a graph, with as few passes over its elements as its morph allows."""
        path, bank = self._fast_paths[index], values["bank"]
        assert bank is not None
        if rows is not None or path is None:
            return self._make(index, rows, values, dtype)
        with _exact(bank.device.type):
            weight = self._pruned(index, path.generate(bank, self._own_values(index, values)))
            return self._whole(index, rows, weight, dtype)

    def _make(
        self, index: int, rows: Tensor | None, values: Mapping[str, Tensor | None], dtype: torch.dtype | None
    ) -> Tensor:
        """A weight by `mix` and `finish`: the pure path, differentiable."""
        with _exact(self.bank.device.type):
            elements = self._elements(index, rows)
            pieces = self._read(index, elements, values)
            own = self._own_values(index, values)
            weight = self._mix(index, rows, elements, pieces, own, self._projection(values["projections"], index))
            return self._whole(index, rows, self._pruned(index, weight), dtype)

    def _whole(self, index: int, rows: Tensor | None, weight: Tensor, dtype: torch.dtype | None) -> Tensor:
        """The generated weight, or a kept one with the generated difference, in `dtype`."""
        if self.bases is not None:
            return self.bases.add(index, weight, rows, dtype)
        return weight if dtype is None else weight.to(dtype)

    def _pruned(self, index: int, weight: Tensor) -> Tensor:
        return weight if self.thresholds is None else weight * (weight.abs() > self.thresholds[index])

    def _elements(self, index: int, rows: Tensor | None) -> Tensor | None:
        """Flat indices [m · C] of the requested rows' elements; None if the whole weight is generated."""
        slot = self.group.slots[index]
        if rows is None or slot.morph not in ELEMENTWISE:
            return None
        return (rows.unsqueeze(1) * slot.columns + torch.arange(slot.columns, device=rows.device)).view(-1)

    def _read(self, index: int, elements: Tensor | None, values: Mapping[str, Tensor | None]) -> tuple[Tensor, ...]:
        """The slot's templates, as views of the bank where possible, or only their `elements`."""
        assert values["bank"] is not None
        bank = flat(values["bank"])
        if elements is None:
            return tuple(reading.take(bank) for reading in self._readings[index])
        return tuple(bank[reading.at(elements, bank.numel())] for reading in self._readings[index])

    def _mix(
        self,
        index: int,
        rows: Tensor | None,
        elements: Tensor | None,
        pieces: tuple[Tensor, ...],
        own: Mapping[str, Tensor],
        projection: Tensor | None,
    ) -> Tensor:
        slot = self.group.slots[index]
        mixture = Mixture(slot, self.seed, self.group.size, pieces, own["coefficients"], projection, elements)
        base = MORPHS[slot.morph](mixture)
        if rows is not None and elements is None:
            base = base.view(slot.rows, slot.columns)[rows]
        return finish(slot, base, own["scale"], own["gains"], own["differences"], rows)

    def _own_values(self, index: int, values: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The slot's stretches of the parameters, and its scale."""
        scales = values["scales"]
        assert scales is not None
        return {"scale": scales[1 + index], **{name: self.own(values[name], index, name) for name in OWN}}

    def _projection(self, values: Tensor | None, index: int) -> Tensor | None:
        slot = self.group.slots[index]
        if slot.morph != "emb":
            return None
        assert values is not None
        start, end = self.projection_range(slot.templates)
        return values[start:end].view(EMBEDDING_SIZE, slot.templates)

    @torch.no_grad()
    def pull_back(
        self,
        gradient: Tensor,
        index: int,
        rows: Tensor | None,
        values: Mapping[str, Tensor | None],
        sums: dict[str, Tensor],
    ) -> None:
        """Adds the gradient of slot `index` to `sums`, given the weight's: O(K·n).

        Without a hand-written gradient, the pieces and the slot's own parameters become leaves of a small temporary graph.
        """
        slot, bank, own = self.group.slots[index], values["bank"], self._own_values(index, values)
        assert bank is not None
        if self.thresholds is not None:
            gradient = gradient * (self.fast(index, rows, None, values) != 0)
        with _exact(bank.device.type):
            path = self._fast_paths[index]
            if rows is None and path is not None:
                mine = {name: self.own(sums[name], index, name) for name in own if name in sums and own[name].numel()}
                path.pull_back(gradient.to(bank.dtype), bank, own, sums.get("bank"), mine)
                return
            sums = {name: flat(total) for name, total in sums.items()}
            elements = self._elements(index, rows)
            pieces = self._read(index, elements, values)
            projection = self._projection(values["projections"], index)
            leaves: dict[tuple[str, int], Tensor] = {("bank", k): piece for k, piece in enumerate(pieces)}
            leaves |= {(name, 0): own[name] for name in OWN if own[name].numel()}
            leaves |= {("projections", 0): projection} if projection is not None else {}
            leaves = {key: value.detach().requires_grad_() for key, value in leaves.items() if key[0] in sums}
            if not leaves:
                return
            with torch.enable_grad():
                read = tuple(leaves.get(("bank", k), piece) for k, piece in enumerate(pieces))
                own |= {name: leaves[name, 0] for name in OWN if (name, 0) in leaves}
                weight = self._mix(index, rows, elements, read, own, leaves.get(("projections", 0), projection))
            gradient = gradient.to(weight.dtype)
            parts = torch.autograd.grad(weight, list(leaves.values()), gradient, allow_unused=True)
        found = {key: part for key, part in zip(leaves, parts, strict=True) if part is not None}
        self._add_pieces(index, elements, {k: part for (name, k), part in found.items() if name == "bank"}, sums)
        self._add_own(index, {name: part for (name, _), part in found.items() if name in OWN}, sums)
        if ("projections", 0) in found:
            start, end = self.projection_range(slot.templates)
            sums["projections"][start:end] += found["projections", 0].view(-1)

    def _add_pieces(
        self, index: int, elements: Tensor | None, parts: Mapping[int, Tensor], sums: dict[str, Tensor]
    ) -> None:
        """Adds the gradient of each template k to the bank's gradient, at the elements that were read."""
        if "bank" not in sums:
            return
        for k, part in parts.items():
            reading = self._readings[index][k]
            if elements is None:
                reading.give(sums["bank"], part)
            else:
                sums["bank"].index_add_(0, reading.at(elements, self.group.size), part)

    def _add_own(self, index: int, parts: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
        for name in parts.keys() & sums.keys():
            start, length = self._ranges[index][name]
            sums[name][start : start + length] += parts[name]

    def _current_anchor(self) -> Anchor:
        """The anchor of the current forward; a new one after a backward, or if the parameters were exchanged."""
        parameters = tuple((name, p) for name, p in self._parameters.items() if p is not None and p.requires_grad)
        anchor = self.anchor
        if getattr(self.bank, "ds_persist", True) is False and not self._warned:
            self._warned = True
            warnings.warn(
                f"DeepSpeed gathers this bank again for each of its {len(self.group.slots)} weights: keep it gathered "
                f'with {{"zero_optimization": {{"stage3_param_persistence_threshold": {self.group.size + 1}}}}}',
                stacklevel=2,
            )
        if anchor is None or not anchor.depends_on(parameters):
            self._require_reduction()
            anchor = self.anchor = Anchor(self, parameters)
        return anchor

    def _require_agreement(self) -> None:
        if not self.agreed and dist.is_available() and dist.is_initialized():
            agree_under_fsdp2(self)

    def _require_reduction(self) -> None:
        """Checks that the DDP whose forward runs holds this bank, whose gradient nobody would reduce otherwise."""
        wrapper = active_ddp()
        if wrapper is None:
            return
        if wrapper not in _inside:
            _inside[wrapper] = {id(module) for module in wrapper.modules()}
        if id(self) not in _inside[wrapper]:
            raise ShareError(
                f"{type(wrapper).__name__} wraps a part of the model and not the bank that generates {self.weight_name(0)}, whose "
                "gradient it would not average: wrap the whole model, or share the part by itself, share(part, …), before"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Bank:
        self.anchor = None  # its node has the parameters' former dtype and device
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "anchor": None,
            "watcher": None,
            "check_plan": None,
            "per_step": None if self.per_step is None else self.per_step.only_small,
            "compiled": {},
            "agreed": False,
            "_emptied": (None, 0),
        }  # neither a graph nor an engine is copied or pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.compiled = {}  # older pickles have none
        only_small: Any = self.__dict__.get("per_step")
        self.generate_per_step(only_small is not None, bool(only_small))
        if "scales" not in self._buffers:  # pickled by version 0.1.0, whose slots had them
            scales = self.group.init_std, *(slot.scale for slot in self.group.slots)  # type: ignore[attr-defined]
            self._set_fixed(scales)
        unpickle_flat(self._parameters)

    def extra_repr(self) -> str:
        """Sizes of the bank and its weights."""
        return f"{self.group.size} elements for {self.group.numel} in {len(self.group.slots)} weights"


def banks_of(model: nn.Module) -> list[Bank]:
    """All banks of a model, in the order of its modules; none for a dense model."""
    return [module for module in model.modules() if isinstance(module, Bank)]


def _exact(device: str) -> AbstractContextManager[object]:
    """Context in which weights are generated in the bank's own precision, also under autocast."""
    is_on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()
