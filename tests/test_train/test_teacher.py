"""Distillation: the loss by hand, runs with a teacher from a folder or trained first, and what a teacher may not be."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_ssn.engines import World
from dist_ssn.errors import UserError
from dist_ssn.train.build import build
from dist_ssn.train.loop import train
from dist_ssn.train.recipe.read import load_recipe
from dist_ssn.train.recipe.sections import DataConfig, DistillConfig, EngineConfig, PruneConfig, ShareConfig
from dist_ssn.train.teacher import Teacher, load_teacher
from testing.ranks import run_ranks
from tests.test_train.test_loop import alone, assert_equal, outcome, recipe


def net(width: int = 8, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, classes)).double()


def by_hand(told: Tensor, said: Tensor, hidden: Tensor, hidden_told: Tensor, task: Tensor) -> Tensor:
    """The loss with weight 0.3, temperature 4, hidden weight 2."""
    p, log_q = (told / 4).softmax(-1), (said / 4).log_softmax(-1)
    apart = (p * ((told / 4).log_softmax(-1) - log_q)).sum(-1).mean()
    return 0.7 * task + 0.3 * 16 * apart + 2 * ((hidden - hidden_told) ** 2).mean()


def test_the_loss_is_the_formula() -> None:
    torch.manual_seed(0)
    student, model = net(), net()
    teacher = Teacher(DistillConfig("x", 0.3, 4.0, ("1",), 2.0), model, student)
    inputs, targets = torch.randn(7, 6, dtype=torch.float64), torch.randint(5, (7,))
    outputs = student(inputs)
    task = F.cross_entropy(outputs, targets)
    loss = teacher.loss(task, outputs, inputs, targets)
    expected = by_hand(model(inputs), outputs, student[:2](inputs), model[:2](inputs), task)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    parameters = list(student.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters, retain_graph=True), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert student[1]._forward_hooks
    teacher.leave()
    assert not student[1]._forward_hooks and not model[1]._forward_hooks


def test_its_own_twin_has_nothing_to_teach() -> None:
    student, model = net(), net()
    model.load_state_dict(student.state_dict())
    teacher = Teacher(DistillConfig("x", 1.0, 2.0, ("*",), 1.0), model, student)
    inputs, targets = torch.randn(7, 6, dtype=torch.float64), torch.randint(5, (7,))
    outputs = student(inputs)
    assert abs(teacher.loss(F.cross_entropy(outputs, targets), outputs, inputs, targets).item()) < 1e-15


def test_a_teacher_may_be_trained_first_or_lie_in_a_folder(tmp_path: Path) -> None:
    distill = DistillConfig(teacher="dense", weight=0.9, hidden=("layers.0", "emb*"))
    first = alone(recipe(tmp_path / "a", distill=distill))
    twin = alone(recipe(tmp_path / "b", name="small-teacher", share=ShareConfig()))
    second = alone(recipe(tmp_path / "c", distill=replace(distill, teacher=str(tmp_path / "b" / "small-teacher"))))
    assert_equal(first, second)
    plain = alone(recipe(tmp_path / "d"))
    assert plain["row"]["parameters"] == first["row"]["parameters"] < twin["row"]["parameters"]
    assert plain["row"]["validation_loss"] != first["row"]["validation_loss"]


@pytest.mark.parametrize(
    "prune", [PruneConfig(), PruneConfig(final=0.5, what="weights", end=8)], ids=["whole", "pruned"]
)
def test_a_shared_model_teaches_what_it_has_learnt(prune: PruneConfig, tmp_path: Path) -> None:
    """By the plan, the numbers and the thresholds in its folder."""
    learnt = train(recipe(tmp_path, prune=prune), progress=False)
    later = recipe(tmp_path, name="later", share=ShareConfig(budget=0.3), distill=DistillConfig(str(learnt.folder)))
    task, student = build(later, World(0, 1, 0, torch.device("cpu")))
    inputs, targets = task.batch(0, 4)
    outputs = student(inputs)
    loss = load_teacher(later, task, student).loss(task.loss(outputs, targets), outputs, inputs, targets)
    by_hand = Teacher(later.distill, learnt.model, student).loss(task.loss(outputs, targets), outputs, inputs, targets)
    assert torch.equal(loss, by_hand)


def test_all_of_the_teachers_weight_pulls_towards_it(tmp_path: Path) -> None:
    """After as many steps, the student's logits are nearer to the teacher's than those of one that never saw it."""
    teacher = train(recipe(tmp_path, name="dense", share=ShareConfig(), steps=60), progress=False)
    distill = DistillConfig(teacher=str(tmp_path / "dense"), weight=1.0, temperature=1.0)
    taught = train(recipe(tmp_path, name="taught", steps=60, distill=distill), progress=False)
    plain = train(recipe(tmp_path, name="plain", steps=60), progress=False)
    tokens = torch.randint(32, 127, (16, 8), generator=torch.Generator().manual_seed(1))

    def apart(model: nn.Module) -> float:
        with torch.no_grad():
            told, said = (m.eval()(tokens).log_softmax(-1) for m in (teacher.model, model))
        return F.kl_div(said, told, reduction="batchmean", log_target=True).item()

    assert apart(taught.model) < apart(plain.model)


def _train(rank: int, world_size: int, settings: Any) -> dict[str, Any]:
    return outcome(train(settings, progress=False))


def _losses(rank: int, world_size: int, settings: Any) -> list[float]:
    os.environ["LOCAL_RANK"] = str(rank)  # which DeepSpeed wants to read
    return [point["validation_loss"] for point in train(settings, progress=False).row["history"]]


@pytest.mark.distributed
def test_ranks_learn_what_one_process_learns(tmp_path: Path) -> None:
    distill = DistillConfig(teacher="dense", hidden=("layers.0",))
    one = alone(recipe(tmp_path / "one", distill=distill))
    two = run_ranks(_train, 2, recipe(tmp_path / "two", distill=distill))
    plain = run_ranks(_train, 2, recipe(tmp_path / "plain"))
    sent = [ranks[0]["row"]["bytes_per_step_ring"] for ranks in (plain, two)]
    assert sent[0] == sent[1] > 0  # a teacher sends nothing
    for rank in two:
        for name, tensor in one["tensors"].items():
            torch.testing.assert_close(rank["tensors"][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "engine", [EngineConfig(name="fsdp"), EngineConfig(name="deepspeed", stage=3)], ids=lambda e: e.name
)
def test_every_engine_learns_it(engine: EngineConfig, tmp_path: Path) -> None:
    if engine.name == "deepspeed":
        pytest.importorskip("deepspeed", reason="pip install 'dist_ssn[deepspeed]'")
    distill = DistillConfig(teacher="dense", hidden=("layers.0",))
    runs = [
        run_ranks(_losses, 2, recipe(tmp_path / name, engine=kind, distill=distill))[0]
        for name, kind in (("ddp", EngineConfig()), (engine.name, engine))
    ]
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)


def test_a_run_with_a_teacher_goes_on_exactly(tmp_path: Path) -> None:
    distill = DistillConfig(teacher="dense")
    whole = alone(recipe(tmp_path / "whole", distill=distill))
    half = recipe(tmp_path / "half", distill=distill)
    keep = replace(half.checkpoint, every=6, resume=True)
    alone(replace(half, checkpoint=keep))
    newest = tmp_path / "half" / "small" / "checkpoints" / "step-00000012"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()  # as if it had been killed before
    assert_equal(whole, alone(replace(half, checkpoint=keep)))


def test_what_a_teacher_may_not_be(tmp_path: Path) -> None:
    sizes = {"depth": 10, "width": 1}
    images = {"model": "wide_resnet", "data": DataConfig("digits"), "share": ShareConfig()}
    ten = recipe(tmp_path, **images, name="ten", steps=2, evaluate_batches=1)
    ten = replace(ten, model_args=sizes)
    folder = train(ten, progress=False).folder

    def refused(sentence: str, hidden: tuple[str, ...] = (), **changes: int) -> None:
        distill = DistillConfig(teacher=str(folder), hidden=hidden)
        with pytest.raises(UserError, match=sentence):
            train(replace(ten, name="other", model_args={**sizes, **changes}, distill=distill), progress=False)

    refused(r"distill\.teacher: its logits are \(1, 10\) where the model's are \(1, 12\)", classes=12)
    refused(r"distill\.hidden: no module of both models is called 'nobody'; there are stem", ("nobody",))
    refused(r"distill\.hidden: .* returns \(1, .*\) in the model and \(1, .*\) in its teacher", ("*",), width=2)
    theirs = folder / "recipe.json"
    theirs.write_text(theirs.read_text().replace('"wide_resnet"', '"some.function"'))
    refused(
        r"distill\.teacher: its model is 'some\.function', and only a built-in model or this recipe's own \('wide_resnet'\)"
    )
    theirs.write_text("{")
    refused(r"recipe\.json: line 1 cannot be read as JSON")


def test_a_damaged_teacher_is_named(tmp_path: Path) -> None:
    folder = train(recipe(tmp_path, name="one", steps=2), progress=False).folder
    (folder / "checkpoints" / "step-00000002" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is damaged"):
        train(recipe(tmp_path, distill=DistillConfig(teacher=str(folder))), progress=False)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--distill.teacher=nowhere"], "distill.teacher must be dense or the folder of a run"),
        (["--distill.hidden=[a]"], "distill.hidden needs a teacher"),
        (["--distill.teacher=dense", "--distill.weight=1.5"], "distill.weight must be between 0 and 1, got 1.5"),
        (["--distill.temperature=0"], "distill.temperature must be a number above 0, got 0"),
        (["--distill.hidden_weight=-1"], "distill.hidden_weight must be 0 or more, got -1"),
    ],
)
def test_a_wrong_setting_is_named(options: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_recipe(None, options)
