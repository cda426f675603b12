"""Parts that are chosen by the names of parameters: told in models with and without biases, early and late, and in copies."""

from __future__ import annotations

import copy
import pickle
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel

from dist_ssn import freeze, parameter_groups, share, unfreeze
from dist_ssn.sharing import part_check
from dist_ssn.sharing.trained_by import Seen, checked
from testing.ranks import run_ranks

Rule = Callable[[nn.Module], Any]


class Bare(nn.Module):
    """As ResNets: convolutions without biases, a norm after each, and a head."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.backbone = nn.Sequential(self._block(3, 8), self._block(8, 8))
        self.fc = nn.Linear(8, 4, bias=bias)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x).mean((2, 3)))


class Biased(nn.Module):
    """Linear layers with biases."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(12, 24, bias=bias), nn.ReLU(), nn.Linear(24, 24, bias=bias))
        self.fc = nn.Linear(24, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x))


MODELS: dict[str, Callable[[], nn.Module]] = {"bare": Bare, "biased": Biased}


def shared(kind: str = "biased", **options: Any) -> Any:
    torch.manual_seed(0)
    return share(MODELS[kind](), 0.4, **({"mapping": "single"} | options))


def step(model: Any, optimizer: torch.optim.Optimizer) -> list[str]:
    """Warnings of a step."""
    x = torch.randn(4, 3, 8, 8) if isinstance(model, Bare) else torch.randn(4, 12)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(warning.message) for warning in seen]


def of(model: nn.Module, start: str, within: bool = True) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.startswith(start) == within]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# ------------------------------------------------------------------------------------------- rules by names


def probe(model: nn.Module) -> SGD:
    for name, p in model.named_parameters():
        p.requires_grad = name.startswith("fc")
    return SGD(trainable(model), 0.5)


def frozen_backbone(model: nn.Module) -> SGD:
    for p in of(model, "backbone"):
        p.requires_grad = False
    return SGD(trainable(model), 0.5)


def two_rates(model: nn.Module) -> SGD:
    return SGD([{"params": of(model, "backbone"), "lr": 0.0}, {"params": of(model, "backbone", False)}], 0.5)


def left_out(model: nn.Module) -> SGD:
    return SGD(of(model, "backbone", False), 0.5)


def one_group_each(model: nn.Module) -> SGD:
    return SGD(
        [{"params": [p], "lr": 0.0 if name.startswith("backbone") else 0.5} for name, p in model.named_parameters()]
    )


def one_group_per_child(model: nn.Module) -> SGD:
    rates = {"backbone": 0.0, "dist_ssn": 0.5, "fc": 0.05}
    return SGD([{"params": list(child.parameters()), "lr": rates[name]} for name, child in model.named_children()])


BY_NAME: dict[Callable[[nn.Module], SGD], str] = {
    probe: "fc.weight has requires_grad=False, so these weights do not train",
    frozen_backbone: "the parameters of backbone are frozen, but its weights backbone.",
    two_rates: "the bank that generates backbone.",
    left_out: "SGD holds the bank that generates backbone.",
    one_group_each: "the bank that generates backbone.",
    one_group_per_child: "the bank that generates backbone.",
}


@pytest.mark.filterwarnings("ignore:the parameters.. of this:UserWarning")  # a child's are listed
@pytest.mark.parametrize("rule", BY_NAME, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("kind", MODELS)
def test_a_part_chosen_by_names_is_told_once(kind: str, rule: Callable[[nn.Module], SGD]) -> None:
    model = shared(kind)
    optimizer = rule(model)
    (said,) = step(model, optimizer)
    assert BY_NAME[rule] in said
    assert not step(model, optimizer)


@pytest.mark.parametrize("kind", MODELS)
def test_what_chooses_no_part_steps_without_a_word(kind: str) -> None:
    rules: dict[str, Rule] = {
        "all": lambda m: m.parameters(),
        "ours": lambda m: parameter_groups(m, 0.1, 1e-3),
        "decay": lambda m: [
            {"params": [p for p in m.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in m.parameters() if p.ndim < 2]},
        ],
        "biases twice": lambda m: [
            {"params": [p for n, p in m.named_parameters() if n.endswith("bias")], "lr": 0.2},
            {"params": [p for n, p in m.named_parameters() if not n.endswith("bias")]},
        ],
        "no biases": lambda m: [p for n, p in m.named_parameters() if not n.endswith("bias")],
        "an empty group": lambda m: [{"params": m.parameters()}, {"params": []}],
    }
    for name, rule in rules.items():
        model = shared(kind)
        assert not step(model, SGD(rule(model), 0.1)), name


def test_all_but_the_banks_is_left_out() -> None:
    """Without a bias in the head, nothing beside a weight is held."""
    model = share(Bare(bias=False), 0.4)
    (said,) = step(model, left_out(model))
    assert "no optimizer holds the biases or norms beside them" in said


def test_an_empty_group_with_a_learning_rate_is_told_where_parts_hold_nothing() -> None:
    model = share(Biased(bias=False), 0.4)
    groups = [{"params": of(model, "backbone"), "lr": 0.0}, {"params": of(model, "backbone", False)}]
    (said,) = step(model, SGD(groups, 0.5))
    assert "with a learning rate of its own is empty" in said


def test_blocks_of_a_transformer_without_biases() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    model = share(transformers.LlamaForCausalLM(config), 0.3)
    for name, p in model.named_parameters():
        p.requires_grad = any(part in name for part in ("layers.1", "lm_head", "model.norm"))
    with pytest.warns(UserWarning, match=r"generates model\.layers\.1\..* has requires_grad=False"):
        SGD(trainable(model), 0.1).step()


# ------------------------------------------------------------------------------------------- later steps


LATE: dict[str, tuple[Rule, str]] = {
    "by names": (frozen_backbone, "the parameters of backbone are frozen"),
    "by module": (lambda m: m.backbone.requires_grad_(False), "has frozen backbone."),
    "the bank": (probe, "fc.weight has requires_grad=False"),
}


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("kind", MODELS)
def test_a_part_that_is_frozen_later_is_told(kind: str, late: str) -> None:
    rule, sentence = LATE[late]
    model = shared(kind)
    optimizer = SGD(model.parameters(), 0.1)
    assert not step(model, optimizer)
    rule(model)
    (said,) = step(model, optimizer)
    assert sentence in said
    assert not step(model, optimizer)


def test_a_part_that_is_frozen_by_freeze_is_told_by_it_alone() -> None:
    model = shared()
    groups = [{"params": of(model, "backbone")}, {"params": of(model, "backbone", False)}]
    optimizer = SGD(groups, 0.1)
    assert not step(model, optimizer)
    with pytest.warns(UserWarning, match="the frozen weights backbone"):
        freeze(model, "backbone")
    optimizer.param_groups[0]["lr"] = 0.0
    assert not step(model, optimizer)
    unfreeze(model)
    assert step(model, optimizer)[0].startswith("the bank that generates backbone.")


def test_the_first_layer_of_a_sequential_is_frozen_later() -> None:
    model = share(nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4)), 0.4, mapping="single")
    optimizer = SGD(model.parameters(), 0.1)
    assert not step(model, optimizer)
    model[0].requires_grad_(False)  # type: ignore[index]
    assert any("2.weight do not train" in said for said in step(model, optimizer))


def test_a_learning_rate_that_becomes_another_one_later_is_told() -> None:
    model = shared()
    groups = [{"params": of(model, "backbone")}, {"params": of(model, "backbone", False)}]
    optimizer = SGD(groups, 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    for _ in range(3):
        assert not step(model, optimizer)
        schedule.step()
    optimizer.param_groups[0]["lr"] = 0.0
    assert "the bank that generates backbone." in step(model, optimizer)[0]


def test_a_part_of_a_large_model_is_found_within_some_steps() -> None:
    model = share(nn.Sequential(*(nn.Linear(8, 8) for _ in range(100))), 0.4, mapping="single")
    optimizer = SGD(model.parameters(), 0.0)
    optimizer.step()
    for p in of(model, "99."):
        p.requires_grad = False
    with pytest.warns(UserWarning, match="the parameters of 99 are frozen"):
        for _ in range(8):
            optimizer.step()


def test_schedules_and_parts_that_train_in_turn_are_checked_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[Any] = []
    check = part_check.check_optimizer
    monkeypatch.setattr(part_check, "check_optimizer", lambda optimizer: (checks.append(optimizer), check(optimizer)))
    model = shared(mapping={"backbone.*": "backbone", "*": "rest"})
    one, other = SGD(of(model, "backbone"), 0.1), SGD(of(model, "backbone", False), 0.1)
    del other
    optimizer = SGD(parameter_groups(model, lr=0.1), 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for _ in range(10):
        optimizer.step()
        schedule.step()
    assert checks == [optimizer]
    del one
    for turn in range(100):
        model.backbone.requires_grad_(turn % 2 == 0)
        optimizer.step()
    assert len(checks) <= part_check._MOST_CHECKS


def test_a_step_costs_some_microseconds() -> None:
    """However many parameters there are."""
    model = share(nn.Sequential(*(nn.Linear(8, 8) for _ in range(300))), 0.4, mapping="single")
    optimizer = SGD([{"params": [p]} for p in model.parameters()], 0.0)
    optimizer.step()
    seen: Seen = checked[optimizer]
    times = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            assert not seen.has_changed()
        times.append((time.perf_counter() - start) / 100)
    assert min(times) < 50e-6


# ------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("rule", [frozen_backbone, probe, two_rates, left_out], ids=lambda rule: rule.__name__)
def test_a_copy_is_told_what_the_original_is_told(kind: str, copied: Rule, rule: Callable[[nn.Module], SGD]) -> None:
    model = copied(shared(kind))
    (said,) = step(model, rule(model))
    assert BY_NAME[rule] in said


def test_a_copy_inside_another_module_has_the_names_of_the_original() -> None:
    model = AveragedModel(shared()).module
    around = nn.ModuleDict({"student": shared(), "teacher": copy.deepcopy(model)})
    for part in (model, around["teacher"]):
        assert step(part, frozen_backbone(part))[0].startswith("the parameters of backbone are frozen")


# ------------------------------------------------------------------------------------------- two optimizers


def test_an_optimizer_that_takes_no_more_steps_is_no_second_one() -> None:
    model = shared()
    first = SGD(model.parameters(), 0.1)
    assert not step(model, first)
    second = SGD([{"params": of(model, "backbone", False)}, {"params": [model.backbone[0].bias]}], 0.1)
    left = SGD([model.backbone[2].bias], 0.1)
    for _ in range(3):
        assert not step(model, second)
    assert step(model, first)[0].startswith("two optimizers hold the bank")
    assert not step(model, first)
    del left


def _zero(rank: int, world_size: int) -> list[str]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = share(Biased(), 0.4)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)
    said = []
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(torch.randn(4, 12)).square().mean().backward()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            optimizer.step()
        said += [str(warning.message) for warning in seen]
    return said


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_optimizer_inside_another_one_is_no_second_one() -> None:
    assert run_ranks(_zero, 2) == [[], []]


# ------------------------------------------------------------------------------------------- Lightning


@pytest.mark.filterwarnings("ignore")
def test_lightning_freezes_a_part_without_parameters() -> None:
    finetuning = pytest.importorskip("lightning.pytorch.callbacks").BaseFinetuning
    model: Any = nn.Module()
    model.embed, model.head = nn.Embedding(50, 16), nn.Linear(16, 50)
    share(model, 0.3, mapping="single")
    bank = model.dist_ssn.all
    for part in (model.embed, [model.embed]):
        finetuning.freeze(part)
        assert [bank.weight_name(index) for index in bank.frozen] == ["embed.weight"]
        with pytest.warns(UserWarning, match=r"has frozen embed\.weight, but other weights train their bank"):
            SGD(trainable(model), 0.1).step()
        finetuning.make_trainable(part)
        assert not bank.frozen
    finetuning.freeze(model)
    assert not trainable(model)
    finetuning.make_trainable(model)
    assert all(p.requires_grad for p in model.parameters()) and not bank.frozen
    list(finetuning.filter_params(model))
    assert not bank.frozen
