"""What a step costs on a link: arithmetic by hand, and messages against what an engine really sends."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dist_ssn
from dist_ssn.cli.entry import main
from dist_ssn.cluster import Link
from dist_ssn.comm import CommMeter
from dist_ssn.cost.fabric import Fabric
from dist_ssn.cost.network import Sent, all_reduce_seconds, exposed_seconds
from dist_ssn.cost.overlap import Message, messages_of, predict
from dist_ssn.cost.timeline import Timeline, measure_timeline
from dist_ssn.engines import DDPEngine
from dist_ssn.plan.overlap import Overlap, parse_overlap
from dist_ssn.train.limit import within_limit
from dist_ssn.train.models.gpt import build_gpt
from dist_ssn.train.recipe.read import load_recipe
from testing.ranks import run_ranks

SLOW = Link(latency_us=1000, bandwidth_mbit=8)  # a byte a microsecond
PAIR = Fabric(2, 1, SLOW, SLOW)


def test_an_all_reduce_by_hand() -> None:
    assert all_reduce_seconds(4000, 4, SLOW) == pytest.approx(6 * 0.001 + 0.006)
    assert all_reduce_seconds(4000, 1, SLOW) == 0


def test_messages_wait_for_each_other() -> None:
    assert exposed_seconds([], 1.0) == 0
    assert exposed_seconds([Sent(0.2, 0.3)], 1.0) == 0
    assert exposed_seconds([Sent(0.2, 1.0), Sent(0.9, 0.5)], 1.0) == pytest.approx(0.7)  # the second starts at 1.2
    assert exposed_seconds([Sent(0.9, 0.5), Sent(0.2, 0.2)], 1.0) == pytest.approx(0.6)  # in their order


def test_messages_that_compute_slows_down() -> None:
    assert exposed_seconds([Sent(0.2, 0.4, drag=0.4)], 1.0) == 0
    assert exposed_seconds([Sent(0.6, 0.4, drag=0.4)], 1.0) == pytest.approx(0.2)  # half of it has travelled by then
    assert exposed_seconds([Sent(1.0, 0.4, drag=0.4)], 1.0) == pytest.approx(
        0.4
    )  # what comes afterwards is undisturbed


def timeline(**ready: float) -> Timeline:
    """Two processes, one step that ends after a second; the second process is 0.1 s behind."""
    late = np.array([[0.0, 0.1]])
    return Timeline({name: when + late for name, when in ready.items()}, 1.0 + late)


def test_a_prediction_by_hand() -> None:
    messages = [Message(250_000, frozenset({"late"})), Message(500_000, frozenset({"late", "early"}))]
    found = predict(messages, Overlap(), timeline(late=0.3, early=0.9), PAIR)
    # From 0.4 to 0.652; then from 1.0, when the slower has the last, to 1.502; ends at 1.0 and at 1.1.
    assert found.exposed == pytest.approx((0.502 + 0.402) / 2)
    assert found.step == pytest.approx(1.502)
    assert (found.rounds, found.payload) == (2, 750_000)
    delayed = predict(messages, parse_overlap("delay"), timeline(late=0.3, early=0.9), PAIR)
    assert delayed.exposed == 0
    delayed = predict([Message(1_250_000, frozenset())], parse_overlap("delay"), timeline(late=0.3), PAIR)
    assert delayed.exposed == pytest.approx(1.254 - 1.05)


def test_a_message_that_is_alone_waits_for_its_receivers_word() -> None:
    """2 rounds of 1 ms: twice on gloo's ring, once where NCCL chooses."""
    alone = [Message(1_250_000, frozenset({"late"}))]
    assert predict(alone, Overlap(), timeline(late=1.0), PAIR).step == pytest.approx(1.1 + 1.254)
    chosen = replace(PAIR, algorithm="best")
    assert predict(alone, Overlap(), timeline(late=1.0), chosen).step == pytest.approx(1.1 + 1.252)


SMALL = "a small bank beside, "
WAYS = ("dense", "none", "depth:2", "segments:3", "sums:2", "delay", f"{SMALL}none", f"{SMALL}segments:3")


def _sent(rank: int, world_size: int, way: str) -> dict[str, Any]:
    """Rounds and bytes of a step, as told beforehand and as metered."""
    torch.manual_seed(0)
    model = build_gpt(vocabulary=64, layers=2, width=96, heads=4, context=16)
    by_depth = way.startswith("depth")
    mapping = way if by_depth else {"positions.*": "small", "*": "large"} if way.startswith(SMALL) else "single"
    if way != "dense":
        dist_ssn.share(model, 0.3, mapping=mapping)
    overlap = parse_overlap("none" if by_depth or way == "dense" else way.removeprefix(SMALL))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tokens = torch.randint(0, 64, (2, 16))

    def loss_of(model: torch.nn.Module) -> torch.Tensor:
        return F.cross_entropy(model(tokens).flatten(0, -2), tokens.flatten())

    times = measure_timeline(model, optimizer, lambda _: loss_of(model), steps=3)
    own = {name: p.numel() for name, p in model.named_parameters() if "dist_ssn." not in name}
    told = messages_of(dist_ssn.shared_plan(model), own, overlap, times)
    engine = DDPEngine(model, optimizer, overlap=overlap)
    for _ in range(4):  # DDP learns the order of gradients in the first
        with CommMeter() as meter:
            engine.backward(loss_of(engine.model))
            engine.step()
    engine.gathered()
    found = meter.totals("gradients")
    ends = bool((times.end > 0).all()) and times.end.shape == (3, world_size)
    return {
        "told": (len(told), sum(m.payload for m in told)),
        "found": (found.operations, found.logical_bytes),
        "ends": ends,
    }


@pytest.mark.distributed
@pytest.mark.parametrize("way", WAYS)
def test_messages_are_those_that_the_engine_sends(way: str) -> None:
    for rank in run_ranks(_sent, 2, way):
        assert rank["told"] == rank["found"]
        assert rank["ends"]


def test_the_timeline_knows_every_weight_and_leaves_nothing_behind() -> None:
    torch.manual_seed(0)
    model = dist_ssn.share(build_gpt(vocabulary=64, layers=2, width=32, heads=4, context=16), 0.2)
    tokens = torch.randint(0, 64, (2, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    times = measure_timeline(model, optimizer, lambda _: model(tokens).square().mean(), steps=2)
    plan = dist_ssn.shared_plan(model)
    assert plan is not None
    names = {slot.name for _, slot in plan.slots()}
    assert names <= set(times.ready) and "norm.bias" in times.ready
    first, last = (times.ready[name].mean() for name in ("blocks.0.attention.out.weight", "blocks.1.mlp.down.weight"))
    assert last < first <= times.end.mean()
    assert all(getattr(module, "watcher", None) is None for module in model.modules())


def test_plan_with_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model_args={layers: 1, width: 32, heads: 2, context: 32}", "--batch_size=8", "--threads=1"]
    arguments = ["plan", "--config", "quickstart", *small, "--engine.overlap=segments:2"]
    assert main([*arguments, "--cluster", "emulated-100mbit", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    rows = {row["way"]: row for row in told["ways"]}
    assert {"dense", "none", "segments:2", "delay"} <= set(rows)
    assert rows["none"]["bytes_per_step_logical"] < 0.2 * rows["dense"]["bytes_per_step_logical"]
    assert 0 < rows["none"]["exposed_ms_per_step"] < rows["dense"]["exposed_ms_per_step"]
    assert main([*arguments, "--cluster=emulated-100mbit"]) == 0
    assert "exposed" in capsys.readouterr().out
    for wrong, said in ((["--cluster"], "needs a value"), (["--cluster=nowhere"], "nowhere")):
        assert main([*arguments, *wrong]) == 2
        assert said in capsys.readouterr().err
    assert main([*arguments, "--share.budget=null", "--cluster=local"]) == 2
    assert "share.budget is null" in capsys.readouterr().err


def test_plan_keeps_a_limit_as_training_does(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model_args={layers: 1, width: 32, heads: 2, context: 32}", "--batch_size=8", "--threads=1"]
    given = ["--config", "quickstart", *small, "--sync.limit=1kB/step"]
    chosen, (said,) = within_limit(load_recipe("quickstart", given[2:]), processes=4)
    assert main(["plan", *given, "--cluster=ethernet-1g", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    own = next(row for row in told["ladder"] if row["own"])
    assert told["chosen"] == [said] and said.startswith(
        "sync.limit 1kB/step: the recipe's own share.budget 10%, sync.every"
    )
    assert (own["every"], own["codec"]) == (chosen.sync.every, chosen.sync.codec)
    assert own["bytes_per_step_ring"] <= 1000
    assert main(["plan", *given, "--cluster=ethernet-1g"]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    assert main(["plan", *given]) == 0
    assert (
        "sync.limit 1kB/step chooses for a number of processes, which --cluster=FILE gives" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            [],
            "sync.limit 1kB/step chooses for a number of processes, which --cluster=FILE gives: add it, or a share.budget",
        ),
        (["--cluster=ethernet-1g", "--sync.limit=9MB/step"], "sync.limit 9MB/step: dense, gradients on every step, "),
        (["--cluster=ethernet-1g", "--sync.limit=1B/step"], "the least that 4 processes send with this recipe is"),
    ],
)
def test_plan_of_a_limit_without_a_budget(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = "--model_args={layers: 1, width: 32, heads: 2, context: 32}"
    given = ["plan", "--config=quickstart", small, "--sync.limit=1kB/step", "--share.budget=null", *options]
    assert main(given) == 2
    assert said in capsys.readouterr().err
