"""Time of a step with rounds, on networks whose times are known by hand."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.parallel import DistributedDataParallel

import dist_ssn
from dist_ssn.cli.entry import main
from dist_ssn.cluster import Link, load_cluster
from dist_ssn.comm import CommMeter
from dist_ssn.cost.fabric import Fabric
from dist_ssn.cost.ladder import Cost, Rungs, cost_of, ladder_of
from dist_ssn.cost.ladder_table import best_of, ladder_table, rows_of
from dist_ssn.cost.measured import Side
from dist_ssn.cost.rates import Rates, measure_rates
from dist_ssn.cost.timeline import measure_timeline
from dist_ssn.engines import DDPEngine
from dist_ssn.plan import make_plan
from dist_ssn.sync.codecs import CODECS
from dist_ssn.sync.losses import measured_losses
from dist_ssn.sync.rounds import Vector, vector_of, vector_with
from dist_ssn.sync.routes import traffic
from dist_ssn.train.models.gpt import build_gpt
from testing.ranks import run_ranks
from tests.test_cost.test_advice import MODEL, NUMBERS, SMALL, SPECS, measured

FREE = Rates(0.0, dict.fromkeys(CODECS, 0.0), dict.fromkeys(CODECS, 0.0))
VECTOR = Vector(NUMBERS, 0)
LATENCY = 0.01
MBIT = 8.0
"""So that a byte takes a microsecond."""
REPORT = 48e-6


def fabric(nodes: int, per_node: int = 1) -> Fabric:
    return Fabric(nodes, per_node, Link(0.0, 1e9), Link(1e6 * LATENCY, MBIT))


def cost(rungs: Rungs, nodes: int, per_node: int = 1, rates: Rates = FREE, compute: float = 1.0) -> Cost:
    side = measured(compute, compute).dense
    return cost_of(rungs, side, None, VECTOR, fabric(nodes, per_node), rates)


def test_a_round_by_hand() -> None:
    packed = CODECS["int8"].packed_bytes(NUMBERS)
    two = cost(Rungs(None, 4, "int8"), 2)  # an all-gather of one round, and the report's
    assert two.exposed == pytest.approx((2 * 2 * LATENCY + REPORT + 1e-6 * packed) / 4)
    assert two.step == pytest.approx(1 + two.exposed)
    assert (two.route, two.messages, two.round_bytes) == ("all-gather", 2, packed + 48)
    assert two.sent_per_step == two.handed_per_step == two.round_bytes / 4
    four = cost(Rungs(None, 4, "int8"), 4)  # all-to-all, all at once; all-gather of the pieces, three rounds
    piece = CODECS["int8"].packed_bytes(NUMBERS // 4)
    network = 2 * LATENCY + 0.75e-6 * packed + 3 * (2 * LATENCY + 1e-6 * piece)
    assert four.route == "two-phase"
    assert four.exposed == pytest.approx((3 * (2 * LATENCY + REPORT) + network) / 4)
    plain = cost(Rungs(None, 4, "none"), 2)  # a ring, and its announcements
    assert plain.exposed == pytest.approx((2 * LATENCY + REPORT + 4 * LATENCY + 4e-6 * NUMBERS) / 4)


def test_a_delayed_exchange_hides_behind_the_next_round() -> None:
    now, late = (cost(Rungs(None, 4, "int8", delay), 2) for delay in (0, 1))
    report = 2 * LATENCY + REPORT
    assert late.exposed == pytest.approx(report / 4)  # four seconds of compute hide it
    assert now.handed_per_step == late.handed_per_step
    longer = cost(Rungs(None, 4, "none", 1), 2, compute=0.1)
    assert longer.exposed == pytest.approx((report + 4 * LATENCY + 4e-6 * NUMBERS - 0.4) / 4)


def test_what_is_computed_in_a_round_is_no_waiting() -> None:
    rates = Rates(1e-7, dict.fromkeys(CODECS, 2e-7), dict.fromkeys(CODECS, 3e-7))
    found = cost(Rungs(None, 4, "int8"), 2, rates=rates)
    assert found.step - 1 - found.exposed == pytest.approx(NUMBERS * (1e-7 + 2e-7 + 2 * 3e-7) / 4)


def test_islands_send_as_often_many_bytes_as_nodes() -> None:
    apart, all_four = (cost(Rungs(None, 4, "int8", islands=islands), 2, 2) for islands in (True, False))
    pair = cost(Rungs(None, 4, "int8"), 2)
    assert apart.sent_per_step == pair.sent_per_step < all_four.sent_per_step
    assert apart.step == pytest.approx(pair.step, rel=0.01)  # the links within a node take nearly nothing
    assert apart.step < all_four.step


def test_without_rounds_it_is_the_ordinary_step() -> None:
    side = measured(1.0, 1.0).dense
    assert cost(Rungs(None, 1), 2).step == side.step(fabric(2)).step
    assert cost(Rungs(None, 1), 2).sent_per_step == 4 * NUMBERS


def test_gradients_in_a_codec_wait_for_their_exchange() -> None:
    rates = Rates(0.0, dict.fromkeys(CODECS, 1e-7), dict.fromkeys(CODECS, 2e-7))
    found = cost(Rungs(None, 1, "int8"), 2, rates=rates)
    side = measured(1.0, 1.0).dense
    buckets = [message.vector for message in side.messages()]
    packed = sum(traffic(CODECS["int8"], one.values, one.plain, 2).packed_bytes for one in buckets)
    assert sum(one.values for one in buckets) == NUMBERS
    assert found.sent_per_step == found.handed_per_step == packed
    # All gradients are ready when backward ends: one message after the other, of two latencies, bytes and coding each.
    assert found.exposed == pytest.approx(len(buckets) * 2 * LATENCY + 1e-6 * packed + NUMBERS * (1e-7 + 2 * 2e-7))
    assert found.step == pytest.approx(1 + found.exposed)


def _hooked(rank: int, world_size: int, budget: float | None) -> tuple[int, float]:
    """Bytes of a step that are handed to collectives, as metered and as predicted."""
    torch.manual_seed(0)
    model = build_gpt(vocabulary=64, layers=2, width=96, heads=4, context=16)
    if budget is not None:
        dist_ssn.share(model, budget)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tokens = torch.randint(0, 64, (2, 16))
    timeline = measure_timeline(model, optimizer, lambda _: model(tokens).square().mean(), steps=2)
    engine = DDPEngine(model, optimizer)
    assert isinstance(engine.model, DistributedDataParallel)
    engine.model.register_comm_hook(*dist_ssn.comm_hook("int4"))
    metered = 0
    for _ in range(4):  # DDP learns the order of gradients in the first
        with CommMeter() as meter:
            engine.backward(engine.model(tokens).square().mean())
            engine.step()
        metered = meter.totals("gradients").logical_bytes
    own = {name: p.numel() for name, p in model.named_parameters() if "dist_ssn." not in name}
    plan, vector = dist_ssn.shared_plan(model), vector_of(model)
    side = Side(plan, own, timeline, vector)
    network = Fabric(world_size, 1, Link(0.0, 1e9), Link(1e6 * LATENCY, MBIT))
    return metered, cost_of(Rungs(budget, 1, "int4"), side, plan, vector, network, FREE).handed_per_step


@pytest.mark.distributed
@pytest.mark.parametrize("budget", [None, 0.3])
def test_a_hook_sends_the_predicted_bytes(budget: float | None) -> None:
    for found, predicted in run_ranks(_hooked, 2, budget):
        assert found == predicted > 0


def test_the_table_shows_every_figure_in_80_columns() -> None:
    both = dataclasses.replace(measured(1.0, 1.1), rates=FREE)
    cluster = load_cluster("ethernet-1g")
    rows = rows_of(ladder_of(both, fabric(2, 2), Rungs("7%", 16, "int4", islands=True)), "gpt")
    rows = [{**row, "bytes_per_step_ring": 5_055_000.0, "ms_per_step": 1151.7} for row in best_of(rows)]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(ladder_table(rows, rows, cluster))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text and text.count("5,055.0") >= len(rows) and text.count("1,151.7") >= len(rows)


def test_all_combinations_and_the_best_of_them() -> None:
    both = dataclasses.replace(measured(1.0, 1.1), rates=FREE)
    rows = rows_of(ladder_of(both, fabric(2, 2), Rungs("7%", 16, "int4")), "gpt")
    assert len({tuple(row[key] for key in ("budget", "every", "codec", "delay", "islands")) for row in rows}) == len(
        rows
    )
    best = best_of(rows)
    assert best[-1]["budget"] == "7%" and best[-1]["loss_over_dense"] is None
    times, losses = ([row[key] for row in best[:-1]] for key in ("ms_per_step", "loss_over_dense"))
    assert times == sorted(times, reverse=True) and losses == sorted(losses) and losses[0] == 1
    assert all(row["delay"] == 0 for row in best)
    vector = vector_with(make_plan(SPECS, 0.25), vector_of(MODEL), SPECS)
    (quarter,) = (r for r in rows if (r["budget"], r["every"], r["codec"]) == (0.25, 1, "none"))
    assert quarter["bytes_per_step_logical"] == 4 * vector.values


def test_the_table_of_losses_is_whole() -> None:
    for task in measured_losses().values():
        assert task.expected("dense", None, 1, "none") == 1
        assert task.at_most("dense", None, 1, "none") == 1
        for (kind, budget, every, codec), ratio in task.ratios.items():
            assert 0.5 < ratio < 6 and codec in CODECS and every in (1, 4, 16, 50)
            bound = task.at_most(kind, budget, every, codec)
            assert bound is not None and bound <= ratio
    assert measured_losses()["gpt"].expected("bank", 0.2, 1, "none") is None


def test_rates_are_seconds_per_value() -> None:
    rates = measure_rates(2**14)
    assert set(rates.encode) == set(rates.decode) == set(CODECS)
    assert all(0 < rate < 1e-4 for rate in (rates.meet, *rates.decode.values()))


def test_the_command_shows_rows_and_keeps_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "compute.json"
    assert main([*SMALL, "--cluster=emulated-100mbit", f"--calibrate={file}"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"Rounds on {load_cluster('emulated-100mbit').name}" in out
    assert "measured in a GPT with 2 layers of width 64, 1,500 steps, 4 workers" in out
    content: dict[str, Any] = json.loads(file.read_text())
    again = [*SMALL, "--cluster=emulated-100mbit", f"--compute={file}", "--json"]
    for rates, said in (
        ({**content["rates"], "meet": -1}, "its rates must be 0 or more"),
        ({"meet": 1}, "is no measured"),
    ):
        file.write_text(json.dumps(content | {"rates": rates}))
        assert main(again) == 2
        assert said in capsys.readouterr().err
    file.write_text(json.dumps({key: value for key, value in content.items() if key != "rates"}))
    with pytest.warns(UserWarning, match=r"was written before it had rates of codecs"):
        assert main(again) == 0
    assert json.loads(capsys.readouterr().out)["ladder"][0]["every"] == 1
