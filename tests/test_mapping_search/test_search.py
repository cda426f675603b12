"""Searching end to end on small models: every method, the budget that is kept, the kill that loses one trial, the mistakes."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import dist_ssn
from dist_ssn.cli.entry import main
from dist_ssn.engines import World
from dist_ssn.errors import RecipeError, UserError
from dist_ssn.mapping_search import auto, search_recipe
from dist_ssn.mapping_search.aligned import aligned_plan
from dist_ssn.mapping_search.methods import METHODS, Cosines, sensitivity
from dist_ssn.mapping_search.recipe_job import RecipeJob, shortened
from dist_ssn.mapping_search.run import _key, run
from dist_ssn.mapping_search.setting import Options, Setting, Wanted
from dist_ssn.mapping_search.short import ShortRun
from dist_ssn.mapping_search.trials import Trials
from dist_ssn.model.specs import find_specs
from dist_ssn.plan import Plan
from dist_ssn.report.picture import draw_plan, plan_picture
from dist_ssn.sharing.bank import Bank
from dist_ssn.train.loop import train
from dist_ssn.train.models import build_model
from dist_ssn.train.recipe.read import load_recipe
from dist_ssn.train.recipe.schema import Recipe
from testing.ranks import run_ranks

ARGS = {"layers": 2, "width": 16, "heads": 2, "context": 16}
SMALL = [
    *(f"model_args={json.dumps(ARGS)}", "steps=40", "batch_size=4", "evaluate_batches=2", "threads=1"),
    *("share.budget=30%", "optimizer.lr=0.01", "schedule.warmup=4"),
]
ALONE = World(0, 1, 0, torch.device("cpu"))


def recipe(*more: str) -> Recipe:
    return load_recipe(None, [*SMALL, *more])


def groups_of(plan: Plan) -> set[frozenset[str]]:
    return {frozenset(slot.name for slot in group.slots) for group in plan.groups}


OPTIONS: dict[str, dict[str, Any]] = {
    "network": {"cluster": "ethernet-1g"},
    "pretrain": {"short_steps": 4},
    "gradients": {"short_steps": 4},
}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "manual"])
def test_each_method_finds_a_plan_that_train_takes(method: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    options = OPTIONS.get(method, {})
    plan = search_recipe(recipe(), method, output=file, **options)
    assert Plan.from_json(file.read_text()) == plan
    names = {weight.name for weight in find_specs(build_model("gpt", ARGS)).weights}
    assert {slot.name for _, slot in plan.slots()} == names
    assert 0.98 * plan.budget <= plan.parameters <= plan.budget
    if method != "network":  # whose compute is measured
        assert search_recipe(recipe(), method, **options) == plan
    settings = [*SMALL, "steps=2", "schedule.warmup=0", "share.budget=null", f"share.plan={file}", f"output={tmp_path}"]
    row = train(load_recipe(None, settings), progress=False).row
    assert row["parameters"] == plan.parameters + find_specs(build_model("gpt", ARGS)).own_parameters


@pytest.mark.parametrize("method", ["weights-free", "pretrain", "gradients", "random", "network"])
def test_the_number_of_groups_can_be_given(method: str) -> None:
    assert len(search_recipe(recipe(), method, groups=3, **OPTIONS.get(method, {})).groups) == 3


def test_the_budget_can_follow_sensitivity() -> None:
    found = sensitivity(
        Setting(RecipeJob(recipe(), ALONE), ALONE, find_specs(build_model("gpt", ARGS)), Wanted("30%"), Options())
    )
    assert all(0.25 <= value <= 4 for value in found.values()) and len(set(found.values())) > 3
    settings = "share.mapping={'blocks.*.mlp.*': b, '*': a}"
    plain, split = (search_recipe(recipe(settings), "manual", split=split) for split in ("size", "sensitivity"))
    asked = {
        group.name: sum(slot.numel * found[slot.name] for slot in group.slots) / group.numel for group in split.groups
    }
    more = max(asked, key=lambda name: asked[name])
    before, after = ({group.name: group.size for group in plan.groups} for plan in (plain, split))
    assert after[more] > before[more] and split.parameters <= split.budget == plain.budget
    assert groups_of(plain) == groups_of(split)


def test_manual_is_the_recipes_own_mapping() -> None:
    plan = search_recipe(recipe("share.mapping={'blocks.*': deep, '*': rest}"), "manual")
    assert [group.name for group in plan.groups] == ["rest", "deep"]


def test_random_follows_the_seed_of_sharing() -> None:
    first, second = (groups_of(search_recipe(recipe(f"share.seed={seed}"), "random")) for seed in (0, 1))
    assert first != second


def test_gradients_part_layers_that_conflict_and_join_those_that_agree() -> None:
    """Three weights read one bank; the losses pull the first two the same way, and the third against them."""
    model = torch.nn.Sequential(*(torch.nn.Linear(6, 6, bias=False) for _ in range(3)))
    plan = aligned_plan(find_specs(model), 60, 2, 0)
    dist_ssn.share(model, plan=plan)
    (bank,) = [module for module in model.modules() if isinstance(module, Bank)]
    with torch.no_grad():
        assert bank.coefficients is not None
        bank.coefficients.copy_(torch.ones(6))
    bank.watcher = cosines = Cosines(bank)
    pull = torch.randn(6, 6)
    for _ in range(2):
        weights: list[Any] = [layer.weight for layer in model.children()]
        a, b, c = weights
        ((a + 2 * b - c) * pull).sum().backward()
    mean = cosines.mean().numpy()
    assert np.allclose(mean, [[1, 1, -1], [1, 1, -1], [-1, -1, 1]], atol=1e-4) and cosines.passes == 2


@pytest.mark.parametrize("more", [(), ("accumulation=2", "schedule.warmup=0", "precision=bf16")])
def test_a_short_run_is_the_beginning_of_train(more: tuple[str, ...], tmp_path: Path) -> None:
    here = recipe("steps=5", *more)
    short = ShortRun(RecipeJob(here, ALONE), ALONE, dist_ssn.make_plan(build_model("gpt", ARGS), "30%"), 5)
    short.run(5)
    row = train(load_recipe(None, [*SMALL, "steps=5", *more, f"output={tmp_path}"]), progress=False).row
    assert short.validation_loss() == pytest.approx(row["validation_loss"], abs=1e-9)


def test_a_schedule_is_shortened_with_the_run() -> None:
    long = recipe("steps=100", "schedule.warmup=10", "schedule.name=step", "schedule.milestones=[50, 80]")
    short = shortened(long, 20)
    assert (short.steps, short.schedule.warmup, short.schedule.milestones) == (20, 2, (10, 16))


# -------------------------------------------------------------------------------------------------------------- auto


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_auto_keeps_its_budget_of_steps_and_takes_the_best(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    plan = search_recipe(recipe(), output=file, max_steps=110, short_steps=4)
    lines = lines_of(tmp_path / "plan.trials.jsonl")
    trials = [line for line in lines if line["kind"] == "trial"]
    assert 55 < sum(line["steps"] for line in lines) <= 110
    last = [line for line in trials if line["rung"] == max(line["rung"] for line in trials)]
    assert plan.fingerprint == min(last, key=lambda line: line["loss"])["plan"]
    assert len({line["plan"] for line in trials}) > 3 and Plan.from_json(file.read_text()) == plan
    again = search_recipe(recipe(), output=tmp_path / "again.json", max_steps=110, short_steps=4)
    assert again == plan  # and the same trials, but for their seconds
    repeated = lines_of(tmp_path / "again.trials.jsonl")
    assert [{**line, "seconds": 0} for line in repeated] == [{**line, "seconds": 0} for line in lines]


@pytest.mark.slow
def test_a_killed_search_loses_the_trial_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = search_recipe(recipe(), output=tmp_path / "whole.json", max_steps=150, short_steps=4)
    steps = sum(line["steps"] for line in lines_of(tmp_path / "whole.trials.jsonl"))
    made: list[int] = []
    step = ShortRun.step

    def counted(self: ShortRun) -> None:
        if len(made) == 70:
            raise KeyboardInterrupt
        made.append(1)
        step(self)

    monkeypatch.setattr(ShortRun, "step", counted)
    with pytest.raises(KeyboardInterrupt):
        search_recipe(recipe(), output=tmp_path / "plan.json", max_steps=150, short_steps=4)
    file = tmp_path / "plan.trials.jsonl"
    kept = lines_of(file)
    file.write_text(file.read_text() + '{"search": "torn')  # the kill may also come while a line is written
    done = sum(line["steps"] for line in kept)
    longest = max(line["steps"] for line in lines_of(tmp_path / "whole.trials.jsonl"))
    assert 70 - longest < done <= 70 and not (tmp_path / "plan.json").exists()
    made[:] = [1] * 1000  # no kill any more
    assert search_recipe(recipe(), output=tmp_path / "plan.json", max_steps=150, short_steps=4) == whole
    assert len(made) - 1000 == steps - done
    assert lines_of(file)[: len(kept)] == kept


def test_another_recipe_does_not_take_over_trials(tmp_path: Path) -> None:
    file = str(tmp_path / "trials.jsonl")
    for lr in (0.01, 0.02):
        search_recipe(recipe(f"optimizer.lr={lr}"), max_steps=20, trials=file)
    trials = [line for line in lines_of(Path(file)) if line["kind"] == "trial"]
    assert len({line["search"] for line in trials}) == 2
    assert len(trials) == 2 * len({(line["mapping"], line["morph"], line["steps"]) for line in trials})


def test_auto_keeps_its_budget_of_seconds(tmp_path: Path) -> None:
    start = time.monotonic()
    plan = search_recipe(recipe("steps=10000"), output=tmp_path / "plan.json", max_seconds=4)
    assert time.monotonic() - start < 6
    trials = [line for line in lines_of(tmp_path / "plan.trials.jsonl") if line["kind"] == "trial"]
    assert plan.fingerprint in {line["plan"] for line in trials}
    schedules = [line for line in lines_of(tmp_path / "plan.trials.jsonl") if line["kind"] == "schedule"]
    assert len(schedules) == 1 and schedules[0]["candidates"] > 1


def test_a_search_that_is_cut_short_takes_the_last_whole_rung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock jumps past the end in the second rung: its only result does not count against those without one."""
    now = [0.0]
    real = ShortRun.validation_loss

    def slow(self: ShortRun) -> float:
        now[0] += 1e6 if self.steps == 16 else 0
        return real(self)

    monkeypatch.setattr(ShortRun, "validation_loss", slow)
    monkeypatch.setattr(auto, "time", SimpleNamespace(monotonic=lambda: now[0]))
    file = tmp_path / "trials.jsonl"
    schedule = {"kind": "schedule", "max_seconds": 1000, "candidates": 4, "first": 8}
    file.write_text(json.dumps({"search": _key(recipe(), 4, 8, "size"), **schedule}) + "\n")
    found: list[dict[str, Any]] = []
    plan = run(recipe(), "auto", None, {"max_seconds": 1000, "trials": str(file), "short_steps": 4}, found.append)
    rungs = [[line for line in found if line.get("rung") == rung] for rung in (0, 1)]
    assert len(rungs[0]) == 4 and len(rungs[1]) == 1
    assert plan.fingerprint == min(rungs[0], key=lambda line: line["loss"])["plan"]


def test_a_diverged_trial_ranks_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ShortRun.validation_loss

    def first_diverges(self: ShortRun) -> float:
        plan = dist_ssn.shared_plan(self.model)
        assert plan is not None
        return float("inf") if len(plan.groups) == 1 else real(self)

    monkeypatch.setattr(ShortRun, "validation_loss", first_diverges)
    plan = search_recipe(recipe(), output=tmp_path / "plan.json", max_steps=100, short_steps=4)
    assert len(plan.groups) > 1
    monkeypatch.setattr(ShortRun, "validation_loss", lambda self: float("inf"))
    with pytest.raises(RecipeError, match=r"every trial diverged: try a lower learning rate"):
        search_recipe(recipe(), max_steps=20)


def test_trials_refuse_what_is_none(tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    file.write_text("nonsense\n{}\n")
    with pytest.raises(UserError, match=r"line 1 of .*trials\.jsonl is not a trial"):
        Trials(file, "key")
    with pytest.raises(UserError, match="cannot be written"):
        Trials(tmp_path / "nowhere" / "trials.jsonl", "key").add(a=1)


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("method", "settings", "options", "wanted"),
    [
        (
            "pretrian",
            (),
            {},
            "unknown method of search 'pretrian': known are auto, gradients, .*; did you mean 'pretrain'",
        ),
        (
            "auto",
            ("share.budget=null",),
            {},
            "share.budget is null, which leaves the model dense, with nothing to search",
        ),
        ("random", ("share.mapping=shape",), {}, "share.mapping is 'shape', and the method random finds a mapping"),
        ("auto", ("share.control=tied",), {}, "share.control is tied, which has no plan to search for"),
        ("auto", (), {"max_steps": 7}, "a budget of 7 steps is too small for one trial, which takes at least 8"),
        ("auto", (), {"max_seconds": 0.001}, "a budget of 0 steps is too small for one trial"),
        ("auto", (), {"max_steps": 9, "max_seconds": 9}, "max_steps and max_seconds are two budgets: give one of them"),
        ("auto", (), {"maxsteps": 9}, "unknown option of search 'maxsteps': .*did you mean 'max_steps'"),
        ("random", (), {"split": "even"}, "unknown split 'even': known are sensitivity, size"),
        ("random", (), {"groups": 0}, "groups must be a number of at least 1, got 0"),
        ("auto", (), {"groups": 3}, "groups goes with the method weights-free or .*, not with auto"),
        ("random", (), {"max_steps": 9}, "max_steps goes with the method auto, not with random"),
        ("network", (), {}, "the method network needs a cluster's file or name"),
        ("network", (), {"cluster": "ethernet-1"}, "the cluster 'ethernet-1' does not exist"),
        (
            "pretrain",
            ("share.budget=60",),
            {},
            "too small to compare 10 weights by 8 templates: use the method weights-free",
        ),
    ],
)
def test_mistakes_are_one_sentence(
    method: str, settings: tuple[str, ...], options: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(UserError, match=wanted) as caught:
        search_recipe(recipe(*settings), method, **options)
    assert "\n" not in str(caught.value)


def test_a_recipe_with_a_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"a search finds a plan: set share\.plan to null"):
        search_recipe(recipe(f"share.plan={tmp_path / 'plan.json'}"))
    with pytest.raises(UserError, match=r"the folder of the output .* does not exist"):
        search_recipe(recipe(), "random", output=tmp_path / "nowhere" / "plan.json")


# ------------------------------------------------------------------------------------------- command line and picture


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    words = [f"--{setting}" for setting in SMALL]
    assert main(["search", *words, "--method=weights-free", "--groups=2", "--output=p.json", "--picture=p.png"]) == 0
    out, err = capsys.readouterr()
    assert not err and "weights-free: 2 groups as asked for" in out and "--share.plan=p.json" in out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert len(Plan.from_json((tmp_path / "p.json").read_text()).groups) == 2
    assert main(["search", *words, "--max-steps", "40", "--output", "q.json"]) == 0
    out, _ = capsys.readouterr()
    assert "validation loss" in out and "best of" in out and (tmp_path / "q.trials.jsonl").exists()
    assert main(["search", *words]) == 2 and "--output needs the plan's file" in capsys.readouterr().err
    assert main(["search", *words, "--output=x.json", "--groups=two"]) == 2
    assert "--groups must be a number, got 'two'" in capsys.readouterr().err
    assert main(["search", *words, "--output=x.json", "--picture=x.jpg"]) == 2
    assert "must end in .png, got 'x.jpg'" in capsys.readouterr().err and not (tmp_path / "x.trials.jsonl").exists()
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    assert "--max-steps" in capsys.readouterr().out


def test_plan_draws_its_mapping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mapping.png"
    words = [*(f"--{setting}" for setting in SMALL), "--share.mapping=depth:2"]
    assert main(["plan", *words, f"--picture={file}"]) == 0
    assert "█" in capsys.readouterr().out and file.stat().st_size > 1000
    assert main(["plan", *words, "--picture=mapping.jpg"]) == 2
    assert "must end in .png" in capsys.readouterr().err


def test_a_picture_of_many_banks(tmp_path: Path) -> None:
    plan = dist_ssn.make_plan(build_model("gpt", {**ARGS, "layers": 8}), "50%", mapping="random:20")
    table = plan_picture(plan)
    assert table.row_count == sum(len(group.slots) for group in plan.groups) + 2  # and two of the split
    assert draw_plan(plan, tmp_path / "many.png").stat().st_size > 1000


# ------------------------------------------------------------------------------------------------------------- ranks


def search_on(rank: int, world_size: int, folder: str) -> list[str]:
    torch.set_num_threads(1)
    found = search_recipe(recipe(), "gradients", short_steps=4)
    best = search_recipe(recipe(), output=f"{folder}/plan.json", short_steps=4, max_steps=40)
    return [found.to_json(), best.to_json()]


@pytest.mark.distributed
def test_ranks_search_together(tmp_path: Path) -> None:
    first, second = run_ranks(search_on, 2, str(tmp_path))
    assert first == second and Plan.from_json((tmp_path / "plan.json").read_text()).to_json() == first[1]
    trials = [line for line in lines_of(tmp_path / "plan.trials.jsonl") if line["kind"] == "trial"]
    search_recipe(recipe(), output=tmp_path / "alone.json", short_steps=4, max_steps=40)
    alone = [line for line in lines_of(tmp_path / "alone.trials.jsonl") if line["kind"] == "trial"]
    assert len(trials) > 1
    for one, two in zip(alone, trials, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-3)


def test_a_picture_says_how_the_budget_is_split() -> None:
    specs = find_specs(build_model("gpt", ARGS))
    first = specs.weights[0]
    mapping = {weight.name: "first" if weight is first else "rest" for weight in specs.weights}
    plan = dist_ssn.make_plan(
        specs, "20%", mapping=mapping, demand={name: 4.0 if name == first.name else 1.0 for name in mapping}
    )
    stream = io.StringIO()
    Console(file=stream, width=200).print(plan_picture(plan))
    numbers, budget = (line.split() for line in stream.getvalue().splitlines()[-2:])
    small, large = plan.groups
    assert numbers[3:] == [f"{group.numel / plan.numel:.0%}" for group in (small, large)]
    assert budget[3:] == [f"{group.parameters / plan.parameters:.0%}" for group in (small, large)]
    assert small.parameters / plan.parameters > 1.5 * small.numel / plan.numel
