"""Structure of initial values: what was not drawn at random is left out, and what was drawn at random never is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_ssn import share, summary
from dist_ssn.model.specs import find_specs
from dist_ssn.model.structure import scales_differ, structure_of
from dist_ssn.plan import make_plan
from dist_ssn.train.models.gpt import build_gpt
from dist_ssn.train.models.wide_resnet import build_wide_resnet

SHAPES = (
    *((2, 2), (1, 16), (16, 1), (3, 5), (4, 4), (8, 8), (16, 16), (64, 1), (64, 32), (300, 8), (400, 1200)),
    *((1, 1, 96), (12, 1, 5), (8, 8, 1, 1), (8, 3, 3, 3), (16, 1, 3, 3), (64, 3, 7, 7)),
)
RANDOM: dict[str, Callable[[Tensor], Any]] = {
    "normal": lambda w: nn.init.normal_(w, std=0.02),
    "uniform": lambda w: nn.init.uniform_(w, -0.1, 0.1),
    "xavier uniform": nn.init.xavier_uniform_,
    "xavier normal": nn.init.xavier_normal_,
    "he uniform": lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)),
    "he normal": nn.init.kaiming_normal_,
    "truncated": lambda w: nn.init.trunc_normal_(w, std=0.02),
    "truncated nearby": nn.init.trunc_normal_,
    "orthogonal": nn.init.orthogonal_,
    "Laplace": lambda w: w.copy_(torch.distributions.Laplace(0.0, 0.1).sample(w.shape)),
}


def sinusoids(rows: int, columns: int) -> Tensor:
    """Positions as in the first transformer."""
    angles = torch.arange(rows).unsqueeze(1) / 10000 ** (torch.arange(0, columns, 2) / columns)
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)


def hippo(size: int) -> Tensor:
    """The matrix of HiPPO-LegS."""
    root = (2 * torch.arange(size) + 1.0).sqrt()
    return -(torch.outer(root, root).tril(-1) + torch.diag(torch.arange(1.0, size + 1)))


def cosines(size: int) -> Tensor:
    """The discrete cosine transform."""
    at = torch.arange(size, dtype=torch.float64)
    return torch.cos(math.pi * torch.outer(at, at + 0.5) / size).float()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.02


STRUCTURED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "eye": (lambda: nn.init.eye_(torch.empty(16, 16)), "starts as the identity"),
    "scaled eye": (lambda: -0.5 * torch.eye(12, 20), "starts as the identity"),
    "eye and noise": (lambda: torch.eye(32) + noise(32, 32), "starts near the identity"),
    "dirac": (lambda: nn.init.dirac_(torch.empty(8, 8, 3, 3)), "starts as a Dirac kernel"),
    "grouped dirac": (lambda: nn.init.dirac_(torch.empty(8, 4, 5), groups=2), "starts as a Dirac kernel"),
    "sparse": (lambda: nn.init.sparse_(torch.empty(40, 20), 0.5), "much of it starts at zero"),
    "zero gate in a packed weight": (
        lambda: torch.cat([noise(30, 10), torch.zeros(10, 10)]),
        "much of it starts at zero",
    ),
    "HiPPO": (lambda: hippo(16), "much of it starts at zero"),
    "A_log": (lambda: torch.arange(1, 9.0).repeat(16, 1).log(), "its rows repeat"),
    "large A_log": (lambda: torch.arange(1, 17.0).repeat(2048, 1).log(), "its rows repeat"),
    "ICNR": (lambda: noise(16, 8, 3, 3).repeat_interleave(4, 0), "its rows repeat"),
    "repeated columns": (lambda: noise(16, 1).repeat(1, 8), "its columns repeat"),
    "symmetric": (lambda: (lambda w: w + w.T)(noise(12, 12)), "starts symmetric"),
    "antisymmetric": (lambda: (lambda w: w - w.T)(noise(12, 12)), "starts symmetric"),
    "Toeplitz": (
        lambda: noise(31)[torch.arange(16).unsqueeze(1) - torch.arange(16) + 15],
        "its diagonals repeat",
    ),
    "Hankel": (lambda: noise(31)[torch.arange(12).unsqueeze(1) + torch.arange(16)], "its diagonals repeat"),
    "a half and its negative": (lambda: (lambda w: torch.cat([w, -w]))(noise(16, 24)), "its rows repeat"),
    "signs": (lambda: torch.empty(16, 24).bernoulli_(0.5).mul_(0.2).sub_(0.1), "has few different values"),
    "blur": (lambda: torch.outer(*[torch.tensor([1.0, 2.0, 1.0])] * 2).view(1, 1, 3, 3), "has few different values"),
    "Sobel": (lambda: torch.tensor([[[[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]]]), "much of it starts at zero"),
    "one row of A_log": (lambda: torch.arange(1, 17.0).log().view(1, 16), "its initial values are sorted"),
    "few above zero": (lambda: torch.rand(4, 8) + 0.01, "its initial mean is not zero"),
    "uniform above zero": (lambda: torch.rand(20, 30), "its initial mean is not zero"),
    "around one": (lambda: 1 + noise(20, 30), "its initial mean is not zero"),
    "sinusoids": (lambda: sinusoids(16, 16), "is not random"),
    "long sinusoids": (lambda: sinusoids(5000, 512), "is not random"),
    "ramp": (lambda: torch.linspace(-1, 1, 96).view(1, 1, 96), "its initial values are sorted"),
    "cosine transform": (lambda: cosines(32), "is not random"),
    "low rank": (lambda: torch.randn(64, 2) @ torch.randn(2, 48), "its initial rows are correlated"),
}


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_structure_is_recognized(name: str, dtype: torch.dtype) -> None:
    make, wanted = STRUCTURED[name]
    for seed in range(3):
        torch.manual_seed(seed)
        reason = structure_of(make().to(dtype))
        assert reason is not None
        assert wanted in ("is not random", reason)


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_values_have_no_structure(name: str, dtype: torch.dtype) -> None:
    for seed in range(40):
        for shape in SHAPES if seed < 3 else SHAPES[:-7]:
            torch.manual_seed(seed)
            weight = torch.empty(shape)
            RANDOM[name](weight)
            assert structure_of(weight.to(dtype)) is None, (seed, shape)
            assert not scales_differ(weight.to(dtype)), (seed, shape)


def word_vectors(rows: int = 200) -> Tensor:
    """Random vectors of which frequent words have longer ones, as GloVe's have."""
    return torch.randn(rows, 48) * torch.linspace(0.5, 1.5, rows)[:, None]


def trained() -> Tensor:
    """The weight of a small network after some steps."""
    layer, head = nn.Linear(16, 48), nn.Linear(48, 4)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], 1e-2)
    inputs = torch.randn(32, 16)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(head(layer(inputs).tanh()), inputs[:, :4].argmax(1)).backward()
        optimizer.step()
    return layer.weight.detach()


@pytest.mark.parametrize("make", [word_vectors, lambda: word_vectors().T, trained])
def test_values_that_no_initializer_draws_are_told_when_they_are_replaced(make: Callable[[], Tensor]) -> None:
    torch.manual_seed(0)
    values = make()
    assert structure_of(values) is None
    assert scales_differ(values)
    model = nn.Sequential(nn.Embedding.from_pretrained(values, freeze=False), nn.Linear(values.shape[1], 16))
    with pytest.warns(UserWarning, match=r"0\.weight \(1 weights in all\) differ in scale by row or column.*exclude="):
        share(model, 0.5)
    kept = nn.Sequential(nn.Embedding.from_pretrained(values, freeze=False), nn.Linear(values.shape[1], 16))
    assert torch.equal(share(kept, 0.5, exclude="0").get_parameter("0.weight"), values)


def test_a_padding_row_does_not_count_as_a_scale() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(40, 64, padding_idx=3)
    assert not scales_differ(table.weight, zero_row=3)
    assert not scales_differ(torch.zeros(40, 64))
    assert not scales_differ(torch.full((40, 64), torch.nan))
    assert not scales_differ(torch.empty(40, 64, device="meta"))


def test_a_padding_row_and_what_is_not_finite_are_no_structure() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(3, 8, padding_idx=0)
    assert structure_of(table.weight, zero_row=0) is None
    assert structure_of(table.weight[:2]) == "much of it starts at zero"
    assert structure_of(torch.full((8, 8), math.nan)) is None
    assert structure_of(torch.empty(0, 8)) is None


class StateSpace(nn.Module):
    """The parameters of a state space block, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.A_log = nn.Parameter(torch.arange(1, 9.0).repeat(16, 1).log())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) @ self.A_log.exp() @ self.A_log.T)


def test_structure_is_left_out_with_its_reason_and_trains_as_before() -> None:
    torch.manual_seed(0)
    model = StateSpace()
    before = model.A_log.detach().clone()
    share(model, 0.5)
    assert ("A_log", "its rows repeat") in summary(model).left_out
    assert torch.equal(model.A_log, before)
    model(torch.randn(4, 16)).sum().backward()
    assert model.A_log.grad is not None


def test_a_weight_is_shared_if_its_full_name_is_included() -> None:
    """So a plan with such a weight, made by hand or by an older version, is followed."""
    torch.manual_seed(0)
    names = [weight.name for weight in find_specs(StateSpace(), include=["*", "A_log"]).weights]
    assert names == ["A_log", "first.weight", "last.weight"]
    assert "A_log" not in [weight.name for weight in find_specs(StateSpace(), include=["A_*", "first"]).weights]
    plan = make_plan(StateSpace(), 0.5, include=["A_log", "first.weight", "last.weight"])
    model = share(StateSpace(), plan=plan)
    assert "A_log" not in dict(model.named_parameters())
    assert "A_log" in dict(find_specs(StateSpace(), exclude="A_log").left_out)


class Heads(nn.Module):
    """As in a small vision transformer, beside a recurrent layer and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.table = nn.Conv2d(3, 32, 4, 4), nn.Embedding(50, 32, padding_idx=0)
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.rnn, self.head = nn.LSTM(32, 16, 2), nn.Linear(32, 10)
        self.token = nn.Parameter(torch.randn(1, 1, 32) * 0.02)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("build", [lambda: build_gpt(layers=2, width=32), lambda: build_wide_resnet(depth=10), Heads])
def test_plans_of_ordinary_models_are_those_of_before(build: Callable[[], nn.Module], seed: int) -> None:
    torch.manual_seed(seed)
    model = build()
    judged, unjudged = find_specs(model), find_specs(model, structure=False)
    assert judged == unjudged
    assert make_plan(judged, "10%").fingerprint == make_plan(unjudged, "10%").fingerprint
