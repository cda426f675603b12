"""Controls: honest parameter counts, gradients of plain autograd, every weight's initial scale, and training by a recipe."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dist_ssn
from dist_ssn.baselines import CONTROLS, control
from dist_ssn.baselines.factors import Matrices, fit_ranks
from dist_ssn.baselines.generator import Generator
from dist_ssn.baselines.hashed import Hashed
from dist_ssn.errors import BudgetError, CheckpointError, PlanError, RecipeError, ShareError, UserError
from dist_ssn.model.specs import find_specs
from dist_ssn.train.loop import train
from dist_ssn.train.models import build_model
from dist_ssn.train.recipe.read import load_recipe
from testing.ranks import run_ranks

MODELS = {
    "gpt": {"layers": 4, "width": 32, "heads": 2, "context": 16},
    "wide_resnet": {"depth": 16, "width": 1},
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, MODELS[name])


def generator_of(model: nn.Module) -> Generator:
    (found,) = [module for module in model.modules() if isinstance(module, Generator)]
    return found


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("budget", [0.1, 0.25, 0.6])
@pytest.mark.parametrize("name", CONTROLS)
def test_parameters_are_the_budget(name: str, budget: float, model: str) -> None:
    dense = made(model)
    specs = find_specs(dense)
    controlled = control(made(model), name, budget)
    generated = sum(p.numel() for p in generator_of(controlled).parameters())
    allowed = int(budget * specs.numel)
    assert trainable(controlled) == generated + specs.own_parameters
    # Whole matrices are lumps: what is left is less than one of them, or all kinds have what they can use.
    slack = {"tied": max(w.numel for w in specs.weights), "lowrank": 0.03 * allowed}.get(name, 0)
    assert allowed - slack <= generated <= allowed
    assert {n for n, _ in controlled.named_parameters() if "dist_ssn_control" not in n} == {
        n for n, p in dense.named_parameters() if n not in {w.name for w in specs.weights}
    }


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CONTROLS)
def test_each_weight_starts_with_its_own_scale(name: str, model: str) -> None:
    specs = find_specs(made(model))
    controlled = control(made(model), name, 0.2)
    for weight in specs.weights:
        module, _, local = weight.name.rpartition(".")
        values = getattr(controlled.get_submodule(module), local)
        assert values.shape == weight.shape
        # Few buckets are drawn unequally often, and a group's root mean square is exact only over its members' sum.
        assert values.square().mean().sqrt().item() == pytest.approx(
            weight.init_std, rel=0.25 if "hash" in name else 1e-4
        )
    total = {n: p for n, p in controlled.named_parameters() if "control" in n}
    assert all(values.ndim == 2 for values in total.values())  # decayed as matrices are


@pytest.mark.parametrize("name", CONTROLS)
def test_gradients_are_those_of_plain_autograd(name: str) -> None:
    """The chain rule by hand: the dense twin's gradients, pulled back through `make` outside of any layer."""
    model = control(made("gpt").double(), name, 0.15)
    generator = generator_of(model)
    dense = made("gpt").double()
    weights = {w.name: generator(i) for i, w in enumerate(generator.weights)}
    own = {n: p for n, p in model.named_parameters() if "dist_ssn_control" not in n}
    tokens = torch.randint(0, 256, (2, 16))

    def loss(net: nn.Module, parameters: dict[str, Tensor] | None = None) -> Tensor:
        out = net(tokens) if parameters is None else torch.func.functional_call(net, parameters, (tokens,))
        return (out * torch.linspace(-1, 1, 256, dtype=torch.float64)).tanh().mean()

    mine, twin = loss(model), loss(dense, {**weights, **own})
    assert torch.allclose(mine, twin, atol=1e-12)
    parameters = list(model.parameters())
    for got, wanted in zip(torch.autograd.grad(mine, parameters), torch.autograd.grad(twin, parameters), strict=True):
        assert wanted.abs().max() > 0 and torch.allclose(got, wanted, atol=1e-12)


def test_tied_layers_are_equal_and_others_are_not() -> None:
    model = control(made("gpt"), "tied", 0.4)
    generator = generator_of(model)
    assert isinstance(generator, Matrices) and all(matrix.rank is None for matrix in generator.matrices)
    blocks = model.blocks
    assert torch.equal(blocks[0].mlp.up.weight, blocks[1].mlp.up.weight)
    assert not torch.equal(blocks[0].mlp.up.weight.T, blocks[0].mlp.down.weight)
    assert torch.equal(model.head.weight, model.tokens.weight)


def test_a_larger_budget_unties_neighbours_last() -> None:
    model = control(made("gpt"), "tied", 0.75)
    ups = [model.get_submodule(f"blocks.{i}.mlp.up").weight for i in range(4)]
    assert len({tuple(up.flatten().tolist()) for up in ups}) > 1
    runs = [matrix.members for matrix in generator_of(model).matrices]  # pyright: ignore
    assert sorted(i for run in runs for i in run) == list(range(18))


def test_tied_below_one_layer_of_each_kind_is_factorized() -> None:
    generator = generator_of(control(made("gpt"), "tied", 0.1))
    assert isinstance(generator, Matrices) and any(matrix.rank for matrix in generator.matrices)
    assert max(len(matrix.members) for matrix in generator.matrices) == 4


def test_lowrank_has_low_rank() -> None:
    model = control(made("gpt"), "lowrank", 0.2)
    generator = generator_of(model)
    assert isinstance(generator, Matrices)
    for index, weight in enumerate(generator.weights):
        rank = generator.matrices[index].rank
        assert rank is not None
        assert torch.linalg.matrix_rank(generator(index).double(), rtol=1e-5) == rank, weight.name


def test_ranks_that_save_nothing_are_not_taken() -> None:
    assert fit_ranks([(3, 3), (100, 100)], 6 + 200 + 2, "x") == [1, 1]
    assert fit_ranks([(3, 3), (100, 100)], 6 + 200 + 3, "x") == [None, 1]
    assert fit_ranks([(2, 2), (100, 100)], 4 + 400, "x") == [None, 2]
    with pytest.raises(BudgetError, match="with rank 1 for every weight it has 204"):
        fit_ranks([(2, 2), (100, 100)], 203, "x")


def test_hashed_numbers_are_signed_buckets_of_their_own_array() -> None:
    model = control(made("wide_resnet"), "hashed", 0.1)
    generator = generator_of(model)
    assert isinstance(generator, Hashed)
    for index, weight in enumerate(generator.weights):
        buckets = generator.get_parameter(f"buckets{index}")
        known = {round(value, 6) for value in buckets.abs().flatten().tolist()}
        found = {round(value, 6) for value in generator(index).abs().flatten().tolist()}
        assert found <= known and buckets.numel() < weight.numel
    assert len(list(generator_of(control(made("wide_resnet"), "hashed-global", 0.1)).parameters())) == 1


@pytest.mark.parametrize("name", CONTROLS)
def test_the_seed_decides_and_nothing_else(name: str) -> None:
    first, torch_seeded, other = (made("gpt") for _ in range(3))
    control(first, name, 0.2, seed=3)
    torch.manual_seed(17)
    control(torch_seeded, name, 0.2, seed=3)
    control(other, name, 0.2, seed=4)
    assert torch.equal(first.blocks[2].mlp.up.weight, torch_seeded.blocks[2].mlp.up.weight)
    assert not torch.equal(first.blocks[2].mlp.up.weight, other.blocks[2].mlp.up.weight)
    with pytest.raises(PlanError, match=f"to the control .*{name}.*3"):
        other.load_state_dict(first.state_dict())


@pytest.mark.parametrize("name", CONTROLS)
def test_recurrent_attention_and_padded_layers(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(30, 16, padding_idx=3)
            self.rnn = nn.LSTM(16, 16, 2, batch_first=True)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.rnn(self.embedding(x))[0]
            return self.attention(x, x, x)[0]

    model = control(Net(), name, 0.5)
    assert not model.embedding.weight[3].any() and model.embedding(torch.tensor([[3, 4]]))[0, 1].any()
    twin = copy.deepcopy(model)
    model(torch.arange(20).view(2, 10)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.ndim == 2)
    optimizer = torch.optim.SGD(dist_ssn.parameter_groups(model, 0.0), lr=1.0)
    before = model.rnn.weight_hh_l1.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.rnn.weight_hh_l1) and torch.equal(before, twin.rnn.weight_hh_l1)


def test_under_autocast_and_in_another_dtype() -> None:
    model = control(made("gpt"), "hashed", 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.zeros(1, 4, dtype=torch.long)).dtype == torch.bfloat16
    assert model.double()(torch.zeros(1, 4, dtype=torch.long)).dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "budget", "error", "wanted"),
    [
        (
            "tide",
            0.1,
            ShareError,
            "unknown control 'tide': known are hashed, hashed-global, lowrank, tied; did you mean",
        ),
        ("tied", 1.0, BudgetError, "needs a smaller budget"),
        ("hashed", 17, BudgetError, "at least one for each of 18 weights"),
        ("lowrank", 100, BudgetError, "with rank 1 for every weight it has"),
    ],
)
def test_mistakes(name: str, budget: float, error: type[Exception], wanted: str) -> None:
    with pytest.raises(error, match=wanted):
        control(made("gpt"), name, budget)


def test_a_controlled_model_is_not_shared_again() -> None:
    with pytest.raises(ShareError, match="is shared already"):
        dist_ssn.share(control(made("gpt"), "tied", 0.2), 0.1)


SMALL = [
    *("model_args={layers: 2, width: 16, heads: 2, context: 16}", "steps=3", "batch_size=4", "evaluate_batches=2"),
    *("threads=1", "optimizer.lr=0.01"),
]


@pytest.mark.parametrize("name", CONTROLS)
def test_train_by_a_recipe_and_go_on(name: str, tmp_path: Path) -> None:
    settings = [*SMALL, f"share.control={name}", "share.budget=30%", f"output={tmp_path}"]
    row = train(load_recipe(None, settings), progress=False).row
    specs = find_specs(build_model("gpt", {"layers": 2, "width": 16, "heads": 2, "context": 16}))
    assert row["parameters"] <= 0.3 * specs.numel + specs.own_parameters
    longer = [*settings, "steps=5", "checkpoint.resume=true"]
    assert train(load_recipe(None, longer), progress=False).summary["steps"] == 5
    with pytest.raises(UserError):
        train(load_recipe(None, [*longer, "share.control=null", "steps=6"]), progress=False)
    if name.startswith("hashed"):
        with pytest.raises((PlanError, CheckpointError), match="belongs to the control"):
            train(load_recipe(None, [*longer, "share.seed=5", "steps=6"]), progress=False)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (["share.control=tied"], "share.control is tied, which needs a budget: set share.budget too"),
        (["share.control=tide", "share.budget=0.1"], "share.control is an unknown name 'tide'"),
        (
            ["share.control=tied", "share.budget=0.1", "share.mapping=single"],
            "share.mapping is for shared weights, and share.control tied has no banks",
        ),
        (["share.control=hashed", "share.budget=0.1", "share.morph=hash"], "share.morph is for shared weights"),
    ],
)
def test_contradictions_are_refused(settings: list[str], wanted: str) -> None:
    with pytest.raises(RecipeError, match=wanted):
        load_recipe(None, settings)


def test_a_control_beside_a_plan_is_refused(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    with pytest.raises(RecipeError, match=r"share\.plan is for shared weights"):
        load_recipe(None, ["share.control=tied", "share.budget=0.1", f"share.plan={plan}"])


def trained_on_two(rank: int, world_size: int, engine: str, name: str, folder: str) -> float:
    torch.set_num_threads(1)
    settings = [*SMALL, f"share.control={name}", "share.budget=30%", f"output={folder}", f"engine.name={engine}"]
    return train(load_recipe(None, settings), progress=False).row["validation_loss"]


@pytest.mark.distributed
@pytest.mark.parametrize(("engine", "name"), [("ddp", "hashed"), ("fsdp", "tied"), ("fsdp", "lowrank")])
def test_two_processes_train_as_one(engine: str, name: str, tmp_path: Path) -> None:
    alone = train(
        load_recipe(None, [*SMALL, f"share.control={name}", "share.budget=30%", f"output={tmp_path / 'alone'}"]),
        progress=False,
    ).row
    losses = run_ranks(trained_on_two, 2, engine, name, str(tmp_path / "two"))
    assert losses[0] == losses[1] == pytest.approx(alone["validation_loss"], abs=1e-4)
    ledger = json.loads((tmp_path / "two" / "run" / "summary.json").read_text())["ledger"]
    assert not [entry for entry in ledger if entry["purpose"] == "buffers"]
