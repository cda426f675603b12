"""The search for a learning rate of the transfer."""

from __future__ import annotations

import pytest

from benchmarks.transfer.run import MOST, search


@pytest.mark.parametrize("least", [-3, -1, 0, 1, 2, 9])
def test_the_search_goes_down_and_stops(least: int) -> None:
    tried: list[int] = []

    def loss_at(exponent: int) -> float:
        tried.append(exponent)
        return (exponent - least) ** 2

    assert search(loss_at) == min(least, MOST - 1)
    assert len(tried) == len(set(tried)) <= MOST
