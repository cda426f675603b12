"""The pieces that a bank's gradient travels in, for every plan: each number sent, and none before its last reader."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ssn.errors import PlanError
from dist_ssn.plan import Group, Plan
from dist_ssn.plan.overlap import Overlap, parse_overlap, pieces_of
from dist_ssn.sharing.morphs import readings
from tests.test_plan.test_plan_properties import MAPPING_TEXTS, MORPH_TEXTS, plan_or_least, some_specs


def readers(group: Group, seed: int) -> np.ndarray:
    """[slots, B]: which numbers each slot reads, asked of the readings themselves."""
    found = np.zeros((len(group.slots), group.size), dtype=bool)
    for index, slot in enumerate(group.slots):
        for reading in readings(slot, seed, group.size):
            found[index][reading.take(torch.arange(group.size)).numpy()] = True
    return found


@settings(max_examples=60, deadline=None)
@given(
    some_specs(most=12, numbers=2_000),
    st.sampled_from(MORPH_TEXTS),
    st.sampled_from(MAPPING_TEXTS),
    st.integers(2, 7),
    st.data(),
)
def test_pieces(specs: Any, morph: str, mapping: str, count: int, data: st.DataObject) -> None:
    plan = plan_or_least(specs, data.draw(st.sampled_from([0.1, 0.5, 1.0, 2.0])), mapping=mapping, morph=morph)
    if not isinstance(plan, Plan):
        return
    for group in plan.groups:
        read = readers(group, plan.seed)
        segments = pieces_of(group, Overlap("segments", count))
        times = np.zeros(group.size, dtype=int)
        for piece in segments:
            times[piece.start : piece.end] += 1
            assert {*np.flatnonzero(read[:, piece.start : piece.end].any(axis=1))} <= piece.slots
        assert (times == 1).all()
        firsts = [min(piece.slots, default=len(group.slots)) for piece in segments]
        assert firsts == sorted(firsts, reverse=True)  # backward comes to the last readers first
        sums = pieces_of(group, Overlap("sums", count))
        assert 1 <= len(sums) <= count and all((piece.start, piece.end) == (0, group.size) for piece in sums)
        assert all(before.slots < after.slots for before, after in itertools.pairwise(sums))
        assert sums[-1].slots == pieces_of(group, Overlap())[0].slots == set(range(len(group.slots)))


def test_overlap_as_text() -> None:
    assert parse_overlap("none") == Overlap()
    assert parse_overlap("segments:7") == Overlap("segments", 7)
    assert parse_overlap("sums") == Overlap("sums", 2)
    assert parse_overlap("delay:0.5") == Overlap("delay", correction=0.5)
    assert parse_overlap("delay").correction > 0 == parse_overlap("delay:0").correction


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("segment:4", "did you mean 'segments'"),
        ("segments:1", "from 2 to 1000"),
        ("segments:x", "from 2 to 1000"),
        ("sums:-3", "from 2 to 1000"),
        ("delay:-1", "0 or more"),
        ("delay:nan", "0 or more"),
        ("none:2", "write none"),
    ],
)
def test_a_wrong_overlap_says_what_would_be_right(text: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        parse_overlap(text)
