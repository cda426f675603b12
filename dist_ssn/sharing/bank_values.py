"""`BankValues`: the values of a bank, from their start to loading, moving and the comparison between ranks; `bank.py` generates.

Parameters are trained. The buffers `scales`, `structure` and `fingerprints` never change in training: all ranks have rank 0's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dist_ssn.errors import ShareError
from dist_ssn.plan.rules import EMBEDDING_SIZE, RULES
from dist_ssn.plan.scales import Scales
from dist_ssn.plan.slots import Group
from dist_ssn.sharing.agreement import structure_of_bank
from dist_ssn.sharing.bases import Bases, as_rows, different
from dist_ssn.sharing.columns import load_flat, shape_of
from dist_ssn.sharing.initial_values import initial_values, write
from dist_ssn.sharing.morphs import prepare
from dist_ssn.sharing.plan_of import recorded_scales
from dist_ssn.sharing.start_values import steps_taken
from dist_ssn.sharing.weight_source import Values

PARAMETERS = ("bank", "coefficients", "projections", "gains", "differences")
"""Names of a bank's parameters, [n] or [n, 1] (`columns.py`); those without elements in the plan are None."""
OWN = ("coefficients", "gains", "differences")
"""The parameters in which each slot has a stretch of its own; `Slot` gives the stretch's length under the same name."""
_Self = TypeVar("_Self", bound="BankValues")


def flat(values: Tensor) -> Tensor:
    """A parameter of a bank, or its gradient, as [n]: a view."""
    return values if values.ndim == 1 else values.view(-1)


class BankValues(nn.Module):
    """The values of one group's bank: parameters that are trained, and buffers that are not.

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
    """The weights' values when they were shared with `keep`; the bank generates the differences from them."""
    frozen: frozenset[int] = frozenset()
    """Indices of the slots that send no gradient into the bank (`parts.freeze`)."""
    stopped: bool = False
    """True if the parameters require no gradient because all slots are frozen."""
    empty: bool = False
    """True if the parameters have no values, since `to_empty` or on the meta device."""
    at_start: bool = False
    """True from the initial values on, until they are used or others are loaded (`start_values.py`)."""
    steps_before: int = 0
    """Number of steps of the process's optimizers before the bank got its initial values."""
    agreed: bool = False
    """True if all ranks are known to have the same scales (`agreement`)."""

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
        sizes = dict.fromkeys(PARAMETERS, 0) | {"bank": group.size, "projections": group.projection_parameters}
        self._ranges: list[dict[str, tuple[int, int]]] = []
        for slot in group.slots:
            self._ranges.append({name: (sizes[name], getattr(slot, name)) for name in OWN})
            for name in OWN:
                sizes[name] += getattr(slot, name)
        for name in PARAMETERS:
            shape = shape_of(name, sizes[name])
            values = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if sizes[name] else None
            self.register_parameter(name, values)
        if scales is None:
            scales = 1.0, *(RULES[slot.morph].gain(slot) for slot in group.slots)
        self._set_fixed(scales)
        self.register_buffer("thresholds", None)
        self.empty, self._emptied = self.bank.is_meta, (self.bank, 0)
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
        names = ("scales", "structure", "fingerprints", "frozen_fingerprints")
        return [buffer for name in names if (buffer := self._buffers.get(name)) is not None]

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
        self.empty, self.at_start, self.steps_before = False, True, steps_taken()

    def _require_values(self) -> None:
        """Checks that the parameters have values.

        Raises:
            ShareError: they have none.
        """
        emptied, version = self._emptied
        if self.bank.is_meta:
            return
        if emptied is not None and emptied.is_meta:  # `functional_call` has put other parameters in its place
            return
        if self.bank is emptied and self.bank._version != version:  # somebody has written to it
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

    def own(self, values: Tensor | None, index: int, name: str) -> Tensor:
        """The stretch [n] of slot `index` in `values`, which has the length of the parameter `name`."""
        start, length = self._ranges[index][name]
        return flat(values)[start : start + length] if values is not None else self.bank.new_empty(0)

    def projection_range(self, templates: int) -> tuple[int, int]:
        """Start and end of the projection to `templates` coefficients in `projections`."""
        start = EMBEDDING_SIZE * sum(k for k in self.group.projections if k < templates)
        return start, start + EMBEDDING_SIZE * templates

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

    def _apply(self: _Self, fn: Any, recurse: bool = True) -> _Self:
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
        """Loads the values; a state dict of version 0.1.0 has flat banks, and the scales in its plan."""
        load_flat(state_dict, {f"{prefix}{name}": p.shape for name, p in self._parameters.items() if p is not None})
        key = f"{prefix}scales"
        if key not in state_dict and (recorded := recorded_scales(state_dict, prefix)) is not None:
            state_dict[key] = torch.tensor(recorded, dtype=torch.float32)
        if self.bases is not None and f"{prefix}fingerprints" in state_dict:
            self.require_base(state_dict[f"{prefix}fingerprints"], "the state dict was")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        if f"{prefix}bank" in state_dict:
            self.empty, self.at_start = self.bank.is_meta, False
        self.scales = self.scales.float()  # `assign=True` takes the dtype that the state dict has
        if self.structure.device != self.device:  # and leaves on "meta" what the state dict has not
            self.structure = structure_of_bank(self.group, self.seed).to(self.device)
