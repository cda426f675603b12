"""The weights of a bank as functions of its values, and their gradients: the fast path and the pure one.

Nothing here depends on when a weight is generated, or on how it joins a graph (`bank.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dist_ssn.plan.rules import EMBEDDING_SIZE
from dist_ssn.sharing.bank_values import OWN, BankValues, flat
from dist_ssn.sharing.morphs import ELEMENTWISE, MORPHS, Mixture, finish, readings
from dist_ssn.sharing.signed_path import fast_path


class BankArithmetic(BankValues):
    """Generates the weights of a bank from given values, and reduces their gradients; arguments as for `BankValues`."""

    def _prepare(self) -> None:
        super()._prepare()
        self._readings = [readings(slot, self.seed, self.group.size) for slot in self.group.slots]
        self._fast_paths = [fast_path(slot, self.seed, self.group.size) for slot in self.group.slots]

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


def _exact(device: str) -> AbstractContextManager[object]:
    """Context in which weights are generated in the bank's own precision, also under autocast."""
    is_on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()
