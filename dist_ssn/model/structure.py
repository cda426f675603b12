"""Structure of a weight's initial values: what was not drawn at random, and so would be lost if a bank generated the weight.

Exact patterns (zeros, repeats, symmetry) are recognized in small weights, too. Statistical ones (mean, smoothness, correlation) are
recognized only where independent values show them with a probability below 2e-8, so a plan does not depend on the seed.
A large weight is judged by three stretches of its rows.

Not structure: what `orthogonal_` draws, because it is random, and whole networks start so.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_ROWS, _COLUMNS = 64, 1024
"""A weight of more than three times `_ROWS` rows is judged by its first, middle and last; of each row by the first `_COLUMNS`."""
_SIGMAS = 8
"""Standard errors by which a statistic must differ from that of independent values."""
_FAR = 1000
"""Ratio to the median from which on a value is no draw of a usual initializer."""
_UNEVEN = 0.02
"""Least relative variance of the rows' mean squares, beyond that of independent values, of rows that differ in scale."""


def structure_of(values: Tensor, zero_row: int | None = None) -> str | None:
    """The structure of a weight's initial values, as a reason to leave the weight out; None if they can be random.

    Args:
        values: [rows, …], finite or not.
        zero_row: a row that is not judged (an embedding's `padding_idx`).
    """
    values = values.detach()
    if zero_row is not None:
        before, after = values[:zero_row], values[zero_row + 1 :]
        values = torch.cat([before, after]) if len(before) and len(after) else before if len(before) else after
    if not values.numel() or values.is_meta:
        return None
    sample = _sample(values.flatten(1))
    if not bool(sample.isfinite().all()):
        return None
    patterns = (reason for reason, holds in _PATTERNS.items() if holds(sample))
    return _zeros(values) or next(patterns, None) or _constant_line(values)


def scales_differ(values: Tensor, zero_row: int | None = None) -> bool:
    """True if rows, or columns, differ in scale by more than the values of one initializer do: they were loaded or trained.

    Args:
        values: see `structure_of`.
        zero_row: see `structure_of`.
    """
    if values.is_meta:
        return False
    values = values.detach()
    if zero_row is not None:
        values = torch.cat([values[:zero_row], values[zero_row + 1 :]])
    sample = _sample(values.flatten(1))
    return bool(sample.isfinite().all()) and (_has_uneven_rows(sample) or _has_uneven_rows(sample.T))


def _has_uneven_rows(sample: Tensor) -> bool:
    """True if the rows' mean squares vary by more than those of independent values with the sample's own fourth moment."""
    rows, columns = sample.shape
    if rows < 16 or columns < 8:
        return False
    squares = sample.square()
    mean = float(squares.mean())
    if not mean:
        return False
    expected = (float(squares.square().mean()) / mean**2 - 1) / columns
    found = float(squares.mean(1).var()) / mean**2
    return found - expected > max(_UNEVEN, _SIGMAS * expected * math.sqrt(2 / rows))


def _sample(matrix: Tensor) -> Tensor:
    """Some of the matrix in float64, on the CPU: [at most 3 · _ROWS, at most _COLUMNS]."""
    rows = matrix.shape[0]
    if rows > 3 * _ROWS:
        middle = (rows - _ROWS) // 2
        matrix = torch.cat(
            [matrix[:_ROWS, :_COLUMNS], matrix[middle : middle + _ROWS, :_COLUMNS], matrix[-_ROWS:, :_COLUMNS]]
        )
    return matrix[:, :_COLUMNS].to("cpu", torch.float64)


def _zeros(values: Tensor) -> str | None:
    """The reason for a weight of which a quarter or more is exactly zero, which random values are not."""
    nonzero = int(values.count_nonzero())
    if values.numel() < 4 or values.numel() - nonzero < values.numel() / 4:
        return None
    if values.ndim == 2:
        if nonzero == min(values.shape) == int(values.diagonal().count_nonzero()):
            return "starts as the identity"
    elif nonzero <= values.shape[0]:
        centre = values[(slice(None), slice(None), *(size // 2 for size in values.shape[2:]))]
        if int(centre.count_nonzero()) == nonzero:
            return "starts as a Dirac kernel"
    return "much of it starts at zero"


def _constant_line(values: Tensor) -> str | None:
    """The reason for a weight with a row or a column of one value, such as a padding row, or forbidden transitions."""
    matrix = values.flatten(1)
    few = 4 if values.dtype.itemsize >= 4 else 16  # values in 16 bits are equal by chance
    for lines, name in ((matrix, "row"), (matrix.T, "column")):
        if lines.shape[1] < few or len(lines) < 2:
            continue
        some = lines[(lines[:, 1:few] == lines[:, :1]).all(1)]
        if bool((some == some[:, :1]).all(1).any()):
            return f"a {name} has one value"
    return None


def _has_outliers(sample: Tensor) -> bool:
    """True if a few values are far larger than all others."""
    sizes = sample.abs()
    return sample.numel() >= 8 and float(sizes.max()) > _FAR * float(sizes.median()) > 0


def _has_few_values(sample: Tensor) -> bool:
    some = sample.flatten()[:4096]
    return len(some) >= 8 and len(some.unique()) <= min(16, len(some) / 3)


def _is_sorted(sample: Tensor) -> bool:
    """True if each row rises or falls all along; of independent values 2 orders of columns! do."""
    rows, columns = sample.shape
    steps = sample.diff(dim=1)
    monotone = ((steps >= 0).all(1) | (steps <= 0).all(1)).all()
    return bool(monotone) and rows * (math.lgamma(columns + 1) - math.log(2)) > 25


def _is_near_identity(sample: Tensor) -> bool:
    rows, columns = sample.shape
    if rows != columns or rows < 8:
        return False
    diagonal = sample.diagonal()
    others = float(sample.square().sum() - diagonal.square().sum()) / (rows * rows - rows)
    return (
        abs(float(diagonal.mean())) > 4 * math.sqrt(others) and rows * float(diagonal.mean()) ** 2 > _SIGMAS**2 * others
    )


def _is_symmetric(sample: Tensor) -> bool:
    rows, columns = sample.shape
    return rows == columns >= 4 and (torch.equal(sample, sample.T) or torch.equal(sample, -sample.T))


def _repeats_diagonals(sample: Tensor) -> bool:
    """True for a Toeplitz or a Hankel matrix."""
    if min(sample.shape) < 4:
        return False
    part = sample[:_ROWS]  # of a large weight, neighbours in the sample are neighbours only there
    return torch.equal(part[1:, 1:], part[:-1, :-1]) or torch.equal(part[1:, :-1], part[:-1, 1:])


def _repeats(sample: Tensor) -> bool:
    """True if half of the rows equal another one, up to the sign."""
    rows, columns = sample.shape
    if rows < 2 or columns < 4:  # a few values in bf16 are equal by chance
        return False
    keys = (sample * torch.arange(1, columns + 1, dtype=torch.float64).sqrt()).sum(1).abs().sort().values
    scale = float(sample.abs().sum(1).max()) * math.sqrt(columns)
    return int((keys.diff() <= 1e-13 * scale).sum()) >= rows / 2


def _has_mean(sample: Tensor) -> bool:
    count, mean, deviation = sample.numel(), abs(float(sample.mean())), float(sample.std(correction=0))
    if count >= 32 and bool(sample.sign().eq(sample[0, 0].sign()).all()):
        return True
    return count >= 64 and mean > deviation / 4 and mean * math.sqrt(count) > _SIGMAS * deviation


def _is_smooth(sample: Tensor) -> bool:
    """True if neighbours in a row resemble each other, in all rows alike or in each in its own way."""
    rows, columns = sample.shape
    energy = sample.square().sum(1)
    if columns < 8 or rows * columns < 64 or not bool(energy.all()):
        return False
    products = (sample[:, 1:] * sample[:, :-1]).sum(1)
    together = float(products.sum() / energy.sum())
    each = float((products / energy).square().mean())
    # Of independent values, rows · each · columns is chi-square with as many degrees of freedom as there are rows, whose tail above
    # rows + 2 √(18 rows) + 36 has a probability below exp(-18). Source: Laurent & Massart 2000, lemma 1.
    return (abs(together) > 0.3 and abs(together) * math.sqrt(sample.numel()) > _SIGMAS) or (
        each > 0.25 and rows * each * columns > rows + 2 * math.sqrt(18 * rows) + 36
    )


def _is_correlated(sample: Tensor) -> bool:
    """True if the rows lie in few directions."""
    rows, columns = sample.shape
    norms = sample.norm(dim=1)
    if rows < 8 or columns < 16 or not bool(norms.all()):
        return False
    directions = (sample / norms.unsqueeze(1))[:: max(1, rows // _ROWS)]
    cosines = directions @ directions.T
    count = len(directions)
    return float(cosines.square().sum() - count) / (count * count - count) > 0.3


_PATTERNS: dict[str, Callable[[Tensor], bool]] = {
    "starts near the identity": _is_near_identity,
    "starts symmetric": _is_symmetric,
    "its rows repeat": _repeats,
    "its columns repeat": lambda sample: _repeats(sample.T),
    "its diagonals repeat": _repeats_diagonals,
    "has few different values": _has_few_values,
    "a few values are far larger than the others": _has_outliers,
    "its initial values are sorted": lambda sample: _is_sorted(sample) or _is_sorted(sample.T),
    "its initial mean is not zero": _has_mean,
    "its initial values are smooth": lambda sample: _is_smooth(sample) or _is_smooth(sample.T),
    "its initial rows are correlated": lambda sample: _is_correlated(sample) or _is_correlated(sample.T),
}
"""Reason → whether a sample shows that pattern; the first that holds is given."""
