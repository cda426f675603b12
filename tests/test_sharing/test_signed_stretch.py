"""Runs and copies of a bank compute the same as an index of every element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_ssn.sharing import signed_stretch
from dist_ssn.sharing.signed_stretch import SignedStretch


@pytest.mark.parametrize("long_run", [0, 2**30], ids=["runs", "copy"])
@given(bank=st.integers(1, 90), chunk=st.integers(1, 20), numel=st.integers(1, 700), data=st.data())
def test_both_ways_are_those_of_single_elements(
    long_run: int, bank: int, chunk: int, numel: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, bank - 1))
    values, factor = torch.randn(bank, 1, dtype=torch.float64), torch.randn(-(-numel // chunk), 1, dtype=torch.float64)
    index = (start + torch.arange(numel)) % bank
    per_element = factor.view(-1)[torch.arange(numel) // chunk]
    expected = values.view(-1)[index] * per_element
    stretch, out = SignedStretch(start, numel, chunk, bank), torch.randn(numel, 1, dtype=torch.float64)
    before, gradient, total = (
        out.clone().view(-1),
        torch.randn(numel, dtype=torch.float64),
        torch.ones(bank, 1).double(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signed_stretch, "_LONG_RUN", {"cpu": long_run})
        stretch.add(values, factor, out)
        torch.testing.assert_close(out.view(-1), before + expected)
        stretch.multiply(values, factor, out)
        assert torch.equal(out.view(-1), expected)
        stretch.give(gradient.clone(), factor, total)
    torch.testing.assert_close(total.view(-1), torch.ones(bank).double().index_add(0, index, gradient * per_element))


@given(bank=st.integers(1, 300), chunk=st.integers(1, 64), numel=st.integers(1, 2000), data=st.data())
def test_both_ways_make_the_same_weight_bit_by_bit(bank: int, chunk: int, numel: int, data: st.DataObject) -> None:
    """A plan's weights do not change where another way becomes the faster one."""
    start = data.draw(st.integers(0, bank - 1))
    values, factor, before = torch.randn(bank, 1), torch.randn(-(-numel // chunk), 1), torch.randn(numel, 1)
    made = []
    for long_run in (0, 2**30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(signed_stretch, "_LONG_RUN", {"cpu": long_run})
            out = before.clone()
            SignedStretch(start, numel, chunk, bank).add(values, factor, out)
            made.append(out)
    assert torch.equal(*made)
