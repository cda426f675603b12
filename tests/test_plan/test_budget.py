"""Budgets: each form that the docstring names, and a clear sentence for everything else."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ssn.errors import BudgetError
from dist_ssn.model.specs import LayerSpec, Specs
from dist_ssn.plan.budget import resolve_budget

SPECS = Specs((LayerSpec("a", (100, 200), "Linear", 200, 0.1), LayerSpec("b", (10, 1000), "Linear", 1000, 0.1)), 1000)


@pytest.mark.parametrize(
    ("budget", "numbers"),
    [
        (0.1, 3_000),
        (1.0, 30_000),
        (2.5, 75_000),
        (1, 1),
        (5_000, 5_000),
        (2**53, 2**53),
        ("0.1", 3_000),
        (".1", 3_000),
        ("1.0", 30_000),
        ("1e-3", 30),
        ("10%", 3_000),
        (" 12.5 % ", 3_750),
        ("250%", 75_000),
        ("1", 1),
        ("+70", 70),
        ("5_000", 5_000),
        ("2.5k", 2_500),
        ("5M", 5_000_000),
        ("1G", 10**9),
        ("0.5B", 5 * 10**8),
        ("5kB", 1_250),
        ("5KB", 1_250),
        ("5MB", 1_250_000),
        ("5KiB", 1_280),
        ("5MiB", 5 * 2**18),
        ("1GB", 250_000_000),
        ("1GiB", 2**28),
        ("20kB/step", 4_000),
        ("20 kB / step", 4_000),
        ("4004B/step", 1),
    ],
)
def test_every_form(budget: Any, numbers: int) -> None:
    assert resolve_budget(budget, SPECS) == numbers


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("10 apples", "'10 apples' has the unknown unit 'apples'"),
        ("5mb", "unknown unit 'mb'"),
        ("5/step", "unknown unit '/step'"),
        ("5%/step", "unknown unit '%/step'"),
        ("5M/step", "unknown unit 'M/step'"),
        *[
            (text, "cannot be read")
            for text in ("", " ", "%", "MB", "apples", "nan", "inf", "1.", "0x10", "1,000", "10%%")
        ],
        *[(text, "cannot be read") for text in ("5MB/s", "1 000", "_1", "--1", "1..2", "٥", "x" * 10_000)],
        *[(number, "is not a positive finite number") for number in (0, -1, 0.0, -0.5, math.nan, math.inf, -math.inf)],
        *[
            (text, "is not a positive finite number")
            for text in ("0", "-1", "-1.5", "0%", "-5%", "-5MB", "0B/step", "1e999")
        ],
        *[(number, "more than any machine holds") for number in (2**53 + 1, 10**5000, "9" * 300, "1e300M")],
        (-(10**5000), "not a positive finite number"),
        ("1" * 5000, "not a positive finite number"),
        ("1e6", "'1e6' is read as a fraction, and is more than 100 times the weights: for a count give an integer"),
        (5e6, "5000000.0 is read as a fraction"),
        *[(thing, f"is of type {kind}: give") for thing, kind in ((True, "bool"), (None, "NoneType"), ([], "list"))],
        *[(thing, f"is of type {kind}: give") for thing, kind in (({}, "dict"), ((0.1,), "tuple"), (b"5M", "bytes"))],
        (
            "4kB/step",
            "allows 1,000 parameters per step, but the model has 1,000 that are not shared: .* 4000B/step",
        ),
    ],
    ids=lambda value: repr(value)[:20] if not isinstance(value, int) or abs(value) < 10**100 else "huge",
)
def test_what_is_no_budget(budget: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message) as caught:
        resolve_budget(budget, SPECS)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    assert str(caught.value).startswith(("budget ", "the budget "))


@given(st.integers(1, 10**9), st.integers(1, 999))
def test_fractions_are_exact(numel: int, permille: int) -> None:
    """Neither a number too few nor one too many, whatever floats make of permille / 1000 · numel."""
    specs = Specs((LayerSpec("a", (1, numel), "Linear", numel, 0.1),))
    exact = permille * numel // 1000
    assert resolve_budget(permille / 1000, specs) == exact
    assert resolve_budget(str(permille / 1000), specs) == exact
    assert resolve_budget(f"{permille / 10}%", specs) == exact


@given(st.text(st.sampled_from("0123456789._eE+-%kMGBi/step "), max_size=12))
def test_any_text_is_a_count_or_an_error(text: str) -> None:
    try:
        numbers = resolve_budget(text, SPECS)
    except BudgetError as error:
        assert repr(text)[:30] in str(error) or "any machine" in str(error)
    else:
        assert isinstance(numbers, int) and 0 <= numbers <= 2**53
