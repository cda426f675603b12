"""Feedback: what was sent and what is kept are what was to be sent, in every round and over all rounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dist_ssn.sync.codecs import CODECS
from dist_ssn.sync.feedback import Feedback, Lane

N = 4096 + 1000
ROUNDS = 20
EXACT = ("fp16", "bf16", "int8", "int4", "sparse")
"""Codecs that send a value as at most twice itself, or not at all: value − sent has no rounding error (Sterbenz' lemma)."""


def changes() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    steady = torch.randn(N, generator=generator)
    return [steady + torch.randn(N, generator=generator) for _ in range(ROUNDS)]


@pytest.mark.parametrize("name", [name for name in CODECS if name != "none"])
def test_sent_and_kept_are_the_change_and_what_was_kept(name: str) -> None:
    feedback = Feedback(CODECS[name])
    before = torch.zeros(N)
    for change in changes():
        packed, sent = feedback.encode(change)
        assert torch.equal(sent, CODECS[name].decode(packed, N))  # what the others see
        value = torch.add(change, before, alpha=CODECS[name].feedback_decay)
        kept = feedback.kept
        assert kept is not None
        difference = (sent.double() + kept.double() - value.double()).abs()
        if name in EXACT[:4]:
            assert not difference.any()
        elif name == "sparse":
            assert not difference[sent == 0].any()
        ulp = torch.maximum(sent.abs(), value.abs()) * 2**-23
        assert (difference <= ulp).all()
        before = kept


@pytest.mark.parametrize("name", [name for name in CODECS if name != "none"])
def test_what_was_sent_in_all_is_what_was_to_be_sent(name: str) -> None:
    """Without decay, the sums differ by what is kept, which does not grow: the mean of what was sent converges."""
    feedback = Feedback(replace(CODECS[name], feedback_decay=1.0))
    wanted, total = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    errors = []
    for number, change in enumerate(changes(), 1):
        total += feedback.encode(change)[1].double()
        wanted += change.double()
        assert feedback.kept is not None
        torch.testing.assert_close(total + feedback.kept.double(), wanted, rtol=0, atol=1e-4)
        errors.append(float((total - wanted).norm() / number / (wanted.norm() / number)))
    assert errors[-1] < (0.8 if name == "sparse" else errors[0] / 5)


def test_an_exact_codec_keeps_nothing() -> None:
    feedback = Feedback(CODECS["none"])
    feedback.encode(torch.randn(10))
    assert feedback.kept is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_sent_and_not_kept(bad: float) -> None:
    for name in CODECS:
        feedback = Feedback(CODECS[name])
        change = torch.ones(10)
        change[3] = bad
        assert not feedback.encode(change)[1].isfinite().all(), name
        assert feedback.encode(torch.ones(10))[1].isfinite().all(), name


def test_what_an_owner_keeps_counts_once_for_each_rank() -> None:
    lane = Lane(CODECS["int4"], [0, 4096, N], rank=1)
    assert not lane.unsent().any()
    lane.of_values.encode(torch.randn(N))
    lane.of_mean.encode(torch.randn(N - 4096))
    values, mean = lane.of_values.kept, lane.of_mean.kept
    assert values is not None and mean is not None
    wanted = values.clone()
    wanted[4096:] += 2 * mean
    assert torch.equal(lane.unsent(), wanted)
