"""A user's budget → a number of trainable numbers.

A float is a fraction of the weights (0.1; above 1 gives more parameters than the model has), an int a count. As text:
"10%", "0.1", "5_000_000", "5M", "2.5k" (counts), "5MB", "5MiB" (size of the bank in fp32), "5MB/step" (what every worker
hands to the gradient all-reduce in one step, own parameters included).
"""

from __future__ import annotations

import math
import re

from .errors import BudgetError
from .specs import Specs

Budget = float | int | str

_BYTES_PER_NUMBER = 4  # banks and their gradients are kept in fp32
_COUNTS = {"k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}
_BYTES = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_FORMS = 'a fraction (0.1), a percentage ("10%"), a count (5_000_000, "5M") or bytes ("5MB", "5MB/step")'
_TEXT = re.compile(r"\s*([-+]?[\d_]*\.?\d+(?:[eE][-+]?\d+)?)\s*(%|[A-Za-z]*)\s*(/\s*step)?\s*")


def resolve_budget(budget: Budget, specs: Specs) -> int:
    """The number of trainable numbers that `budget` allows for all the weights of `specs`.

    Raises:
        BudgetError: the text cannot be read, or the budget is not a positive finite number.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise BudgetError(f"budget {budget!r} is a {type(budget).__name__}: give {_FORMS}")
    if isinstance(budget, str):
        return _from_text(budget, specs)
    if isinstance(budget, int):
        return _checked(budget, budget)
    return _checked(budget, budget * specs.numel)


def _from_text(text: str, specs: Specs) -> int:
    match = _TEXT.fullmatch(text)
    if match is None:
        raise BudgetError(f"budget {text!r} cannot be read: give {_FORMS}")
    number, unit, per_step = float(match[1].replace("_", "")), match[2], match[3]
    if unit == "%" and not per_step:
        return _checked(text, number / 100 * specs.numel)
    if not unit and not per_step:
        is_fraction = "." in match[1] or "e" in match[1].lower()
        return _checked(text, number * specs.numel if is_fraction else number)
    if unit in _BYTES and (unit != "B" or per_step):
        numbers = number * _BYTES[unit] / _BYTES_PER_NUMBER
        own = specs.own_parameters if per_step else 0
        if 0 < numbers <= own:
            raise BudgetError(
                f"budget {text!r} allows {numbers:.0f} numbers per step, but the parameters that are not shared alone send "
                f"{own}: give more than {own * _BYTES_PER_NUMBER} B/step"
            )
        return _checked(text, numbers - own)
    if unit in _COUNTS and not per_step:
        return _checked(text, number * _COUNTS[unit])
    raise BudgetError(f"budget {text!r} has the unknown unit {unit + (per_step or '')!r}: give {_FORMS}")


def _checked(budget: Budget, numbers: float) -> int:
    if not math.isfinite(numbers) or numbers <= 0:
        raise BudgetError(f"budget {budget!r} is not a positive finite number: give {_FORMS}")
    return math.floor(numbers * (1 + 1e-12))  # 0.1 * 30 is 2.9999999999999996 in some orders of multiplication
