"""`Plan`: groups, their banks, and a slot for each weight. Frozen, JSON both ways, without torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dist_ssn.errors import PlanError
from dist_ssn.files import parse_json
from dist_ssn.plan.read import FORMAT, fields_of_plan
from dist_ssn.plan.slots import Group, Slot

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Plan:
    """Groups, their banks, and a slot for each weight. `share(model, plan=...)` rebuilds exactly this.

    It is a function of the architecture and the options. Initial standard deviations are no part of it: they are data of a model.
    """

    groups: tuple[Group, ...]
    budget: int
    """Number of trainable parameters that was allowed."""
    seed: int = 0
    """Seed of the pseudo-random signs and orders, and of the bank's initial values."""
    keep: bool = False
    """True if the banks generate differences from weights that are kept."""
    scales: Mapping[str, tuple[float, ...]] | None = field(default=None, compare=False, repr=False)
    """Scales of each bank (`plan.scales.Scales`) that a file of format 1 recorded; None: `share` takes the model's own."""

    @property
    def parameters(self) -> int:
        """Number of trainable parameters that replace the weights; never more than `budget`."""
        return sum(group.parameters for group in self.groups)

    @property
    def numel(self) -> int:
        """Number of elements of all weights."""
        return sum(group.numel for group in self.groups)

    @property
    def fingerprint(self) -> str:
        """Hex digest that is equal for equal plans, on every machine."""
        return hashlib.sha256(json.dumps(self._structure(), sort_keys=True).encode()).hexdigest()[:16]

    def slots(self) -> Iterator[tuple[Group, Slot]]:
        """Every weight's slot with its group, in the plan's order."""
        for group in self.groups:
            for slot in group.slots:
                yield group, slot

    def to_json(self, indent: int | None = 1) -> str:
        """The plan as JSON, which `from_json` reads."""
        recorded = {} if self.scales is None else {"scales": self.scales}
        return json.dumps({**self._structure(), **recorded}, indent=indent, sort_keys=True)

    def _structure(self) -> dict[str, Any]:
        groups = [dataclasses.asdict(group) for group in self.groups]
        kept = {"keep": True} if self.keep else {}
        return {"format": FORMAT, "groups": groups, "budget": self.budget, "seed": self.seed, **kept}

    @staticmethod
    def from_json(text: str) -> Plan:
        """Reads the output of `to_json`.

        Raises:
            PlanError: the text is no JSON, or is not a plan of this format; the message names the wrong field.
        """
        try:
            data = parse_json(text)
        except (TypeError, ValueError) as error:  # malformed, or an integer of thousands of digits
            raise PlanError(f"the plan is not valid JSON ({error}): give the output of Plan.to_json()") from error
        return Plan(**fields_of_plan(data))

    def rows(self) -> list[dict[str, Any]]:
        """One dict per weight, for tables and trackers; sizes in elements, `start` as an index in the bank."""
        return [
            {
                "weight": slot.name,
                "shape": "x".join(map(str, slot.shape)),
                "numbers": slot.numel,
                "bank": group.name,
                "bank_size": group.size,
                "start": slot.start,
                "morph": slot.morph,
                "templates": slot.templates,
                "gains": slot.gains,
                "rank": slot.rank,
                "own_numbers": slot.extras,
            }
            for group, slot in self.slots()
        ]

    def table(self) -> Table:
        """The plan as a table for the terminal: one line per weight, then one per bank."""
        from rich.markup import escape  # only where a table is drawn: `import dist_ssn` stays light
        from rich.table import Table

        count, share = sum(1 for _ in self.slots()), self.parameters / self.numel
        table = Table(
            title=f"{count} weights with {self.numel:,} elements ← {self._kept()}{self.parameters:,} parameters ({share:.2%})"
        )
        for column in ("weight", "shape", "bank", "morph", "own parameters"):
            right = column in ("shape", "own parameters")
            table.add_column(column, justify="right" if right else "left", overflow="fold")
        for group, slot in self.slots():
            details = [f"K={slot.templates}"] if slot.templates > 1 else []
            details += ["gains"] if slot.gains else []
            details += [f"rank {slot.rank}"] if slot.rank else []
            morph = f"{slot.morph} ({', '.join(details)})" if details else slot.morph
            table.add_row(escape(slot.name), "×".join(map(str, slot.shape)), group.name, morph, f"{slot.extras:,}")
        table.add_section()
        for group in self.groups:
            table.add_row(
                f"bank {group.name}", f"{group.numel:,}", f"{len(group.slots)} weights", "", f"{group.size:,}"
            )
        return table

    def _kept(self) -> str:
        return "kept values and " if self.keep else ""

    def __str__(self) -> str:
        return (
            f"{sum(1 for _ in self.slots())} weights with {self.numel:,} elements from {self._kept()}{self.parameters:,} "
            f"parameters ({self.parameters / self.numel:.2%}) in {len(self.groups)} bank(s)"
        )
