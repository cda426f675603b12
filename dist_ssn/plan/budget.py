"""Budgets: from a user's text or number to a number of trainable parameters.

A float is a fraction of the weights (0.1; above 1 gives more parameters than the model has), an int a count. As text: "10%",
"0.1" (with a point or an exponent: a fraction), "5_000_000", "2.5k", "5M", "1G" or "1B" (counts), "5MB", "5MiB" (size of the
parameters that replace the weights, in fp32), "5MB/step" (input of every worker to the gradient all-reduce in one step, own
parameters included).
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from dist_ssn.errors import BudgetError
from dist_ssn.model.specs import Specs

Budget = float | int | str

_FP32_BYTES = 4  # banks and their gradients are kept in fp32
_COUNTS = {"k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
_BYTES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_HIGHEST_FRACTION = 100
"""A float above this is a count that was written as a float, such as 5e6."""
_HIGHEST_COUNT = 2**53
_FORMS = 'a fraction (0.1), a percentage ("10%"), a count (5_000_000, "5M") or bytes ("5MB", "5MB/step")'
_TEXT = re.compile(r"\s*([-+]?(?:[0-9][0-9_]*)?\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*(%|[A-Za-z]*)\s*(/\s*step)?\s*")


def resolve_budget(budget: Budget, specs: Specs) -> int:
    """Number of trainable parameters that `budget` allows for all weights of `specs`.

    Args:
        budget: in one of the forms above.
        specs: gives the sizes that a fraction refers to.

    Raises:
        BudgetError: the text cannot be read, or the budget is not positive or too large.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise BudgetError(f"budget {budget!r:.60} is of type {type(budget).__name__}: give {_FORMS}")
    if (reason := unreadable(budget)) is not None:
        raise BudgetError(f"budget {budget!r:.60} {reason}")
    if isinstance(budget, str):
        return _from_text(budget, specs)
    if isinstance(budget, int):
        return _checked(budget, budget)
    return _of_weights(budget, _exact(budget), specs)


def unreadable(budget: Budget) -> str | None:
    """The reason why a budget's form cannot be read, whatever the model; None if it can.

    Args:
        budget: see `resolve_budget`.
    """
    if isinstance(budget, str) and _TEXT.fullmatch(budget) is None:
        return f"cannot be read: give {_FORMS}"
    return None


def _from_text(text: str, specs: Specs) -> int:
    match = _TEXT.fullmatch(text)
    assert match is not None  # `unreadable` has looked
    digits, unit, per_step = match[1].replace("_", ""), match[2], match[3]
    number = _exact(text, digits)
    if unit == "%" and not per_step:
        return _of_weights(text, number / 100, specs)
    if not unit and not per_step:
        is_count = digits.lstrip("+-").isdigit()
        return _checked(text, number) if is_count else _of_weights(text, number, specs)
    if unit in _BYTES and (unit != "B" or per_step):
        parameters = number * _BYTES[unit] / _FP32_BYTES
        own = specs.own_parameters if per_step else 0
        if 0 < parameters <= own:
            raise BudgetError(
                f"budget {text!r:.60} allows {math.floor(parameters):,} parameters per step, but the model has {own:,} that are "
                f"not shared: give more than {own * _FP32_BYTES}B/step"
            )
        return _checked(text, parameters - own)
    if unit in _COUNTS and not per_step:
        return _checked(text, number * _COUNTS[unit])
    raise BudgetError(f"budget {text!r:.60} has the unknown unit {unit + (per_step or '')!r:.20}: give {_FORMS}")


def _exact(budget: float | str, digits: str | None = None) -> Fraction:
    """The number as it was written in decimal, so that 0.1 · 30 is 3; floats miss it in the last bit."""
    number = float(budget if digits is None else digits)
    if not math.isfinite(number):
        raise BudgetError(f"budget {budget!r:.60} is not a positive finite number: give {_FORMS}")
    return Fraction(repr(number))


def _of_weights(budget: Budget, fraction: Fraction, specs: Specs) -> int:
    if fraction > _HIGHEST_FRACTION:
        raise BudgetError(
            f"budget {budget!r:.60} is read as a fraction, and is more than {_HIGHEST_FRACTION} times the weights: "
            "for a count give an integer (5_000_000) or a unit (5M)"
        )
    return _checked(budget, fraction * specs.numel)


def _checked(budget: Budget, parameters: int | Fraction) -> int:
    if parameters > _HIGHEST_COUNT:  # without showing it: Python refuses to print an integer of thousands of digits
        raise BudgetError(
            f"the budget is above {_HIGHEST_COUNT:,} parameters, more than any machine holds: give {_FORMS}"
        )
    if parameters <= 0:
        shown = f"{budget!r:.60}" if not isinstance(budget, int) or -budget <= _HIGHEST_COUNT else "below zero"
        raise BudgetError(f"budget {shown} is not a positive finite number: give {_FORMS}")
    return math.floor(parameters)
