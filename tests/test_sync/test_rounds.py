"""Bytes that are known before a run are those of the ledger after it, exactly."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_ssn
from dist_ssn.errors import RecipeError
from dist_ssn.model.specs import find_specs
from dist_ssn.plan import make_plan
from dist_ssn.sync.codecs import CODECS
from dist_ssn.sync.rounds import Vector, of_round, of_run, parse_limit, rounds_of, shown, vector_of, vector_with
from dist_ssn.sync.trained import trained_parameters
from dist_ssn.train.limit import options_of, sent_per_step, within_limit
from dist_ssn.train.loop import train
from dist_ssn.train.models.gpt import GPT
from dist_ssn.train.recipe.read import load_recipe
from dist_ssn.train.recipe.schema import Recipe
from dist_ssn.train.recipe.sections import CheckpointConfig, EngineConfig, ShareConfig, SyncConfig
from testing.ranks import run_ranks
from tests.test_train.test_loop import build, recipe

CASES = {
    "coded": (SyncConfig(every=5, codec="int4", outer="average"), False),
    "late": (SyncConfig(every=4, codec="sparse", delay=1), False),
    "warm": (SyncConfig(every=3, warmup=2, codec="bins2"), True),
    "plain": (SyncConfig(every=12), True),
    "gradients": (SyncConfig(), False),
    "buffers": (SyncConfig(), True),
}
STEPS = {"coded": [5, 10, 12], "late": [4, 8, 12], "warm": [1, 2, 5, 8, 11, 12], "plain": [12]}
"""Steps after which changes are sent."""


def _trained(rank: int, n: int, output: Path) -> dict[str, dict[str, Any]]:
    made = {
        name: recipe(output, name=name, sync=sync, model_args={"norm": norm}) for name, (sync, norm) in CASES.items()
    }
    made["limited"] = recipe(output, name="limited", share=ShareConfig(), sync=SyncConfig(limit="2kB/step"))
    return {name: train(one, progress=False).summary for name, one in made.items()}


@pytest.mark.distributed
def test_the_ledger_of_a_run_has_the_predicted_bytes(tmp_path: Path) -> None:
    found = run_ranks(_trained, 2, tmp_path)[0]
    for name, (sync, norm) in CASES.items():
        made = recipe(tmp_path, sync=sync)
        model = dist_ssn.share(build(8, norm=norm), 0.5)
        vector = vector_of(model)
        sent = sent_per_step(vector, made, 2, sync.every, sync.codec)
        if sync.warmup:  # the summary leaves out the first step
            sent += of_round(vector, sync.codec, 2).times(-1 / (made.steps - 1))
        row = found[name]["rows"][0]
        assert row["bytes_per_step_logical"] == round(sent.handed), name
        assert row["bytes_per_step_ring"] == round(sent.sent), name
        rounds, row = found[name].get("rounds", []), found[name]["rows"][0]
        assert [one["step"] for one in rounds] == STEPS.get(name, [])
        assert all(one["change_norm"] > 0 for one in rounds)
        said = [one["agreement"] for one in rounds if one["agreement"] is not None]
        assert len(said) == {"coded": 2, "plain": 1}.get(
            name, 0
        )  # not of few bits, nor of a coded round that was cut short
        assert all(-1 <= one <= 1 for one in said) and row.get("agreement") == (sum(said) / len(said) if said else None)
        assert not rounds or 0 < row["waiting"] < 1
    limited = found["limited"]
    chosen = limited["recipe"]
    assert limited["rows"][0]["bytes_per_step_ring"] <= 2000
    assert limited["chosen"][0].startswith("sync.limit 2kB/step: share.budget")
    assert chosen["sync"]["every"] and chosen["share"]["budget"]


def _spoiled(rank: int, n: int, output: Path) -> tuple[list[str], dict[str, Any]]:
    accident = {"accident": "nan", "at": 6, "rank": 1}
    made = recipe(output, sync=SyncConfig(every=4), model_args=accident, checkpoint=CheckpointConfig(every=7))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        summary = train(made, progress=False).summary
    return [str(one.message) for one in caught if "left out" in str(one.message)], summary


@pytest.mark.distributed
def test_a_nan_on_one_worker_costs_its_round_and_not_the_run(tmp_path: Path) -> None:
    """The loss is NaN there from step 6 until the round ends after step 8; others' losses are what the metrics have."""
    ranks = run_ranks(_spoiled, 2, tmp_path)
    for said, summary in ranks:
        assert said == [
            "rank 1 sent a change that is not finite after step 8: it is left out, and goes on from the others' mean"
        ]
        assert [(one["step"], one["left_out"]) for one in summary["rounds"]] == [(4, ""), (8, "1"), (12, "")]
        assert math.isfinite(summary["rows"][0]["validation_loss"])
    logged = [json.loads(line) for line in (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train_loss"] for line in logged if "train_loss" in line]
    assert len(losses) == 4 and all(0 < loss < 10 for loss in losses)


@pytest.mark.parametrize("budget", [0.1, 0.4])
def test_the_vector_of_a_plan_is_that_of_the_shared_model(budget: float) -> None:
    torch.manual_seed(0)
    model = GPT(vocabulary=256, layers=2, width=64, heads=2, context=16, bias=True)
    specs, dense = find_specs(model), vector_of(model)
    planned = vector_with(make_plan(specs, budget), dense, specs)
    shared = dist_ssn.share(model, budget)
    trained = trained_parameters(shared, torch.optim.SGD(shared.parameters(), lr=0.1))
    sizes = [(one.parameter.numel(), one.plain) for one in trained]
    assert planned == vector_of(shared)
    assert (planned.values, planned.plain) == (sum(n for n, _ in sizes), sum(n for n, plain in sizes if plain))


def test_bytes_of_a_round_by_hand() -> None:
    vector = Vector(4096 + 100, 100)
    assert of_round(vector, "int8", 4).handed == (4096 + 2) + (100 + 2) + 48
    assert of_round(vector, "int8", 4).sent == 3 * (4098 + 102 + 48)
    assert of_round(vector, "sparse", 4).handed == 4 + 64 * 12 // 8 + 64 // 4 + (50 + 2) + 48
    assert of_round(vector, "none", 4).sent == 1.5 * 4 * 4196 + 3 * 48
    assert of_round(vector, "int4", 1).sent == 0
    whole, short = (of_run(vector, "int8", 2, steps, 4) for steps in (8, 9))
    assert whole.sent == 2 * of_round(vector, "int8", 2).sent + 2 * 48
    assert short.sent == 3 * of_round(vector, "int8", 2).sent + 48
    assert [rounds_of(10, 4), rounds_of(10, 4, warmup=2), rounds_of(3, 4, warmup=5)] == [3, 4, 3]


@pytest.mark.parametrize(
    ("text", "size"), [("20kB/step", 20_000), ("1.5 MB / step", 1.5e6), ("2KiB/step", 2048), ("1_000B/step", 1000)]
)
def test_limits_are_read(text: str, size: float) -> None:
    assert parse_limit(text) == size
    assert parse_limit(f"{shown(size)}/step") >= size


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("20", "cannot be read: give bytes per step, such as 20kB/step"),
        ("20 parsecs/step", "cannot be read"),
        ("-1kB/step", "cannot be read"),
        ("0kB/step", "must be above 0"),
        ("1MB/s", "is per second, and how long a step takes is known only when it is measured"),
    ],
)
def test_limits_that_are_none(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(sync=SyncConfig(limit=text))
    assert said in str(caught.value)


def test_shown_is_never_too_little() -> None:
    for size in (1, 999.2, 1000, 1433.4, 80_912.7, 1e6, 2.3456e9):
        assert size <= parse_limit(f"{shown(size)}/step") <= 1.01 * size + 1


def _quickstart(**changes: str) -> Recipe:
    return load_recipe("quickstart", [f"--{key.replace('__', '.')}={value}" for key, value in changes.items()])


@pytest.mark.parametrize("limit", ["5kB/step", "300kB/step"])
def test_a_limit_is_kept_and_what_is_given_stays(limit: str) -> None:
    for given in ({}, {"share__budget": "null"}, {"sync__codec": "int8"}, {"sync__every": "60"}):
        made = _quickstart(sync__limit=limit, **given)
        chosen, (said,) = within_limit(made, processes=4)
        sent = [
            one.sent
            for one in options_of(chosen, 4)
            if (one.every, one.codec) == (chosen.sync.every, chosen.sync.codec)
        ]
        assert min(sent) <= parse_limit(limit) and said.startswith(f"sync.limit {limit}: ")
        if "share__budget" not in given:
            assert chosen.share.budget == made.share.budget
        if "sync__codec" in given:
            assert chosen.sync.codec == "int8" and chosen.sync.every is not None
        if "sync__every" in given:
            assert chosen.sync.every == 60
        again, _ = within_limit(chosen, processes=4)
        assert again == chosen  # so that a run that resumes has the same settings


def test_more_bytes_are_not_expected_to_be_worse() -> None:
    losses = []
    for limit in ("3kB/step", "30kB/step", "300kB/step", "3MB/step", "30MB/step"):
        made = _quickstart(sync__limit=limit, share__budget="null")
        chosen, _ = within_limit(made, processes=4)
        found = [
            one.loss
            for one in options_of(made, 4)
            if (one.budget, one.every, one.codec) == (chosen.share.budget, chosen.sync.every, chosen.sync.codec)
        ]
        losses.append(found[0] or math.inf)
    assert losses == sorted(losses, reverse=True) and losses[-1] == 1
    assert chosen.share.budget is None and chosen.sync.every is None  # the whole model's gradients, on every step


def test_a_limit_that_nothing_keeps_says_the_least() -> None:
    made = _quickstart(sync__limit="1B/step")
    with pytest.raises(RecipeError) as caught:
        within_limit(made, processes=4)
    text = str(caught.value)
    least = text.split("send with this recipe is ")[1].split(" (")[0]
    chosen, _ = within_limit(replace(made, sync=SyncConfig(limit=least)), processes=4)
    assert chosen.sync.every == 50


@pytest.mark.parametrize(
    ("given", "ways"),
    [
        ({}, "a smaller share.budget, or a longer period by sync.every"),
        ({"steps": "30", "schedule__warmup": "1"}, "a smaller share.budget, or more steps"),
        ({"steps": "4", "schedule__warmup": "1", "sync__every": "100"}, "a smaller share.budget, or more steps"),
        (
            {"sync__codec": "int8", "sync__warmup": "9"},
            "a smaller share.budget, sync.codec sparse, a shorter sync.warmup, or a longer period by sync.every",
        ),
    ],
)
def test_a_limit_that_nothing_keeps_says_only_what_helps(given: dict[str, str], ways: str) -> None:
    with pytest.raises(RecipeError) as caught:
        within_limit(_quickstart(sync__limit="1B/step", **given), processes=4)
    assert str(caught.value).endswith(f": set sync.limit to that or more, {ways}")


def test_a_limit_is_checked_before_processes_meet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # and no address to meet at
    with pytest.raises(RecipeError, match="the least that 4 processes send"):
        train(recipe(tmp_path, sync=SyncConfig(limit="1B/step")), progress=False)


def test_one_process_keeps_every_limit(tmp_path: Path) -> None:
    made = recipe(tmp_path, sync=SyncConfig(limit="1B/step"))
    assert within_limit(made, processes=1) == (
        made,
        ["sync.limit 1B/step changes nothing: a single process sends nothing"],
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sync": SyncConfig(limit="1kB/step", within="node")}, "sync.limit counts what a process sends, and islands"),
        ({"engine": EngineConfig("fsdp")}, "sync.limit goes with the engine ddp or mpi"),
        ({"engine": EngineConfig(overlap="delay")}, "leave it none with sync.limit"),
    ],
)
def test_what_does_not_go_with_a_limit(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path, **{"sync": SyncConfig(limit="1kB/step")} | changes)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("sync.every=0", "sync.every must be at least 1, got 0"),
        ("sync.codec=int5", "sync.codec is an unknown name 'int5': known are bf16, bins2"),
        ("sync.within=node", "sync.within needs local updates: set sync.every too"),
    ],
)
def test_bad_words_of_a_recipe(key: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", [f"--{key}"])
    assert said in str(caught.value)


def test_every_codec_has_a_word_in_the_table_of_losses() -> None:
    from dist_ssn.sync.losses import CODECS as KNOWN

    assert {*KNOWN, "fp16"} == set(CODECS)
