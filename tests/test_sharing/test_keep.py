"""`share(keep=True)`: weights stay, a bank generates a difference that starts at zero. Oracle: plain autograd, float64, 1e-10."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_ssn import Plan, make_plan, materialize, parameter_groups, set_generation, share, shared_plan
from dist_ssn.comm import CommMeter
from dist_ssn.errors import BudgetError, PlanError, ShareError
from dist_ssn.sharing.bank import banks_of
from dist_ssn.sharing.bases import fingerprint
from testing.layer_kinds import (
    KINDS,
    Twins,
    covering,
    loss_of,
    pulled_back,
    relative_error,
)
from testing.ranks import RanksFailed, run_ranks

MORPHS = (
    *("offset", "offset:gains=true,rank=2", "hash:templates=2", "inter", "wavg/wavg", "mask", "repeat", "emb/inter"),
    "avg/inter",
)
CASES = covering(MORPHS, least=2)
"""(morph, kind of layer)."""


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def shaken(model: nn.Module) -> nn.Module:
    """The model, with every trained parameter moved."""
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for bank in banks_of(model):
        bank.at_start = False  # so that it is not taken for a mistake
    return model


class Net(nn.Module):
    """A body with norms and biases, and a head."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.table = nn.Embedding(30, width)
        self.body = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, width))
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.table(tokens)))


TOKENS = torch.tensor([[1, 5, 2], [7, 7, 0]])


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def kept(model: nn.Module) -> nn.Module:
    return share(model, 0.2, mapping="single", keep=True)


@pytest.mark.parametrize(("morph", "kind"), CASES)
def test_start_and_gradients_are_those_of_plain_autograd(morph: str, kind: str) -> None:
    """At two budgets, generated on demand and per step: the start bit for bit, every gradient to 1e-10."""
    for number, budget in enumerate((0.5, 1.5)):
        torch.manual_seed(number)
        dense = Twins(KINDS[kind], 600).double()
        inputs = KINDS[kind].inputs()
        model = copy.deepcopy(dense)
        try:
            share(model, budget, morph=morph, keep=True, mapping="single")
        except BudgetError as error:  # rank 2 of the smallest layers at budget 0.5
            assert number == 0 and "rank=2" in morph, error
            continue
        assert all(not name.startswith("layers") for name in trained(model))
        for mode in ("on_demand", "per_step"):
            set_generation(model, mode)
            assert torch.equal(loss_of(model(*inputs)), loss_of(dense(*inputs))), mode
        shaken(model)
        merged = materialize(model).requires_grad_(True)
        plain = loss_of(merged(*inputs))
        plain.backward()
        wanted = pulled_back(model, merged)
        for mode in ("on_demand", "per_step"):
            set_generation(model, mode)
            model.zero_grad()
            loss = loss_of(model(*inputs))
            loss.backward()
            assert relative_error(loss, plain) <= 1e-10
            for name, parameter in trained(model).items():
                error = relative_error(parameter.grad, wanted[name])
                assert error <= 1e-10, f"{mode}: {name} is off by {error:.1e}"


def test_what_is_trained() -> None:
    """The banks, and what `train=` names; everything else is frozen, and neither an optimizer nor a state dict holds W₀."""
    model = share(net(), 0.2, keep=True, train="head")
    assert {name for name in trained(model) if "dist_ssn" not in name} == {"head.weight", "head.bias"}
    state = model.state_dict()
    assert "table.weight" not in state and not any(tuple(t.shape) == (24, 24) for t in state.values())
    groups = parameter_groups(model, lr=1e-3)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in trained(model).values()}
    everywhere = share(net(), 0.2, keep=True, train=["*.bias", "body.1"])
    names = {name for name in trained(everywhere) if "dist_ssn" not in name}
    assert names == {"body.0.bias", "body.1.weight", "body.1.bias", "body.3.bias", "head.bias"}
    with pytest.raises(ShareError, match=r"train='nothing' matches no parameter of Net"):
        share(net(), 0.2, keep=True, train="nothing")
    with pytest.raises(ShareError, match="train= goes with keep=True"):
        share(net(), 0.2, train="head")


def test_no_warning_in_training_and_nothing_else_moves() -> None:
    """Half-frozen layers are meant, so the checks of optimizers are silent, for `parameter_groups` as for `parameters()`."""
    for select in (lambda m: parameter_groups(m, lr=1e-2), lambda m: m.parameters()):
        base = net()
        model = share(copy.deepcopy(base), 0.2, keep=True)
        optimizer = torch.optim.AdamW(select(model), lr=1e-2)
        before = model(TOKENS).detach()
        for _ in range(2):
            loss_of(model(TOKENS).double()).backward()
            optimizer.step()
        assert not torch.equal(model(TOKENS), before)
        for name, parameter in base.named_parameters():
            if parameter.ndim < 2:
                assert torch.equal(parameter, model.get_parameter(name)), name


def test_trained_constant_and_frozen_weights_are_shared_without_a_warning() -> None:
    base = net()
    with torch.no_grad():
        base.body[0].weight.zero_()  # as adapters start
        base.table.weight[::2] *= 30  # as word vectors do
    base.body[3].weight.requires_grad_(False)
    plan = shared_plan(share(copy.deepcopy(base), 0.2, keep=True))
    assert plan is not None
    assert {slot.name for _, slot in plan.slots()} == {
        f"{name}.weight" for name in ("table", "body.0", "body.3", "head")
    }
    assert plan == make_plan(base, 0.2, keep=True)


def test_the_plan_says_keep() -> None:
    model = share(net(), 0.2, keep=True)
    plan = shared_plan(model)
    assert plan is not None
    text = plan.to_json()
    assert '"keep": true' in text and Plan.from_json(text) == plan
    assert "kept values and" in str(plan) and "kept values and" in str(plan.table().title)
    dense = make_plan(net(), 0.2)
    assert "keep" not in dense.to_json() and not Plan.from_json(dense.to_json()).keep
    assert dense.fingerprint != make_plan(net(), 0.2, keep=True).fingerprint
    with pytest.raises(PlanError, match=r"plan\.keep: 3 is no valid bool"):
        Plan.from_json(text.replace('"keep": true', '"keep": 3'))
    with pytest.raises(
        PlanError, match=r"the plan is for weights that are kept: call share\(model, plan=plan, keep=True"
    ):
        share(net(), plan=plan)
    with pytest.raises(PlanError, match="the state dict belongs to another plan: it has no weights that are kept"):
        model.load_state_dict(share(net(), 0.2).state_dict())
    again = share(net(), plan=Plan.from_json(text), keep=True)
    assert torch.equal(again(TOKENS), net()(TOKENS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_have_a_bank_in_float32(dtype: torch.dtype) -> None:
    """The weight is made in float32 and rounded once, in both modes and by rows."""
    base = net().to(dtype)
    model = kept(copy.deepcopy(base))
    (bank,) = banks_of(model)
    assert bank.bank.dtype == torch.float32 and model.head.weight.dtype == dtype
    results = []
    for mode in ("on_demand", "per_step"):
        set_generation(model, mode)
        assert torch.equal(model(TOKENS), base(TOKENS)), mode
    shaken(model)
    merged = materialize(model)
    for mode in ("on_demand", "per_step"):
        set_generation(model, mode)
        model.zero_grad()
        out = model(TOKENS)
        loss_of(out.double()).backward()
        assert torch.equal(out, merged(TOKENS)), mode
        results.append(bank.bank.grad)
    assert relative_error(results[0], results[1]) < 1e-2
    difference = bank(3).float() - base.head.weight.float()
    assert difference.abs().max() > 0.01


def test_copies_have_the_same_base_and_moves_move_it() -> None:
    model = shaken(kept(net()))
    (bank,) = banks_of(model)
    twin = copy.deepcopy(model)
    assert bank.bases is not None and banks_of(twin)[0].bases is bank.bases
    assert torch.equal(twin(TOKENS), model(TOKENS))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(TOKENS), model(TOKENS))
    wide = copy.deepcopy(model).double()
    assert wide(TOKENS).dtype == torch.float64
    assert torch.allclose(wide(TOKENS).float(), model(TOKENS), atol=1e-5)
    assert bank.bases.dtype == torch.float32
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.load_state_dict({name: value.bfloat16() for name, value in half.state_dict().items()})
    for lose in (lambda: twin.to("meta"), lambda: twin.to_empty(device="cpu")):
        with pytest.raises(ShareError, match=r"table\.weight and all other kept weights would lose their values"):
            lose()


def test_the_base_is_not_copied() -> None:
    base = net()
    addresses = [p.data_ptr() for p in base.parameters() if p.ndim == 2]
    (bank,) = banks_of(kept(base))
    assert bank.bases is not None and [t.data_ptr() for t in bank.bases.tensors] == addresses


def test_meta_has_no_values_to_keep() -> None:
    with torch.device("meta"):
        empty = Net()
    assert make_plan(empty, 0.2, keep=True) == make_plan(net(), 0.2, keep=True)
    with pytest.raises(ShareError, match=r"table\.weight is on 'meta' and has no values to keep"):
        share(empty, 0.2, keep=True)


def test_fingerprints() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    assert len(fingerprint(tensor)) == 32 and fingerprint(tensor) == fingerprint(tensor.clone())
    assert fingerprint(tensor.t()) == fingerprint(tensor.t().contiguous())
    others = [tensor.view(3, 2), tensor.bfloat16(), tensor + torch.eye(2, 3) * 1e-6, tensor.t()]
    assert len({fingerprint(other) for other in [tensor, *others]}) == 5


def test_a_state_dict_goes_onto_the_same_base_only() -> None:
    model = shaken(kept(net()))
    state = model.state_dict()
    same = kept(net())
    same.load_state_dict({name: (value + value) / 2 for name, value in state.items()})  # an average
    assert torch.equal(same(TOKENS), model(TOKENS))
    other = net()
    with torch.no_grad():
        other.head.weight[0, 0] += 1e-6
    with pytest.raises(
        ShareError, match=r"trained on other kept values of head\.weight \(1 of 4 weights of its bank differ\)"
    ):
        kept(other).load_state_dict(state)


def _steps(rank: int, size: int, change: str, wrapped: bool = True) -> Any:
    """Two steps under DDP; rank 1 may have another base. Returns the ledger's bytes and the weights' sum."""
    base = BigNet()
    if rank and change:
        with torch.no_grad():
            base.get_parameter(change).view(-1)[0] += 1e-3
    model = share(base, 5000, keep=True, exclude="beside", train="head")
    with CommMeter() as meter:
        wrapper = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))
        start = meter.ledger.totals().logical_bytes
        for _ in range(2):
            wrapper(torch.ones(2, 512) * (rank + 1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return (
            start,
            meter.ledger.totals().logical_bytes - start,
            float(materialize(model).body.weight.detach().double().sum()),
        )


class BigNet(nn.Module):
    """6 MB, of which 1 MB is excluded from the banks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(512, 2400)
        self.beside = nn.Linear(2400, 100)
        self.head = nn.Linear(100, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.beside(self.body(x).tanh()))


@pytest.mark.distributed
def test_nothing_of_the_base_travels_under_ddp() -> None:
    """Start and steps: the banks and what is trained beside them, and 20 kB."""
    model = share(BigNet(), 5000, keep=True, exclude="beside", train="head")
    own = sum(p.nbytes for p in trained(model).values())
    assert own < 25_000 and sum(p.nbytes for p in BigNet().parameters()) > 5_000_000
    (start, steps, total), (_, _, other) = run_ranks(_steps, 2, "")
    assert own <= start <= own + 20_000
    assert 2 * own <= steps <= 2 * own + 20_000
    assert total == other


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("body.weight", r"rank 0 is trained on other kept values of body\.weight"),
        ("beside.bias", r"rank 0 has other values of beside\.bias \(1 of the 3 frozen parameters differ\)"),
    ],
)
def test_a_rank_with_another_base_is_named(name: str, sentence: str) -> None:
    with pytest.raises(RanksFailed, match=sentence):
        run_ranks(_steps, 2, name)
