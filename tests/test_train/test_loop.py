"""Training end to end, on small data: ranks agree, runs go on exactly, what goes wrong stops all with one sentence."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import dist_ssn
from dist_ssn.comm.ledger import merged_rows
from dist_ssn.errors import CheckpointError, RecipeError, UserError
from dist_ssn.train import run_lock
from dist_ssn.train.checkpoint.folder import checkpoints
from dist_ssn.train.loop import RunResult, train
from dist_ssn.train.optim import build_optimizer, build_schedule, fast_forward, learning_rate_factor
from dist_ssn.train.recipe.schema import Recipe
from dist_ssn.train.recipe.sections import CheckpointConfig, DataConfig, OptimizerConfig, ScheduleConfig, ShareConfig
from testing.ranks import RanksFailed, run_ranks


class Net(nn.Module):
    """A small model of text, which can have an accident in one forward of training on one rank."""

    def __init__(self, dropout: float, norm: bool, accident: str | None, at: int, rank: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 16)
        self.norm = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 256))
        self.accident, self.at, self.rank, self.forwards = accident, at, rank, 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.forwards += self.training
        logits = self.layers(self.norm(self.embedding(tokens).flatten(0, 1))).view(*tokens.shape, 256)
        here = dist.get_rank() if dist.is_initialized() else 0
        if self.training and self.forwards == self.at and here == self.rank:
            ACCIDENTS[self.accident or "none"](logits)
        return logits


def _stop_for(seconds: int) -> None:
    """SIGSTOP to this process, and SIGCONT after a while."""
    later = f"sleep {seconds}; kill -CONT {os.getpid()} 2>/dev/null"
    subprocess.Popen(["sh", "-c", later], start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)


ACCIDENTS: dict[str, Callable[[torch.Tensor], object]] = {
    "none": lambda logits: None,
    "kill": lambda logits: os.kill(os.getpid(), signal.SIGKILL),
    "nan": lambda logits: logits.data.fill_(math.nan),
    "term": lambda logits: os.kill(os.getpid(), signal.SIGTERM),
    "stop": lambda logits: _stop_for(8),
    "raise": lambda logits: [][len(logits)],
    "sleep": lambda logits: time.sleep(8),
    "infinite gradient": lambda logits: logits.register_hook(lambda gradient: gradient * math.inf),
}


def build(
    context: int, dropout: float = 0.0, norm: bool = False, accident: str | None = None, at: int = 0, rank: int = 0
) -> nn.Module:
    return Net(dropout, norm, accident, at, rank)


def recipe(output: Path | str, **changes: Any) -> Recipe:
    model_args = {"context": 8} | changes.pop("model_args", {})
    base = Recipe(
        name="small",
        output=str(output),
        model=f"{__name__}.build",
        model_args=model_args,
        share=ShareConfig(budget=0.5),
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup=2),
        steps=12,
        batch_size=16,
        evaluate_every=5,
        evaluate_batches=4,
    )
    return replace(base, **changes)


def outcome(result: RunResult) -> dict[str, Any]:
    """What two runs can be compared by."""
    tensors = {name: tensor.clone() for name, tensor in result.model.state_dict().items()}
    return {"row": result.row, "summary": result.summary, "tensors": tensors}


def run(rank: int, world_size: int, recipes: list[Recipe]) -> list[dict[str, Any]]:
    return [outcome(train(recipe, progress=False)) for recipe in recipes]


def alone(recipe: Recipe) -> dict[str, Any]:
    return run(0, 1, [recipe])[0]


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, tensor in one["tensors"].items():
        assert torch.equal(tensor, other["tensors"][name]), name
    assert one["row"]["validation_loss"] == other["row"]["validation_loss"]
    assert [point["validation_loss"] for point in one["row"]["history"]] == [
        point["validation_loss"] for point in other["row"]["history"]
    ]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- what a run leaves behind


def test_a_run_learns_and_tells(tmp_path: Path) -> None:
    digits = replace(
        recipe(tmp_path, steps=60, evaluate_every=30, data=DataConfig(name="digits"), model="wide_resnet"),
        model_args={"depth": 10, "width": 1},
    )
    result = train(digits, progress=False)
    row = result.row
    assert row["validation_accuracy"] > 0.5
    trainable = [p for p in result.model.parameters() if p.requires_grad]
    assert row["parameters"] == sum(p.numel() for p in trainable)
    # AdamW keeps two moments of four bytes a number, and a step count of four bytes a tensor.
    assert row["optimizer_bytes"] == 8 * row["parameters"] + 4 * len(trainable)
    assert (row["bytes_per_step_logical"], row["bytes_per_step_ring"], row["total_bytes"]) == (0, 0, 0)
    assert row["ms_per_step"] > 0
    assert [point["step"] for point in row["history"]] == [30, 60]
    assert json.loads((result.folder / "summary.json").read_text())["rows"] == [row]
    steps = [line for line in lines(result.folder) if "step" in line]
    assert [line["step"] for line in steps] == [30, 50, 60]
    assert steps[-1]["train_loss"] < 0.7 * steps[0]["train_loss"]
    assert steps[-1]["learning_rate"] == pytest.approx(1e-3, rel=0.01)
    plan = dist_ssn.Plan.from_json((result.folder / "plan.json").read_text())
    assert plan == dist_ssn.shared_plan(result.model)
    assert {line["table"] for line in lines(result.folder) if "table" in line} == {"plan", "ledger"}


def test_a_plan_file_rebuilds_the_run(tmp_path: Path) -> None:
    first = train(recipe(tmp_path, name="first"), progress=False)
    from_plan = ShareConfig(plan=str(first.folder / "plan.json"))
    second = train(recipe(tmp_path, name="second", share=from_plan), progress=False)
    assert_equal(outcome(first), outcome(second))


def test_starting_anew_sets_the_former_run_aside(tmp_path: Path) -> None:
    train(recipe(tmp_path), progress=False)
    train(recipe(tmp_path, seed=1), progress=False)
    train(recipe(tmp_path, seed=2), progress=False)
    seeds = [
        json.loads((tmp_path / folder / "recipe.json").read_text())["seed"]
        for folder in ("old/small.1", "old/small.2", "small")
    ]
    assert seeds == [0, 1, 2]
    assert (tmp_path / "old/small.1/checkpoints/step-00000012").is_dir()


def test_the_folder_of_a_run_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    result = train(recipe(tmp_path))
    assert not (result.folder / run_lock.FILE).exists()
    other = os.open(result.folder / run_lock.FILE, os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    os.write(other, b"process 7 on a")
    for resume in (False, True):
        with pytest.raises(
            UserError, match=r"is the folder of a run that is going on \(process 7 on a\): give another name"
        ):
            train(recipe(tmp_path, checkpoint=CheckpointConfig(resume=resume)))
    assert not (tmp_path / "old").exists()
    os.close(other)
    train(recipe(tmp_path))


def test_a_sober_line_at_evaluations_where_nobody_looks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(recipe(tmp_path))
    printed = capsys.readouterr().out.splitlines()
    assert "\x1b" not in "".join(printed), "control characters"
    assert [line.split(" · ")[0] for line in printed[:3]] == [f"small: step {step}/12" for step in (5, 10, 12)]
    assert len(printed) == 4 and str(tmp_path / "small") in printed[3]
    train(recipe(tmp_path, name="silent"), progress=False)
    assert capsys.readouterr().out == ""


def test_accumulation_and_bf16(tmp_path: Path) -> None:
    whole = train(recipe(tmp_path, name="whole"), progress=False)
    parts = train(recipe(tmp_path, name="parts", accumulation=4), progress=False)
    assert parts.row["validation_loss"] == pytest.approx(whole.row["validation_loss"], rel=1e-5)
    full = train(recipe(tmp_path, name="full", evaluate_batches=1), progress=False)
    half = train(recipe(tmp_path, name="half", precision="bf16", evaluate_batches=1), progress=False)
    assert half.row["validation_loss"] == pytest.approx(full.row["validation_loss"], rel=0.05)
    loss = half.row["validation_loss"]
    assert loss != torch.tensor(loss).bfloat16().item(), "the validation loss itself was computed in bf16"
    assert all(p.dtype == torch.float32 for p in half.model.parameters())


def test_it_stops_when_evaluations_no_longer_improve(tmp_path: Path) -> None:
    never_moves = OptimizerConfig(lr=math.ulp(0.0))
    stopped = train(recipe(tmp_path, optimizer=never_moves, evaluate_every=2, patience=2), progress=False)
    assert (stopped.summary["steps"], stopped.summary["stopped_early"]) == (6, True)
    # Resumed, it has nothing left to do, and says the same.
    resume = CheckpointConfig(resume=True)
    again = train(
        recipe(tmp_path, optimizer=never_moves, evaluate_every=2, patience=2, checkpoint=resume), progress=False
    )
    assert again.row == stopped.row


def test_a_run_that_goes_on_from_where_it_ends_is_evaluated_there(tmp_path: Path) -> None:
    constant = ScheduleConfig("constant")
    made = recipe(
        tmp_path, name="made", steps=20, evaluate_every=5, schedule=constant, checkpoint=CheckpointConfig(every=7)
    )
    train(made, progress=False)
    shutil.rmtree(tmp_path / "made" / "checkpoints" / "step-00000020")
    ended = train(replace(made, steps=14, checkpoint=CheckpointConfig(every=7, resume=True)), progress=False)
    whole = train(replace(made, name="whole", steps=14), progress=False)
    assert ended.row["validation_loss"] == whole.row["validation_loss"]
    assert [point["step"] for point in ended.row["history"]] == [5, 10, 14]


# ---------------------------------------------------------------- ranks


@pytest.mark.distributed
def test_two_ranks_equal_one_and_send_only_the_trainable_numbers(tmp_path: Path) -> None:
    single = alone(recipe(tmp_path, name="alone"))
    recipes = [recipe(tmp_path, name="together"), recipe(tmp_path, name="norm", model_args={"norm": True})]
    (first, first_norm), (second, second_norm) = run_ranks(run, 2, recipes)
    assert_equal(first, second)
    for name, tensor in single["tensors"].items():
        # Relative to the whole tensor: Adam magnifies rounding in gradients that are all but zero.
        assert (tensor.double() - first["tensors"][name]).norm() <= 1e-5 * tensor.double().norm(), name
    assert first["row"]["validation_loss"] == pytest.approx(single["row"]["validation_loss"], rel=1e-6)
    # Ring of two: 2 (n - 1) / n = 1.
    assert first["row"]["bytes_per_step_logical"] == 4 * first["row"]["parameters"]
    assert first["row"]["bytes_per_step_ring"] == 4 * first["row"]["parameters"]
    purposes = first["summary"]["ring_bytes_by_purpose"]
    assert purposes["gradients"] == 12 * 4 * first["row"]["parameters"]
    assert first["row"]["total_bytes"] == sum(purposes.values())
    assert purposes["metrics"] + purposes["checkpoint"] + purposes["other"] < 1000
    # Running statistics are part of what a step sends, and equal on all ranks when they are saved.
    assert_equal(first_norm, second_norm)
    statistics = 4 * 16 * 2 + 8  # mean, variance, number of batches
    assert first_norm["row"]["bytes_per_step_logical"] == 4 * first_norm["row"]["parameters"] + statistics


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_and_resumed_it_ends_bit_equal(tmp_path: Path, world_size: int) -> None:
    """Dropout, running statistics, momentum and schedule all come back; -9 leaves no time to tidy up."""
    args = {"dropout": 0.3, "norm": True}
    every = CheckpointConfig(every=4)
    dies = args | {"accident": "kill", "at": 11, "rank": world_size - 1}
    recipes = [
        recipe(tmp_path, name="whole", model_args=args, checkpoint=every),
        recipe(tmp_path, name="dies", model_args=dies, checkpoint=every),
    ]
    with pytest.raises(RanksFailed, match="died without a word"):
        run_ranks(run, world_size, recipes)
    whole, killed = tmp_path / "whole", tmp_path / "dies"
    # The checkpoint of step 8 is written in the background: the kill may come before it is whole.
    kept = [path.name for path in checkpoints(killed / "checkpoints")]
    assert kept in (["step-00000004"], ["step-00000004", "step-00000008"])
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "half a li')
    # The accident has number 11 of a process's forwards: after 4 or 8 steps made by another it never comes.
    going_on = replace(recipes[1], checkpoint=CheckpointConfig(every=4, resume=True))
    ((resumed, *_), *_) = run_ranks(run, world_size, [going_on])
    for name in ("model.safetensors", "optimizer.safetensors"):
        ends = [load_file(folder / "checkpoints" / "step-00000012" / name) for folder in (whole, killed)]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())
    summary = json.loads((whole / "summary.json").read_text())
    losses = [
        [point["validation_loss"] for point in rows[0]["history"]]
        for rows in (summary["rows"], resumed["summary"]["rows"])
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    steps = [line["step"] for line in lines(killed) if "step" in line]
    assert steps == [line["step"] for line in lines(whole) if "step" in line] == [4, 5, 8, 10, 12]
    # What both processes sent is in the account; what was sent between the checkpoint and the kill is not.
    gradients = [part["ring_bytes_by_purpose"].get("gradients", 0) for part in (summary, resumed["summary"])]
    assert gradients[0] == gradients[1] and (gradients[0] > 0) == (world_size > 1)
    assert resumed["row"]["bytes_per_step_logical"] == summary["rows"][0]["bytes_per_step_logical"]


@pytest.mark.distributed
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    constant = ScheduleConfig("constant", warmup=2)
    whole = alone(recipe(tmp_path, name="whole", schedule=constant))
    resume = CheckpointConfig(resume=True)
    started = recipe(tmp_path, steps=4, schedule=constant)
    alone(started)
    run_ranks(run, 2, [replace(started, steps=8, checkpoint=resume)])
    ended = train(replace(started, steps=12, checkpoint=resume))
    checkpoint, changed, *_ = capsys.readouterr().out.splitlines()
    assert checkpoint == f"small: goes on from {tmp_path / 'small' / 'checkpoints' / 'step-00000008'}"
    assert changed == "small: it goes on with other settings than before: steps was 8 and is 12"
    assert ended.row["validation_loss"] == pytest.approx(whole["row"]["validation_loss"], rel=1e-5)
    assert ended.summary["ring_bytes_by_purpose"]["gradients"] == 4 * 4 * ended.row["parameters"]


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.distributed
def test_what_goes_wrong_on_one_rank_stops_all_with_the_same_sentence(tmp_path: Path) -> None:
    alone(recipe(tmp_path / "rank0"))
    told = run_ranks(_sentences, 2, str(tmp_path))
    assert told[0] == told[1]
    not_finite, not_saved, not_shared = told[0]
    # Step 8 fails, the check comes at 10, and no checkpoint is written in between or after.
    assert "training loss became nan in step 8;" in not_finite
    checkpoints = tmp_path / "small" / "checkpoints"
    assert f"the last checkpoint is {checkpoints / 'step-00000005'}" in not_finite
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000005"]
    assert "cannot write the checkpoint" in not_saved
    assert "find a checkpoint of step 12" in not_shared and "others of step 0" in not_shared


def _sentences(rank: int, world_size: int, output: str) -> list[str]:
    accident = {"accident": "nan", "at": 8, "rank": 1}
    told = [sentence_of(recipe(output, model_args=accident, checkpoint=CheckpointConfig(every=5)))]
    if rank == 0:  # a file is where the folder of checkpoints belongs
        (Path(output) / "blocked").mkdir()
        (Path(output) / "blocked" / "checkpoints").write_text("")
    told.append(sentence_of(recipe(output, name="blocked")))
    told.append(sentence_of(recipe(f"{output}/rank{rank}", checkpoint=CheckpointConfig(resume=True))))
    # The folder's name has the rank in it; the sentence is that of the rank that says it, so cut the name out.
    told[-1] = told[-1].replace(f"rank{rank}", "rank")
    return told


def sentence_of(recipe: Recipe) -> str:
    with pytest.raises(UserError) as caught:
        train(recipe, progress=False)
    return str(caught.value)


def test_parameters_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    """The loss of the last step was still finite: only its update was not."""
    with pytest.raises(UserError, match=r"after step \d+ \S+ is not finite.*no checkpoint was written before"):
        train(recipe(tmp_path, steps=3, model_args={"accident": "infinite gradient", "at": 3}), progress=False)
    assert not (tmp_path / "small" / "checkpoints").exists()


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    train(recipe(tmp_path), progress=False)
    other = recipe(tmp_path, share=ShareConfig(budget=0.25), checkpoint=CheckpointConfig(resume=True))
    with pytest.raises(CheckpointError, match="of another plan"):
        train(other, progress=False)
    assert json.loads((tmp_path / "small" / "recipe.json").read_text())["share"]["budget"] == 0.5


def test_bad_recipes_and_outputs(tmp_path: Path) -> None:
    for changes, sentence in (
        ({"batch_size": 15, "accumulation": 2}, "batch_size must be divisible"),
        ({"schedule": ScheduleConfig(warmup=99)}, "schedule.warmup must be at most the 12 steps"),
        ({"share": ShareConfig(plan="nowhere.json")}, "nowhere.json"),
    ):
        with pytest.raises(UserError, match=sentence):
            train(recipe(tmp_path, **changes), progress=False)
    (tmp_path / "small").write_text("")
    with pytest.raises(UserError, match="cannot write to the run's folder"):
        train(recipe(tmp_path), progress=False)


# ---------------------------------------------------------------- optimizer and schedule


@pytest.mark.parametrize(
    "config",
    [
        ScheduleConfig("constant", warmup=3),
        ScheduleConfig("cosine", warmup=3, final=0.1),
        ScheduleConfig("step", warmup=1, milestones=(4, 7), gamma=0.5),
    ],
)
def test_a_schedule_can_be_entered_anywhere(config: ScheduleConfig) -> None:
    def fresh() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = build_optimizer(nn.Linear(3, 3), OptimizerConfig(lr=0.3))
        return optimizer, build_schedule(optimizer, config, 10)

    walked, schedule = fresh()
    for step in range(10):
        jumped, entered = fresh()
        fast_forward(entered, step)
        rates = [group["lr"] for group in walked.param_groups]
        assert (
            rates
            == [group["lr"] for group in jumped.param_groups]
            == [0.3 * learning_rate_factor(config, step, 10)] * 2
        )
        for optimizer, its in ((walked, schedule), (jumped, entered)):
            optimizer.step()
            its.step()
        assert walked.param_groups[0]["lr"] == jumped.param_groups[0]["lr"]


def test_the_values_of_the_schedules() -> None:
    cosine = ScheduleConfig("cosine", warmup=4, final=0.2)
    assert [learning_rate_factor(cosine, step, 24) for step in (0, 3, 4, 14, 24)] == pytest.approx(
        [0.25, 1, 1, 0.6, 0.2]
    )
    steps = ScheduleConfig("step", milestones=(2, 5), gamma=0.1)
    assert [learning_rate_factor(steps, step, 9) for step in (1, 2, 4, 5)] == pytest.approx([1, 0.1, 0.1, 0.01])


def test_optimizers_follow_the_config_and_decay_only_what_should() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    adamw = build_optimizer(model, OptimizerConfig("adamw", lr=0.2, weight_decay=0.5, betas=(0.8, 0.9)))
    assert {group["weight_decay"]: len(group["params"]) for group in adamw.param_groups} == {0.5: 1, 0.0: 3}
    assert adamw.param_groups[0]["betas"] == (0.8, 0.9)
    sgd = build_optimizer(model, OptimizerConfig("sgd", momentum=0.0))
    assert isinstance(sgd, torch.optim.SGD) and not sgd.param_groups[0]["nesterov"]
    with pytest.raises(RecipeError, match="known are adamw, sgd"):
        OptimizerConfig("adam")
    with pytest.raises(RecipeError, match="known are constant, cosine, step"):
        ScheduleConfig("linear")


def test_ledgers_add_up() -> None:
    before = [{"purpose": "gradients", "collective": "all_reduce", "operations": 2, "ring_bytes": 8.0, "seconds": None}]
    now = [
        {"purpose": "gradients", "collective": "all_reduce", "operations": 1, "ring_bytes": 4.0, "seconds": 0.5},
        {"purpose": "metrics", "collective": "all_reduce", "operations": 1, "ring_bytes": 1.0, "seconds": 0.5},
    ]
    merged = merged_rows(before, now)
    assert merged[0] == before[0] | {"operations": 3, "ring_bytes": 12.0}
    assert merged[1] == now[1]
