"""`Slot` and `Group`: the generation of one weight, and the weights that share one bank. Frozen, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

LARGEST = 2**53
"""Upper bound of sizes, seeds and budgets in a plan: every JSON reader keeps integers up to it exactly."""
_MORPHS_WITH_EMBEDDING = ("emb",)


@dataclass(frozen=True)
class Slot:
    """Generation of one weight: the stretch of the bank that it reads, the mixing of templates, and its own parameters."""

    name: str
    shape: tuple[int, ...]
    morph: str
    """A key of `dist_ssn.sharing.morphs.MORPHS`."""
    start: int
    """Index of the first element of the bank that is read; reading wraps around."""
    templates: int
    """K, the number of templates that are mixed."""
    coefficients: int = 0
    """Number of learned coefficients that mix the templates (for "mask": elements of its windows)."""
    template_shape: tuple[int, int] = (0, 0)
    """Rows and columns of a template before it is resized, for "inter"."""
    chunk: int = 0
    """Number of consecutive elements that share a pseudo-random sign, for "offset" and "hash"."""
    row_gains: bool = False
    column_gains: bool = False
    rank: int = 0
    """Rank of the weight's own difference U·V."""
    zero_row: int | None = None
    aliases: tuple[str, ...] = ()
    """The other names of a tied weight."""

    @property
    def numel(self) -> int:
        """Number of elements of the weight."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Number of rows of the weight as a matrix."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Number of columns of the weight as a matrix."""
        return self.numel // self.shape[0]

    @property
    def gains(self) -> int:
        """Number of learned gains: one per row and one per column, if the slot has them."""
        return self.rows * self.row_gains + self.columns * self.column_gains

    @property
    def differences(self) -> int:
        """Number of elements of U [rows, rank] and V [rank, columns]."""
        return self.rank * (self.rows + self.columns)

    @property
    def extras(self) -> int:
        """Number of parameters that belong to this weight alone."""
        return self.coefficients + self.gains + self.differences


@dataclass(frozen=True)
class Group:
    """The weights that share one bank of `size` elements."""

    name: str
    size: int
    slots: tuple[Slot, ...]

    @property
    def projections(self) -> tuple[int, ...]:
        """The values of K for which the group holds a projection from layer embeddings ("emb"), ascending."""
        return tuple(sorted({s.templates for s in self.slots if s.morph in _MORPHS_WITH_EMBEDDING}))

    @property
    def projection_parameters(self) -> int:
        """Number of elements of all projections."""
        widths = {s.coefficients for s in self.slots if s.morph in _MORPHS_WITH_EMBEDDING}
        return sum(self.projections) * (widths.pop() if widths else 0)

    @property
    def parameters(self) -> int:
        """Number of trainable parameters: the bank, shared projections, and each weight's own."""
        return self.size + self.projection_parameters + sum(slot.extras for slot in self.slots)

    @property
    def numel(self) -> int:
        """Number of elements of all weights."""
        return sum(slot.numel for slot in self.slots)
