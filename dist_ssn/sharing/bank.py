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
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import Proxy

from dist_ssn.errors import ShareError
from dist_ssn.sharing.agreement import agree_under_fsdp2
from dist_ssn.sharing.autograd import Anchor, Generate, Watcher
from dist_ssn.sharing.bank_arithmetic import BankArithmetic
from dist_ssn.sharing.blocks import Placed, fits
from dist_ssn.sharing.columns import unpickle_flat
from dist_ssn.sharing.compiled import all_weights, register
from dist_ssn.sharing.per_step import PerStep
from dist_ssn.sharing.start_values import check_start
from dist_ssn.sharing.weight_source import Values, autocast_dtype
from dist_ssn.torch_private import FAST_PATH, active_ddp, builds_graph, dispatch_mode_is_on, graph_task_id, is_tracing

_ALL = -1
"""Index with which a forward generates the weights of all slots."""
_inside: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()  # DDP → its modules' ids


class Bank(BankArithmetic):
    """One group's bank; `bank(index)` generates the weight of slot `index`. Arguments as for `BankValues`.

    Generation runs inside `forward`, also when backward needs a weight again, so that the module hooks of an engine (ZeRO-3's
    gather, FSDP2's unshard) run around every read.
    """

    check_plan: Callable[[], None] | None = None
    """Checks that nobody wrote another plan into the state dict of this bank; None before there is one."""
    lowered: frozenset[int] = frozenset()
    """Indices of the slots that are read only by layers whose weight autocast lowers."""
    recurrent: frozenset[int] = frozenset()
    """Indices of the slots that recurrent layers read, which torch.compile leaves out of its graphs."""
    pure: bool = not FAST_PATH
    """True to use the pure path always."""
    watcher: Watcher | None = None
    anchor: Anchor | None = None
    per_step: PerStep | None = None
    """The weights that are generated at once for a forward; None if weights are generated on demand."""
    compiled: dict[int, Tensor] | None = None
    """The same in a graph that torch.compile makes, by slot."""
    _compiled_key = ""
    """Of the weights that `compiled` has."""
    _warned = False  # of ZeRO-3, which would partition the bank again after each use

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
        self.compiled = None  # an attribute of its own from here on: torch.compile's guards look at where it is
        traced = [placed for placed in slots if placed.index not in self.recurrent]
        self._compiled_key = register(traced, self.seed, self.group.size, self.lowered) if traced else ""

    def at_hand(self, index: int) -> Tensor | None:
        """The weight of slot `index`, if weights are generated once per forward; None if it is to be generated on demand."""
        per_step, bank = self.per_step, self._parameters.get("bank")
        if per_step is None or bank is None or bank.is_meta or index not in per_step.indices:
            return None
        if not per_step.forwards and (not per_step.made or graph_task_id() == -1):
            return None  # neither in a forward of the model nor where its backward recomputes one
        if dispatch_mode_is_on():  # fake weights would be kept, and a recomputation would run other operations
            return None
        graph = torch.is_grad_enabled() and not self.stopped
        lower = autocast_dtype(self) if torch.is_autocast_enabled(bank.device.type) else None
        weights = per_step.current(lower, graph, self._parameters, self._buffers)
        if weights is None:
            alone = self.pure or self.thresholds is not None or self.watcher is not None or hasattr(bank, "ds_id")
            if alone or is_tracing() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
                return None
            weights = self(_ALL)
        return weights[index]

    def compile_all(self) -> None:
        """Generates the weights as one operation of a graph that torch.compile makes, where `per_step` would."""
        bank: Any = self._parameters.get("bank")
        if bank is None or not self._compiled_key or self.pure or self.empty or self.thresholds is not None:
            return
        if hasattr(bank, "device_mesh") or hasattr(bank, "ds_id") or self.watcher is not None:
            return
        assert self.per_step is not None
        if self.per_step.suits(bank.device.type) and not bank.is_meta:
            lower = None if self.bases else autocast_dtype(self)
            self.compiled = all_weights(bank, self.scales, self.gains, self._compiled_key, lower)

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
        self._require_parameters(index)
        bank: Any = self.bank
        if isinstance(bank, Proxy):  # torch.fx records the call, so that the traced module has the bank
            tracer: Any = bank.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (index,), {})
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

    def _require_parameters(self, index: int) -> None:
        """Checks that the parameters are here as a whole, to generate slot `index`."""
        if "bank" not in self._parameters:
            raise ShareError(
                f"the bank of {self.weight_name(index)} is no parameter any more, because FullyShardedDataParallel has flattened "
                "it: give it use_orig_params=True, or use fully_shard(model, reshard_after_forward=False) of FSDP2"
            )
        if not isinstance(self.bank, Proxy) and hasattr(self.bank, "device_mesh"):
            raise ShareError(
                f"the bank of {self.weight_name(index)} is sharded by FSDP2 where it is read: let the root hold it, "
                "fully_shard(model, reshard_after_forward=False), and make the root a module of your own if it is an nn.Sequential"
            )

    def _compiled(self, index: int, rows: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
        """The weight in a graph that has generated it with all others; None if it is wanted in another precision."""
        weight = self.compiled.get(index) if self.compiled is not None and rows is None else None
        if weight is None or not builds_graph():
            return None
        lower = autocast_dtype(self) if index in self.lowered else None
        if self.bases is None and weight.dtype != (lower or self.dtype):
            return None
        return self._whole(index, None, weight, dtype)

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
            "compiled": None,
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
        unpickle_flat(self._parameters)

    def extra_repr(self) -> str:
        """Sizes of the bank and its weights."""
        return f"{self.group.size} elements for {self.group.numel} in {len(self.group.slots)} weights"


def banks_of(model: nn.Module) -> list[Bank]:
    """All banks of a model, in the order of its modules; none for a dense model."""
    return [module for module in model.modules() if isinstance(module, Bank)]
