"""`Slot` and `Group`: how each weight is made, and the weights that share one bank. Frozen, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

LARGEST = 2**53
"""No size, seed or budget in a plan is above: integers that JSON readers everywhere keep exactly."""
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
