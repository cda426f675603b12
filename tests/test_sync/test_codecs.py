"""Codecs: sizes, bounds, layouts against plain loops, and what is not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_ssn.errors import UserError
from dist_ssn.sync.codecs import CODECS, DENSITY, SLICE, find_codec
from dist_ssn.sync.packing import pack_nibbles, pack_pairs, pack_places, unpack_nibbles, unpack_pairs, unpack_places

each_codec = pytest.mark.parametrize("name", CODECS)
LOSSY = [name for name in CODECS if name != "none"]
BITS = {"none": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4, "bins2": 2}
SCALES = {"int8": 1, "int4": 1, "bins2": 4}


def expected_bytes(name: str, n: int) -> int:
    """The size formula of the docs, slice by slice."""
    if name in ("none", "fp16", "bf16"):
        return n * BITS[name] // 8
    total = 0
    for start in range(0, n, SLICE):
        length = min(SLICE, n - start)
        if name == "sparse":
            kept = max(1, length // DENSITY)
            total += 2 * 2 + math.ceil(12 * kept / 8) + math.ceil(2 * kept / 8)
        else:
            total += 2 * SCALES[name] + math.ceil(length * BITS[name] / 8)
    return total


def draw(n: int, seed: int, scale: float = 1.0, kind: str = "normal") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator)
    if kind == "heavy":
        values = values**3
    if kind == "rare":
        values = values * (torch.rand(n, generator=generator) < 0.01)
    if kind == "shifted":
        values = values + 3
    return values * scale


sizes = st.sampled_from([1, 2, 3, 5, 63, 64, 65, 127, 128, 4095, 4096, 4097, 8192, 33 * 4096 + 17]) | st.integers(
    1, 9000
)


@each_codec
@settings(max_examples=25)
@given(
    n=sizes,
    seed=st.integers(0, 99),
    power=st.integers(-9, 9),
    kind=st.sampled_from(("normal", "heavy", "rare", "shifted")),
)
def test_round_trip(name: str, n: int, seed: int, power: int, kind: str) -> None:
    codec = CODECS[name]
    power = max(-3, min(2, power)) if name == "fp16" else power  # its range
    values = draw(n, seed, 10.0**power, kind)
    before = values.clone()
    packed = codec.encode(values)
    assert packed.dtype == torch.uint8 and packed.shape == (codec.packed_bytes(n),)
    assert len(packed) == expected_bytes(name, n)
    assert torch.equal(values, before)
    decoded = codec.decode(packed, n)
    assert decoded.dtype == torch.float32 and decoded.shape == (n,)
    # Bytes that begin at an odd place decode alike.
    assert torch.equal(codec.decode(torch.cat([packed[:1], packed])[1:], n), decoded)
    error = (decoded - values).abs()
    for start in range(0, n, SLICE):
        at = slice(start, start + SLICE)
        largest = values[at].abs().max()
        if name == "none":
            assert not error[at].any()
        elif name in ("fp16", "bf16"):
            ulp = 2.0 ** (-11 if name == "fp16" else -8)
            assert (error[at] <= values[at].abs() * ulp + 3e-8 * (name == "fp16")).all()
        elif name == "int8":  # half a step; the scale itself is off by at most 2^-8
            assert (error[at] <= largest / 127 * (0.5 * (1 + 2**-7))).all()
        elif name == "int4":  # it may cut off the largest, if the others gain more than that
            assert error[at].norm() <= largest / 7 * (0.5 * (1 + 2**-7)) * len(error[at]) ** 0.5
        else:  # no vector comes out longer than it was, nor further away than zero, but for the means' 8 bits
            assert error[at].double().norm() <= values[at].double().norm() * (1 + 2**-8)


def oracle(name: str, values: list[float]) -> np.ndarray:
    """One slice in float64 by plain loops; scales are rounded to bfloat16."""

    def rounded(x: float) -> float:
        return float(torch.tensor(x, dtype=torch.float32).bfloat16())

    def means(groups: list[list[float]]) -> list[float]:
        return [rounded(sum(group) / len(group)) if group else 0.0 for group in groups]

    if name in ("int8", "int4"):
        top = {"int8": 127, "int4": 7}[name]
        found = []
        for share in (1.0, 0.7, 0.5, 0.35) if name == "int4" else (1.0,):
            scale = rounded(share * max(map(abs, values)) / top)
            found.append(np.array([max(-top, min(top, round(x / scale))) * scale for x in values]))
        return min(found, key=lambda decoded: float(np.sum((decoded - np.array(values)) ** 2)))
    if name == "bins2":
        mean = sum(values) / len(values)
        step = (sum((x - mean) ** 2 for x in values) / len(values)) ** 0.5
        places = [(x >= mean - step) + (x >= mean) + (x >= mean + step) for x in values]
        table = means([[x for x, at in zip(values, places, strict=True) if at == number] for number in range(4)])
        return np.array([table[at] for at in places])
    kept = sorted(range(len(values)), key=lambda at: -abs(values[at]))[: max(1, len(values) // DENSITY)]
    middle = sum(abs(values[at]) for at in kept) / len(kept)
    small, large = means(
        [[abs(values[at]) for at in kept if (abs(values[at]) > middle) == big] for big in (False, True)]
    )
    found = np.zeros(len(values))
    for at in kept:
        found[at] = math.copysign(large if abs(values[at]) > middle else small, values[at])
    return found


@pytest.mark.parametrize("name", ["int8", "int4", "bins2", "sparse"])
@pytest.mark.parametrize("n", [1, 7, 4095, 4096, 4097 + 4096])
def test_slices_are_those_of_a_plain_loop(name: str, n: int) -> None:
    values = draw(n, seed=n, kind="heavy")
    decoded = CODECS[name].decode(CODECS[name].encode(values), n)
    for start in range(0, n, SLICE):
        wanted = oracle(name, values[start : start + SLICE].double().tolist())
        # A mean in float32 may round to the other neighbour in bfloat16.
        torch.testing.assert_close(decoded[start : start + SLICE].double(), torch.tensor(wanted), rtol=2**-7, atol=0)


def bfloat16(*values: float) -> list[int]:
    return torch.tensor(values).bfloat16().view(torch.uint8).tolist()


def test_layout_of_a_sparse_slice() -> None:
    """Two magnitudes, places of 12 bits in threes of bytes, then codes of 2 bits: 1 for large, 2 for negative."""
    values = torch.zeros(256)  # four values are sent
    values[[3, 0x57, 0xAB, 0xFF]] = torch.tensor([1.0, -4.0, 6.0, -1.0])
    packed = CODECS["sparse"].encode(values).tolist()
    assert packed == [*bfloat16(1.0, 5.0), 0x03, 0x70, 0x05, 0xAB, 0xF0, 0x0F, 0b10_01_11_00]
    decoded = CODECS["sparse"].decode(torch.tensor(packed, dtype=torch.uint8), 256)
    wanted = torch.zeros(256)
    wanted[[3, 0x57, 0xAB, 0xFF]] = torch.tensor([1.0, -5.0, 5.0, -1.0])
    assert torch.equal(decoded, wanted)
    assert CODECS["sparse"].packed_bytes(4096) == 4 + 96 + 16


def test_layout_of_the_others() -> None:
    values = torch.tensor([7.0, -7.0, 2.6, 0.0, -1.0])
    assert CODECS["int4"].encode(values).tolist() == [*bfloat16(1.0), 15 | 8 << 4, 1 | 7 << 4, 11]
    values = torch.tensor([127.0, -127.0, 2.6])
    assert CODECS["int8"].encode(values).tolist() == [*bfloat16(1.0), 127, 256 - 127, 3]
    values = torch.tensor([-2.0, -0.5, 0.5, 2.0, -2.0])  # bins begin at −1.93, −0.4 and 1.13
    packed = CODECS["bins2"].encode(values)
    assert packed.tolist() == [*bfloat16(-2.0, -0.5, 0.5, 2.0), 0 | 2 << 2, 1 | 3 << 2]
    assert CODECS["bf16"].encode(torch.tensor([1.0])).tolist() == bfloat16(1.0)


@settings(max_examples=50)
@given(rows=st.integers(1, 3), n=st.integers(1, 70), seed=st.integers(0, 99))
def test_packing(rows: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for top, pack, unpack, bits in (
        (16, pack_nibbles, unpack_nibbles, 4),
        (4, pack_pairs, unpack_pairs, 2),
        (4096, pack_places, unpack_places, 12),
    ):
        codes = torch.randint(top, (rows, n), generator=generator)
        packed = pack(codes)
        assert packed.dtype == torch.uint8 and packed.shape == (rows, math.ceil(n * bits / 8))
        assert torch.equal(unpack(packed, n).long(), codes)


@each_codec
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 4095, 4096, 5000])
def test_what_is_not_finite_stays_visible(name: str, bad: float, at: int) -> None:
    values = draw(5001, 0)
    values[at] = bad
    decoded = CODECS[name].decode(CODECS[name].encode(values), len(values))
    whole = slice(0, 4096) if at < 4096 else slice(4096, 5001)
    assert not decoded[whole].isfinite().all()
    other = torch.ones(5001, dtype=torch.bool)
    other[whole] = False
    assert decoded[other].isfinite().all()  # a slice does not touch another


@each_codec
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-38, 1e34])
def test_the_ends_of_float32(name: str, scale: float) -> None:
    values = draw(4100, 1) * scale
    decoded = CODECS[name].decode(CODECS[name].encode(values), len(values))
    if name == "fp16" and scale > 1:
        assert decoded.isinf().any()  # said in the docs
        return
    assert decoded.isfinite().all()
    assert (decoded - values).abs().max() <= values.abs().max() * 1.01 + 1e-40
    if not scale:
        assert not decoded.any()


@each_codec
def test_decoding_what_was_decoded_changes_little(name: str) -> None:
    """A value that was sent once is sent again with at most its scale's rounding, so feedback does not walk away."""
    codec, values = CODECS[name], draw(4096 + 100, 2)
    once = codec.decode(codec.encode(values), len(values))
    twice = codec.decode(codec.encode(once), len(values))
    assert (twice - once).norm() <= 0.02 * once.norm()


def test_an_unknown_codec_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown codec 'int5': known are bf16, .*; did you mean 'int"):
        find_codec("int5")
    assert find_codec("int8") is find_codec(CODECS["int8"]) is CODECS["int8"]


def test_decays() -> None:
    assert {name: codec.feedback_decay for name, codec in CODECS.items()} == {
        **dict.fromkeys(CODECS, 1.0),
        "sparse": 0.95,
    }
    assert [name for name, codec in CODECS.items() if codec.is_sparse] == ["sparse"]
