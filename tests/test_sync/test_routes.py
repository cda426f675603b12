"""Routes: pieces, bytes, and the choice by bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ssn.errors import UserError
from dist_ssn.sync.codecs import CODECS, SLICE
from dist_ssn.sync.routes import PLAIN, ROUND_BYTES, choose_route, cuts, handed_bytes, piece_bytes, sent_bytes


@given(name=st.sampled_from(list(CODECS)), size=st.integers(0, 50_000), ranks=st.integers(1, 9))
def test_pieces_are_whole_slices_and_lose_no_byte(name: str, size: int, ranks: int) -> None:
    codec = CODECS[name]
    ends = cuts(codec, size, ranks)
    assert len(ends) == ranks + 1 and ends[0] == 0 and ends[-1] == size and ends == sorted(ends)
    unit = 1 if codec is PLAIN else SLICE
    assert all(end % unit == 0 for end in ends[:-1] if end < size)
    lengths = [b - a for a, b in pairwise(ends)]
    assert max(lengths) - min(lengths) <= unit or size < ranks * unit
    assert sum(sum(sizes) for sizes in piece_bytes([(codec, size)], ranks)) == codec.packed_bytes(size)


def test_bytes_by_hand() -> None:
    lanes = [(CODECS["int8"], 5 * 4096), (PLAIN, 10)]  # 5 slices of 4,098 bytes, and 20
    assert handed_bytes("all-gather", lanes, 4) == {"all_gather": 5 * 4098 + 20}
    # Of four ranks one owns two slices; 10 values are cut at 2, 5 and 7.
    assert piece_bytes(lanes, 4) == [[4098, 4], [4098, 6], [4098, 4], [2 * 4098, 6]]
    assert handed_bytes("two-phase", lanes, 4) == {"all_to_all": 5 * 4098 + 20, "all_gather": 2 * 4098 + 6}
    assert sent_bytes("all-gather", lanes, 4) == 3 * (5 * 4098 + 20)
    assert sent_bytes("two-phase", lanes, 4) == 0.75 * (5 * 4098 + 20) + 3 * (2 * 4098 + 6)
    assert handed_bytes("two-phase", lanes, 1) == {}


@pytest.mark.parametrize("ranks", [3, 4, 8, 64])
def test_two_phases_send_twice_the_packed_size_whatever_the_ranks(ranks: int) -> None:
    lanes = [(CODECS["int4"], 64 * 4096 * 10), (PLAIN, 0)]
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
    lanes = [(CODECS[name], size), (PLAIN, 100)]
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
