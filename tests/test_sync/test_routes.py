"""Routes: pieces, bytes, and the choice by bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ssn.errors import UserError
from dist_ssn.sync.codecs import CODECS, SLICE
from dist_ssn.sync.routes import (
    LEAST,
    ROUND_BYTES,
    choose_route,
    cuts,
    handed_bytes,
    lanes_of,
    piece_bytes,
    sent_bytes,
)


@given(name=st.sampled_from(list(CODECS)), size=st.integers(0, 50_000), ranks=st.integers(1, 9))
def test_pieces_are_whole_slices_and_lose_no_byte(name: str, size: int, ranks: int) -> None:
    codec = CODECS[name]
    ends = cuts(size, ranks)
    assert len(ends) == ranks + 1 and ends[0] == 0 and ends[-1] == size and ends == sorted(ends)
    assert all(end % SLICE == 0 for end in ends[:-1] if end < size)
    lengths = [b - a for a, b in pairwise(ends)]
    assert max(lengths) - min(lengths) <= SLICE
    assert sum(sum(sizes) for sizes in piece_bytes([(codec, size)], ranks)) == codec.packed_bytes(size)


def test_bytes_by_hand() -> None:
    lanes = lanes_of(CODECS["int8"], 5 * 4096 + 10, 10)  # 5 slices of 4,098 bytes, and one of 12
    assert handed_bytes("all-gather", lanes, 4) == {"all_gather": 5 * 4098 + 12}
    # Of four ranks one owns two slices and the short one.
    assert piece_bytes(lanes, 4) == [[4098, 0], [4098, 0], [4098, 0], [2 * 4098, 12]]
    assert handed_bytes("two-phase", lanes, 4) == {"all_to_all": 5 * 4098 + 12, "all_gather": 2 * 4098 + 12}
    assert sent_bytes("all-gather", lanes, 4) == 3 * (5 * 4098 + 12)
    assert sent_bytes("two-phase", lanes, 4) == 0.75 * (5 * 4098 + 12) + 3 * (2 * 4098 + 12)
    assert handed_bytes("two-phase", lanes, 1) == {}


def test_small_parameters_have_slices_of_their_own_of_at_least_four_bits() -> None:
    found = {name: lanes_of(codec, 5000, 1000) for name, codec in CODECS.items()}
    assert {name: codec.name for name, (_, (codec, values)) in found.items() if values} == {
        "int8": "int8",
        "int4": "int4",
        "bins2": "int4",
        "sparse": "int4",
    }
    assert all(first + second == 5000 and second in (0, 1000) for (_, first), (_, second) in found.values())


@pytest.mark.parametrize("ranks", [3, 4, 8, 64])
def test_two_phases_send_twice_the_packed_size_whatever_the_ranks(ranks: int) -> None:
    lanes = [(CODECS["int4"], 64 * 4096 * 10), (LEAST, 0)]
    packed = CODECS["int4"].packed_bytes(lanes[0][1])
    assert sent_bytes("two-phase", lanes, ranks) == pytest.approx(2 * (ranks - 1) / ranks * packed, rel=0.07)


@pytest.mark.parametrize(
    ("name", "size", "ranks", "route"),
    [
        ("none", 10**7, 8, "all-reduce"),
        ("int8", 10**7, 2, "all-gather"),
        ("int8", 10**7, 3, "two-phase"),
        ("int8", 10**4, 4, "all-gather"),
        ("sparse", 10**7, 64, "all-gather"),
        ("bins2", 10**6, 4, "two-phase"),
    ],
)
def test_the_choice(name: str, size: int, ranks: int, route: str) -> None:
    lanes = lanes_of(CODECS[name], size + 100, 100)
    assert choose_route("auto", lanes, ranks) == route
    if route == "two-phase":
        assert sent_bytes("all-gather", lanes, ranks) - sent_bytes("two-phase", lanes, ranks) > ROUND_BYTES
    assert choose_route("two-phase", lanes, ranks) == "two-phase"


def test_impossible_routes() -> None:
    lanes = [(CODECS["int8"], 100)]
    with pytest.raises(UserError, match=r"unknown route 'ring': known are all-gather, all-reduce, auto, two-phase"):
        choose_route("ring", lanes, 2)
    with pytest.raises(UserError, match="route 'all-reduce' goes with codec 'none' only"):
        choose_route("all-reduce", lanes, 2)
