"""`Plan`, `Group`, `Slot`: what a plan is made of. Frozen, JSON both ways, without torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from dist_ssn.errors import PlanError

FORMAT = 1
LARGEST = 2**53
"""No size, seed or budget in a plan is above: numbers that JSON readers everywhere keep exactly."""
_MORPHS_WITH_EMBEDDING = ("emb",)


@dataclass(frozen=True)
class Slot:
    """How one weight is made: where it reads the bank, how it mixes what it read, and which numbers it has of its own."""

    name: str
    shape: tuple[int, ...]
    morph: str
    """A key of `dist_ssn.sharing.morphs.MORPHS`."""
    start: int
    """First number of the bank that is read; reading wraps round."""
    templates: int
    """K, the number of templates that are mixed."""
    scale: float
    """Fixed gain that gives the weight its layer's own initial standard deviation."""
    init_std: float
    coefficients: int = 0
    """Learned numbers that mix the templates (a mask's numbers, for "mask")."""
    template_shape: tuple[int, int] = (0, 0)
    """Rows and columns of a template before it is resized, for "inter"."""
    chunk: int = 0
    """Numbers in a row that share a pseudo-random sign, for "offset" and "hash"."""
    row_gains: bool = False
    column_gains: bool = False
    rank: int = 0
    """Rank of the weight's own difference U·V."""
    zero_row: int | None = None
    aliases: tuple[str, ...] = ()
    """The other names of a tied weight."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return self.numel // self.shape[0]

    @property
    def gains(self) -> int:
        """Learned gains, one per row and one per column where the slot has them."""
        return self.rows * self.row_gains + self.columns * self.column_gains

    @property
    def differences(self) -> int:
        """Numbers in U [rows, rank] and V [rank, columns]."""
        return self.rank * (self.rows + self.columns)

    @property
    def extras(self) -> int:
        """Everything that belongs to this weight alone."""
        return self.coefficients + self.gains + self.differences


@dataclass(frozen=True)
class Group:
    """The weights that share one bank of `size` numbers, which start normal with standard deviation `init_std`."""

    name: str
    size: int
    init_std: float
    slots: tuple[Slot, ...]

    @property
    def projections(self) -> tuple[int, ...]:
        """The values of K for which the group holds a projection from layer embeddings ("emb"), ascending."""
        return tuple(sorted({s.templates for s in self.slots if s.morph in _MORPHS_WITH_EMBEDDING}))

    @property
    def projection_numbers(self) -> int:
        widths = {s.coefficients for s in self.slots if s.morph in _MORPHS_WITH_EMBEDDING}
        return sum(self.projections) * (widths.pop() if widths else 0)

    @property
    def parameters(self) -> int:
        """Trainable numbers: bank, shared projections, and each weight's own."""
        return self.size + self.projection_numbers + sum(slot.extras for slot in self.slots)

    @property
    def numel(self) -> int:
        return sum(slot.numel for slot in self.slots)


@dataclass(frozen=True)
class Plan:
    """Groups, their banks, and a slot for each weight. `share(model, plan=...)` rebuilds exactly this."""

    groups: tuple[Group, ...]
    budget: int
    """The number of trainable numbers that was allowed."""
    seed: int = 0
    """Seed of the pseudo-random signs and orders, and of the bank's initial values."""

    @property
    def parameters(self) -> int:
        """Trainable numbers that stand for all the weights; never more than `budget`."""
        return sum(group.parameters for group in self.groups)

    @property
    def numel(self) -> int:
        """Numbers in all the weights together."""
        return sum(group.numel for group in self.groups)

    @property
    def fingerprint(self) -> str:
        """Hex digest that is equal for equal plans, on every machine."""
        return hashlib.sha256(self.to_json(indent=None).encode()).hexdigest()[:16]

    def slots(self) -> Iterator[tuple[Group, Slot]]:
        """Every weight's slot with its group, in the plan's order."""
        for group in self.groups:
            for slot in group.slots:
                yield group, slot

    def to_json(self, indent: int | None = 1) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=indent, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Reads what `to_json` wrote.

        Raises:
            PlanError: the text is no JSON, or is not a plan of this format; says which field is wrong.
        """
        from dist_ssn.plan.read import plan_from_data

        try:
            data = json.loads(text)
        except (
            TypeError,
            ValueError,
            RecursionError,
        ) as error:  # ValueError: malformed, or an integer of thousands of digits
            raise PlanError(f"the plan is not valid JSON ({error}): give what Plan.to_json() wrote") from error
        return plan_from_data(data)

    def rows(self) -> list[dict[str, Any]]:
        """One dict per weight, for tables and trackers: sizes in numbers, `start` in the bank."""
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
        """The plan as a table that a person reads: one line per weight, then the sums."""
        share = self.parameters / self.numel
        table = Table(
            title=f"{self.numel:,} numbers in {sum(1 for _ in self.slots())} weights ← {self.parameters:,} ({share:.2%})"
        )
        for column in ("weight", "shape", "bank", "morph", "own numbers"):
            table.add_column(column, justify="right" if column in ("shape", "own numbers") else "left", overflow="fold")
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

    def __str__(self) -> str:
        return (
            f"{self.numel:,} numbers in {sum(1 for _ in self.slots())} weights from {self.parameters:,} "
            f"({self.parameters / self.numel:.2%}) in {len(self.groups)} bank(s)"
        )
