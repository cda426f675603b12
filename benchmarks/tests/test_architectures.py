"""Models of Hugging Face's `transformers`, shared with nothing said but a budget."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks.quality.architectures import ARCHITECTURES, BUDGET, CONTEXT, EXTRA, NOT_ASKED, best_rates, rows, trained
from dist_ssn import materialize, share, shared_plan
from testing.layer_kinds import banks_of, be_pure, relative_error

TEXT = torch.randint(256, (4, CONTEXT), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def _shared(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = share(ARCHITECTURES[name].build().double(), BUDGET)
    inputs, targets = (IMAGES.double(), torch.arange(4)) if name == "ViT" else (TEXT, TEXT)
    return model, ARCHITECTURES[name].ask(inputs, targets, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_its_weights_come_from_the_bank(name: str) -> None:
    model, batch = _shared(name)
    plan = shared_plan(model)
    assert plan is not None
    dense = sum(slot.numel for group in plan.groups for slot in group.slots)
    matrices = sum(p.numel() for p in ARCHITECTURES[name].build().parameters() if p.dim() > 1)
    assert dense >= 0.95 * matrices and plan.parameters <= BUDGET * dense
    pure = copy.deepcopy(model)
    be_pure(pure)
    for one in (model, pure):
        one(**batch).loss.backward()
    for (_, ours), (_, theirs) in zip(model.named_parameters(), pure.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or relative_error(ours.grad, theirs.grad) < 1e-10
    assert all(bank.bank.grad is not None and bank.bank.grad.any() for bank in banks_of(model))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(materialize(model)(**batch).loss, model(**batch).loss)


def test_what_is_asked() -> None:
    draw = torch.Generator().manual_seed(0)
    masked = ARCHITECTURES["BERT"].ask(TEXT, TEXT, draw)
    asked = masked["labels"] != NOT_ASKED
    assert 0.1 < asked.double().mean() < 0.2
    assert torch.equal(masked["labels"][asked], TEXT[asked]) and (masked["input_ids"][asked] == EXTRA).all()
    assert torch.equal(masked["input_ids"][~asked], TEXT[~asked])
    halves = ARCHITECTURES["T5"].ask(TEXT, TEXT, draw)
    assert torch.equal(torch.cat([halves["input_ids"], halves["labels"]], dim=1), TEXT)


@pytest.mark.processes
def test_a_run_is_the_same_every_time_and_learns() -> None:
    first, again = (trained(("GPT-2", 0.1, 3e-3, 0), steps=12) for _ in range(2))
    assert (
        first["validation_loss"]
        == again["validation_loss"]
        < trained(("GPT-2", 0.1, 3e-3, 0), steps=1)["validation_loss"]
    )


def test_a_side_is_shown_at_its_best_rate() -> None:
    losses = {
        (None, 1e-3, 0): 2.0,
        (None, 2e-3, 0): 1.0,
        (0.1, 1e-3, 0): 1.1,
        (None, 2e-3, 1): 1.2,
        (0.1, 1e-3, 1): 1.1,
    }
    lines = [
        {"architecture": "ViT", "budget": budget, "rate": rate, "seed": seed, "parameters": 10, "validation_loss": loss}
        for (budget, rate, seed), loss in losses.items()
    ]
    assert best_rates(lines) == {("ViT", None): 2e-3, ("ViT", 0.1): 1e-3}
    dense, shared = rows(lines)
    assert dense[-2] == "1.100 (1.000, 1.200)" and shared[-1] == "+0.0%"
