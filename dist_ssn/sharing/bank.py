"""`Bank`: the few flat parameters of a group of weights, and the generation of its weights from them.

The fast path keeps no generated weight, and costs O(K·n) for a weight of n elements, independent of the bank's size:

- A read joins the graph through an anchor (`autograd.py`), and saves no tensor except the requested rows.
- Operations that save the weight for backward keep its origin instead (`layers.py`), and the bank generates it again.

The pure path is `mix` and `finish` under plain autograd. Tests compare the fast path with it, and `torch.compile` and
`torch.func` trace it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import Proxy

from dist_ssn.errors import ShareError
from dist_ssn.plan.rules import EMBEDDING_SIZE, RULES
from dist_ssn.plan.scales import Scales
from dist_ssn.plan.slots import Group
from dist_ssn.sharing.agreement import agree_under_fsdp2, structure_of_bank
from dist_ssn.sharing.autograd import Anchor, Generate, Watcher
from dist_ssn.sharing.bases import Bases, as_rows, different
from dist_ssn.sharing.decay_check import watch_decay
from dist_ssn.sharing.initial_values import initial_values, write
from dist_ssn.sharing.morphs import ELEMENTWISE, MORPHS, Mixture, finish, prepare, readings
from dist_ssn.sharing.per_step import PerStep, Placed, fits
from dist_ssn.sharing.plan_of import recorded_scales
from dist_ssn.sharing.signed_path import fast_path
from dist_ssn.sharing.weight_source import Values
from dist_ssn.torch_private import FAST_PATH, active_ddp, graph_task_id, is_tracing

PARAMETERS = ("bank", "coefficients", "projections", "gains", "differences")
"""Names of a bank's flat parameters; those without elements in the plan are None."""
_OWN = ("coefficients", "gains", "differences")
"""The parameters in which each slot has a stretch of its own; `Slot` gives the stretch's length under the same name."""


_ALL = -1
"""Index with which a forward generates the weights of all slots."""
_inside: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()  # DDP → its modules' ids


class Bank(nn.Module):
    """One group's parameters, each flat; `bank(index)` generates the weight of slot `index`.

    Generation runs inside `forward`, also when backward needs a weight again, so that the module hooks of an engine (ZeRO-3's
    gather, FSDP2's unshard) run around every read.

    Args:
        group: the group of the plan.
        seed: the plan's.
        device: of the parameters.
        dtype: of the parameters.
        scales: of the bank and its slots; None: those of weights with the bank's own standard deviation, 1.
    """

    bank: nn.Parameter
    coefficients: nn.Parameter | None
    projections: nn.Parameter | None
    gains: nn.Parameter | None
    differences: nn.Parameter | None
    scales: Tensor
    """[1 + slots] in float32: see `plan.scales.Scales`. Data of this model, which are loaded and broadcast as its values are."""
    structure: Tensor
    """[1]: `structure_of_bank` of the rank whose buffers were copied here; not in the state dict, which has the plan."""
    thresholds: Tensor | None
    """For each slot, the magnitude up to which an element of its weight is set to zero; None if weights are not pruned."""
    bases: Bases | None = None
    """What the weights were when they were shared with `keep`; the bank generates the differences from them."""
    frozen: frozenset[int] = frozenset()
    """Indices of the slots that send no gradient into the bank (`parts.freeze`)."""
    stopped: bool = False
    """True if the parameters require no gradient because all slots are frozen."""
    empty: bool = False
    """True if the parameters have no values, since `to_empty` or on the meta device."""
    agreed: bool = False
    """True if all ranks are known to have the same scales (`agreement`)."""
    check_plan: Callable[[], None] | None = None
    """Checks that nobody wrote another plan into the state dict of this bank; None before there is one."""

    def __init__(
        self,
        group: Group,
        seed: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        scales: Scales | None = None,
    ):
        super().__init__()
        self.group, self.seed = group, seed
        self.pure = not FAST_PATH
        """True to use the pure path always."""
        sizes = dict.fromkeys(PARAMETERS, 0) | {"bank": group.size, "projections": group.projection_parameters}
        self._ranges: list[dict[str, tuple[int, int]]] = []
        for slot in group.slots:
            self._ranges.append({name: (sizes[name], getattr(slot, name)) for name in _OWN})
            for name in _OWN:
                sizes[name] += getattr(slot, name)
        for name in PARAMETERS:
            values = torch.empty(sizes[name], device=device, dtype=dtype) if sizes[name] else None
            self.register_parameter(name, nn.Parameter(values) if values is not None else None)
        if scales is None:
            scales = 1.0, *(RULES[slot.morph].gain(slot) for slot in group.slots)
        self._set_fixed(scales)
        self.register_buffer("thresholds", None)
        self._readings = [readings(slot, seed, group.size) for slot in group.slots]
        self._fast_paths = [fast_path(slot, seed, group.size) for slot in group.slots]
        self.empty, self._emptied = self.bank.is_meta, (self.bank, 0)
        self.watcher: Watcher | None = None
        self.anchor: Anchor | None = None
        self.per_step: PerStep | None = None
        """The weights that are generated at once for a forward; None if weights are generated on demand."""
        self._warned = False  # of ZeRO-3, which would partition the bank again after each use
        self._prepare()

    def _set_fixed(self, scales: Scales) -> None:
        """Makes the buffers that training does not change."""
        self._scales = scales  # for a bank that has been on "meta", where buffers have no values
        self.register_buffer("scales", torch.tensor(scales, dtype=torch.float32, device=self.device))
        structure = structure_of_bank(self.group, self.seed).to(self.device)
        self.register_buffer("structure", structure, persistent=False)

    def keep(self, bases: Bases) -> None:
        """Generates differences from these tensors from now on.

        Args:
            bases: one for each slot.
        """
        self.bases = bases
        # Bytes as floating-point numbers: an average of state dicts, or one in half precision, still contains them.
        self.register_buffer("fingerprints", as_rows(bases.fingerprints, self.device, torch.float32))

    def fixed_buffers(self) -> list[Tensor]:
        """The buffers in which all ranks agree with rank 0."""
        return [b for name in ("scales", "structure", "fingerprints") if (b := self._buffers.get(name)) is not None]

    def reset_parameters(self, scales: Scales | None = None) -> None:
        """Gives the bank its initial values.

        Args:
            scales: new scales; None: the current ones.
        """
        if scales is not None:
            self._set_fixed(scales)
        std = float(self.scales[0]) if scales is None else scales[0]
        for name, values in initial_values(self.group, self.seed, std).items():
            if (parameter := self._parameters[name]) is not None:
                write(parameter, values)
        self.empty = False

    def _require_values(self) -> None:
        """Checks that the parameters have values.

        Raises:
            ShareError: they have none.
        """
        if self.bank.is_meta:
            return
        if self.bank is self._emptied[0] and self.bank._version != self._emptied[1]:  # somebody has written to it
            self.empty = False
            return
        raise ShareError(
            f"the bank of {self.weight_name(0)} has no values since to_empty(): call dist_ssn.initialize(model), or load "
            "a state dict"
        )

    def _prepare(self) -> None:
        for slot in self.group.slots:
            prepare(slot, self.seed, self.bank)

    @property
    def device(self) -> torch.device:
        """Device of the parameters, and so of the weights."""
        return self.bank.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights outside of autocast: that of the parameters, or of kept weights."""
        return self.bank.dtype if self.bases is None else self.bases.dtype

    def weight_name(self, index: int) -> str:
        """Full name of the weight of slot `index` in the model."""
        return self.group.slots[index].name

    def set_frozen(self, indices: Iterable[int]) -> None:
        """Stops the gradient of exactly these slots; if these are all, the parameters don't require a gradient.

        Args:
            indices: of the frozen slots.
        """
        self.frozen = frozenset(indices)
        whole = len(self.frozen) == len(self.group.slots)
        if whole != self.stopped:
            self.requires_grad_(not whole)
        self.stopped = whole

    def values(self) -> Values:
        """The current parameters, from which a weight can be generated again."""
        return Values.of(self._parameters, self._fixed())

    def _fixed(self) -> dict[str, Tensor | None]:
        return {"scales": self._buffers["scales"]}

    def _tensors(self) -> dict[str, Tensor | None]:
        """Everything that a weight is generated from, by name."""
        return {**self._parameters, **self._fixed()}

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
        self.per_step = PerStep(slots, self.seed, self.group.size, only_small) if slots else None

    def at_hand(self, index: int) -> Tensor | None:
        """The weight of slot `index`, if weights are generated once per forward; None if it is to be generated on demand."""
        per_step = self.per_step
        if per_step is None or index not in per_step.indices:
            return None
        graph = torch.is_grad_enabled() and not self.stopped
        made = per_step.current(self._tensors(), graph)
        if made is None:
            inside = per_step.forwards or (per_step.made is not None and graph_task_id() != -1)
            alone = self.pure or self.thresholds is not None or self.watcher is not None or hasattr(self.bank, "ds_id")
            if not inside or alone or is_tracing() or torch.jit.is_tracing():  # pyright: ignore
                return None
            made = self(_ALL)
        return made.get(index)

    def _make_all(self) -> dict[int, Tensor]:
        assert self.per_step is not None
        if self.check_plan is not None:
            self.check_plan()
        self._require_agreement()
        graph = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters(recurse=False))
        if graph:
            self._require_reduction()
        self.per_step.make(self.values(), self.weight_name(0), graph, self.frozen, self.bases)
        assert self.per_step.made is not None
        return self.per_step.made

    def forward(
        self,
        index: int,
        rows: Tensor | None = None,
        dtype: torch.dtype | None = None,
        values: Values | None = None,
    ) -> Tensor:
        """The weight of slot `index` in its shape, or only its `rows` [m] as [m, C].

        Args:
            index: of the slot.
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
        if index == _ALL:
            return self._make_all()  # type: ignore[return-value]  # for `at_hand` alone
        frozen = index in self.frozen
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            raise ShareError(
                f"torch.jit.trace cannot record how {self.weight_name(index)} is generated: trace materialize(model)"
            )
        if self.pure or is_tracing():
            weight = self._make(index, rows, self._tensors(), dtype)
            return weight.detach() if frozen else weight
        if self.check_plan is not None:
            self.check_plan()
        self._require_agreement()
        if frozen or not torch.is_grad_enabled() or not any(p.requires_grad for p in self.parameters(recurse=False)):
            return self.fast(index, rows, dtype, self._tensors())
        anchor = self._current_anchor()
        if self.watcher is not None and graph_task_id() == -1:
            self.watcher.read(index)
        return Generate.apply(anchor.tensor, anchor.sums, self, index, rows, dtype)  # type: ignore[no-any-return]

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
        bank = values["bank"]
        assert bank is not None
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

    def own(self, values: Tensor | None, index: int, name: str) -> Tensor:
        """The stretch of slot `index` in `values`, which has the length of the parameter `name`."""
        start, length = self._ranges[index][name]
        return values[start : start + length] if values is not None else self.bank.new_empty(0)

    def _own_values(self, index: int, values: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The slot's stretches of the parameters, and its scale."""
        scales = values["scales"]
        assert scales is not None
        return {"scale": scales[1 + index], **{name: self.own(values[name], index, name) for name in _OWN}}

    def _projection(self, values: Tensor | None, index: int) -> Tensor | None:
        slot = self.group.slots[index]
        if slot.morph != "emb":
            return None
        assert values is not None
        start, end = self.projection_range(slot.templates)
        return values[start:end].view(EMBEDDING_SIZE, slot.templates)

    def projection_range(self, templates: int) -> tuple[int, int]:
        """Start and end of the projection to `templates` coefficients in `projections`."""
        start = EMBEDDING_SIZE * sum(k for k in self.group.projections if k < templates)
        return start, start + EMBEDDING_SIZE * templates

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
            elements = self._elements(index, rows)
            pieces = self._read(index, elements, values)
            projection = self._projection(values["projections"], index)
            leaves: dict[tuple[str, int], Tensor] = {("bank", k): piece for k, piece in enumerate(pieces)}
            leaves |= {(name, 0): own[name] for name in _OWN if own[name].numel()}
            leaves |= {("projections", 0): projection} if projection is not None else {}
            leaves = {key: value.detach().requires_grad_() for key, value in leaves.items() if key[0] in sums}
            if not leaves:
                return
            with torch.enable_grad():
                read = tuple(leaves.get(("bank", k), piece) for k, piece in enumerate(pieces))
                own |= {name: leaves[name, 0] for name in _OWN if (name, 0) in leaves}
                weight = self._mix(index, rows, elements, read, own, leaves.get(("projections", 0), projection))
            gradient = gradient.to(weight.dtype)
            parts = torch.autograd.grad(weight, list(leaves.values()), gradient, allow_unused=True)
        found = {key: part for key, part in zip(leaves, parts, strict=True) if part is not None}
        self._add_pieces(index, elements, {k: part for (name, k), part in found.items() if name == "bank"}, sums)
        self._add_own(index, {name: part for (name, _), part in found.items() if name in _OWN}, sums)
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

    def require_structure(self) -> None:
        """Checks that the structure is that of the rank whose buffers were copied here.

        Raises:
            ShareError: it is not.
        """
        if int(self.structure) != int(structure_of_bank(self.group, self.seed)):
            raise ShareError(
                f"the bank of {self.weight_name(0)} is read in another way on rank 0, so the ranks' models differ: give all ranks "
                "the same model, budget, mapping, morph and seed, or one plan, share(model, plan=…)"
            )

    def require_base(self, fingerprints: Tensor | None = None, whose: str = "rank 0 is") -> None:
        """Checks that kept weights have these fingerprints.

        Args:
            fingerprints: see `bases.as_rows`; None: those of the rank whose buffers were copied here.
            whose: begin of the message.

        Raises:
            ShareError: they have others.
        """
        if self.bases is None:
            return
        theirs = self._buffers["fingerprints"] if fingerprints is None else fingerprints
        assert theirs is not None
        names = [slot.name for slot in self.group.slots]
        if others := different(names, self.bases.fingerprints, theirs):
            raise ShareError(
                f"{whose} trained on other kept values of {others[0]} ({len(others)} of {len(names)} weights of its bank differ): "
                "load the same pretrained values, in the same dtype, before share(model, keep=True)"
            )

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
        scales, was_meta = self.scales, self.bank.is_meta
        if self.bases is not None:
            if "to_empty" in getattr(fn, "__qualname__", "") or fn(self.bases.tensors[0][:0]).is_meta:
                raise ShareError(
                    f"{self.weight_name(0)} and all other kept weights would lose their values: make materialize(model) empty"
                )
            self.keep(self.bases.moved(fn))
        super()._apply(fn, recurse)
        if not was_meta and self.bank.is_meta:
            self._scales = tuple(scales.tolist())
        if self.bank.is_meta or was_meta or "to_empty" in getattr(fn, "__qualname__", ""):
            self.empty, self._emptied = True, (self.bank, self.bank._version)
            self._set_fixed(self._scales if was_meta else tuple(scales.tolist()))
        if self.scales.dtype != scales.dtype:  # `half()` is for values that are computed with
            self.scales = scales.to(self.scales.device)
        self._prepare()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *lists: list[str]
    ) -> None:
        """Loads the values; a state dict of version 0.1.0 has the scales in its plan."""
        key = f"{prefix}scales"
        if key not in state_dict and (recorded := recorded_scales(state_dict, prefix)) is not None:
            state_dict[key] = torch.tensor(recorded, dtype=torch.float32)
        if self.bases is not None and f"{prefix}fingerprints" in state_dict:
            self.require_base(state_dict[f"{prefix}fingerprints"], "the state dict was")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        if f"{prefix}bank" in state_dict:
            self.empty = self.bank.is_meta
        self.scales = self.scales.float()  # `assign=True` takes the dtype that the state dict has

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "anchor": None,
            "watcher": None,
            "check_plan": None,
            "per_step": None if self.per_step is None else self.per_step.only_small,
            "agreed": False,
            "_emptied": (None, 0),
        }  # neither a graph nor an engine is copied or pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        only_small: Any = self.__dict__.get("per_step")
        self.generate_per_step(only_small is not None, bool(only_small))
        if "scales" not in self._buffers:  # pickled by version 0.1.0, whose slots had them
            scales = self.group.init_std, *(slot.scale for slot in self.group.slots)  # type: ignore[attr-defined]
            self._set_fixed(scales)
        watch_decay([self])

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
