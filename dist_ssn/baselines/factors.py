"""Baselines of matrices, whole or as a product U·V of low rank, each for one weight or several.

"lowrank" gives each weight a matrix of its own. "tied" gives one matrix to all weights of a kind.

Letters: R rows, C columns, r rank.

Source: Lan et al. 2020, "ALBERT", arXiv 1909.11942, section 3.1 (cross-layer sharing, and factorized embeddings); Sainath et al.
2013, "Low-rank matrix factorization for deep neural network training" (ICASSP).
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dist_ssn.baselines.generator import Generator, draw_for, normal
from dist_ssn.errors import BudgetError
from dist_ssn.model.specs import LayerSpec, Specs
from dist_ssn.plan.mapping import group_std


@dataclass(frozen=True)
class Matrix:
    """A stored matrix: R × C elements, or r · (R + C) of them.

    Args:
        rows: R.
        columns: C.
        rank: r; None: stored whole.
        members: indices of the weights that read it.
    """

    rows: int
    columns: int
    rank: int | None
    members: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of stored elements."""
        return _numel(self.rows, self.columns, self.rank)


def _numel(rows: int, columns: int, rank: int | None) -> int:
    return rows * columns if rank is None else rank * (rows + columns)


def lowrank(specs: Specs, budget: int, seed: int) -> Generator:
    """A matrix of low rank for each weight, with ranks in proportion to sizes; weights that would not shrink stay whole.

    Raises:
        BudgetError: even rank 1 needs more than `budget` parameters.
    """
    shapes = [(weight.rows, weight.columns) for weight in specs.weights]
    ranks = fit_ranks(shapes, budget, "lowrank")
    matrices = [Matrix(*shape, rank, (i,)) for i, (shape, rank) in enumerate(zip(shapes, ranks, strict=True))]
    return Matrices("lowrank", specs.weights, matrices, seed)


def tied(specs: Specs, budget: int, seed: int) -> Generator:
    """One matrix for all layers of one kind at several depths, as in ALBERT.

    Weights are of one kind if their names differ only in digits and their shapes are equal. The rest of the budget gives further
    matrices to the kinds with the most weights, each for consecutive layers (ALBERT's "groups"). If one matrix per kind exceeds the
    budget, all of them are factorized, as ALBERT does with its embedding.

    Raises:
        BudgetError: even rank 1 needs more than `budget` parameters.
    """
    kinds: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for i, weight in enumerate(specs.weights):
        kinds.setdefault((re.sub(r"\d+", "#", weight.name), weight.kind, weight.shape), []).append(i)
    members = list(kinds.values())
    shapes = [(specs.weights[kind[0]].rows, specs.weights[kind[0]].columns) for kind in members]
    least = sum(rows * columns for rows, columns in shapes)
    matrices: list[Matrix] = []
    if least > budget:
        ranks = fit_ranks(shapes, budget, "tied")
        matrices = [Matrix(*s, rank, tuple(kind)) for s, rank, kind in zip(shapes, ranks, members, strict=True)]
    else:
        for kind, shape, copies in zip(members, shapes, _copies(members, shapes, budget - least), strict=True):
            runs = [kind[len(kind) * i // copies : len(kind) * (i + 1) // copies] for i in range(copies)]
            matrices += [Matrix(*shape, None, tuple(run)) for run in runs]
    return Matrices("tied", specs.weights, matrices, seed)


def _copies(members: Sequence[Sequence[int]], shapes: Sequence[tuple[int, int]], rest: int) -> list[int]:
    """Number of matrices of each kind, where `rest` parameters remain beyond one matrix for each kind."""
    copies = [1] * len(members)
    while True:
        fit = [i for i, (rows, columns) in enumerate(shapes) if copies[i] < len(members[i]) and rows * columns <= rest]
        if not fit:
            return copies
        most = max(fit, key=lambda i: (len(members[i]) / copies[i], shapes[i][0] * shapes[i][1]))
        copies[most] += 1
        rest -= shapes[most][0] * shapes[most][1]


def fit_ranks(shapes: Sequence[tuple[int, int]], budget: int, control: str) -> list[int | None]:
    """Ranks of matrices with which each keeps about the same fraction of its size.

    Args:
        shapes: (R, C) of each matrix.
        budget: number of parameters.
        control: name of the baseline, for the message.

    Returns:
        A rank for each matrix; None for a whole one.

    Raises:
        BudgetError: rank 1 for all exceeds the budget; the message has the smallest possible one.
    """
    ranks: list[int | None] = [_next(0, *shape) for shape in shapes]
    costs = [_numel(*shape, rank) for shape, rank in zip(shapes, ranks, strict=True)]
    rest = budget - sum(costs)
    if rest < 0:
        raise BudgetError(
            f"the control {control!r} needs more than {budget:,} parameters: with rank 1 for every weight it has {sum(costs):,}"
        )
    poorest = [(cost / math.prod(shape), i) for i, (cost, shape) in enumerate(zip(costs, shapes, strict=True))]
    heapq.heapify(poorest)
    while poorest:
        _, i = heapq.heappop(poorest)
        rank = ranks[i]
        if rank is None:
            continue
        more = _next(rank, *shapes[i])
        cost = _numel(*shapes[i], more)
        if cost - costs[i] <= rest:
            rest -= cost - costs[i]
            ranks[i], costs[i] = more, cost
            heapq.heappush(poorest, (cost / math.prod(shapes[i]), i))
    return ranks


def _next(rank: int, rows: int, columns: int) -> int | None:
    """The next rank after `rank`; None if the whole matrix has no more elements than the factors of that rank."""
    return rank + 1 if (rank + 1) * (rows + columns) < rows * columns else None


class Matrices(Generator):
    """Weights from `matrices`, each weight with its own initial standard deviation."""

    def __init__(self, control: str, weights: Sequence[LayerSpec], matrices: Sequence[Matrix], seed: int):
        super().__init__(control, weights, seed)
        self.matrices = tuple(matrices)
        self._of = {index: place for place, matrix in enumerate(self.matrices) for index in matrix.members}
        self._scales: dict[int, float] = {}
        for place, matrix in enumerate(self.matrices):
            mine = [weights[i] for i in matrix.members]
            std = group_std(mine)
            self._scales |= {i: weights[i].init_std / std for i in matrix.members}
            draw = draw_for(seed, mine[0].name)
            if matrix.rank is None:
                self._store(f"whole{place}", normal(draw, (matrix.rows, matrix.columns), std))
            else:
                left, right = balanced(draw, matrix.rows, matrix.columns, matrix.rank, std)
                self._store(f"left{place}", left)
                self._store(f"right{place}", right)

    def _store(self, name: str, values: np.ndarray) -> None:
        self.register_parameter(name, nn.Parameter(torch.from_numpy(values).to(torch.get_default_dtype())))

    def make(self, index: int, parameters: Mapping[str, Tensor | None]) -> Tensor:
        """The weight [R, C]: its matrix, or the product of its factors, times its scale."""
        place = self._of[index]
        left, right = parameters.get(f"left{place}"), parameters.get(f"right{place}")
        if left is not None and right is not None:
            return (left @ right) * self._scales[index]
        whole = parameters[f"whole{place}"]
        assert whole is not None
        return whole * self._scales[index]


def balanced(
    draw: np.random.RandomState, rows: int, columns: int, rank: int, std: float
) -> tuple[np.ndarray, np.ndarray]:
    """Factors U [R, r] and V [r, C] of equal root mean square, whose product has exactly the root mean square `std`.

    Unbalanced factors would need different learning rates.

    Source: Khodak et al. 2021, arXiv 2105.01029, section 3.
    """
    left, right = draw.standard_normal((rows, rank)), draw.standard_normal((rank, columns))
    square = np.sum((left.T @ left) * (right @ right.T)) / (rows * columns)  # mean square of U·V, without computing U·V
    factor = math.sqrt(std / math.sqrt(square))
    return left * factor, right * factor
