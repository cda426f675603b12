"""Whether sharing pays, on networks and backwards that are made up so that the answer is known."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from dist_ssn.cli.entry import main
from dist_ssn.cluster import Link
from dist_ssn.cost.advice import HIDDEN_TOLERANCE, advise, bandwidth, crossover_mbit, hidden_budget, sentences
from dist_ssn.cost.fabric import Fabric
from dist_ssn.cost.measured import Measured, Side
from dist_ssn.cost.timeline import Timeline
from dist_ssn.model.specs import find_specs
from dist_ssn.plan import make_plan

NUMBERS = 4 * 256 * 256
MODEL = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))
SPECS = find_specs(MODEL)


def measured(dense: float, shared: float, budget: float = 0.1) -> Measured:
    """Computes for so many seconds; every gradient is final at the end."""
    plan = make_plan(SPECS, budget)
    names = [spec.name for spec in SPECS.weights]

    def timeline(seconds: float) -> Timeline:
        end = np.full((1, 1), seconds)
        return Timeline(dict.fromkeys(names, end), end)

    whole = {spec.name: math.prod(spec.shape) for spec in SPECS.weights}
    assert sum(whole.values()) == NUMBERS
    return Measured(Side(None, whole, timeline(dense)), Side(plan, {}, timeline(shared)), SPECS)


def pair(mbit: float, latency_us: float = 0.0) -> Fabric:
    """Two processes: a byte handed in is a byte on the wire."""
    link = Link(latency_us, mbit)
    return Fabric(2, 1, link, link)


def test_the_crossover_by_hand() -> None:
    two = measured(1.0, 1.2)
    saved = 4 * (NUMBERS - two.shared.parameters)
    assert crossover_mbit(two, pair(100)) == pytest.approx(8e-6 * saved / 0.2)
    assert math.isinf(crossover_mbit(measured(1.0, 0.9), pair(100)))
    assert crossover_mbit(measured(0.1, 1e9), pair(100)) == 0


def test_the_largest_budget_that_a_network_hides() -> None:
    two = measured(1.0, 1.0)
    mbit = 8e-6 * 4 * NUMBERS * 0.25 / HIDDEN_TOLERANCE  # a quarter of the weights takes just as long as is allowed
    found = hidden_budget(two, pair(mbit))
    assert found == pytest.approx(0.25, abs=0.01)
    assert hidden_budget(two, pair(1e6)) == 1.0
    assert hidden_budget(two, pair(1e6, latency_us=1e6)) is None


@pytest.mark.parametrize(
    ("dense", "shared", "mbit", "pays", "said"),
    [
        (0.1, 0.1, 10, True, "share: a step takes 0."),
        (1.0, 1.0, 1e5, False, "the network's sake: it takes 0.0% of a dense step"),
        (0.1, 1.0, 100, False, "of communication in a step, and its compute takes 900.0 ms more"),
    ],
)
def test_a_recommendation_also_says_dont(dense: float, shared: float, mbit: float, pays: bool, said: str) -> None:
    advice = advise(measured(dense, shared), pair(mbit))
    assert advice.pays is pays and said in advice.why
    assert (advice.faster > 1.05) is pays
    assert any(said in sentence for sentence in sentences(advice, pair(mbit)))


@pytest.mark.parametrize(("hides", "budget", "why"), [(0.25, 0.25, "hides"), (0.01, 0.1, "more steps than dense")])
def test_a_budget_to_begin_with(hides: float, budget: float, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mbit = 8e-6 * 4 * NUMBERS * hides / HIDDEN_TOLERANCE
    advice = advise(measured(1.0, 1.0), pair(mbit))
    assert advice.budget == pytest.approx(budget, abs=0.01)
    (sentence,) = (told for told in sentences(advice, pair(mbit)) if told.startswith("A budget to begin with"))
    assert why in sentence
    monkeypatch.setattr("dist_ssn.cost.advice.PROVEN_BUDGETS", ((NUMBERS, 0.04), (0, 0.1)))
    assert advise(measured(1.0, 1.0), pair(mbit)).budget == pytest.approx(max(hides, 0.04), abs=0.01)
    never = sentences(dataclasses.replace(advice, pays=False), pair(mbit))
    assert not any(told.startswith("A budget to begin with") for told in never)


def test_what_is_said_of_extremes() -> None:
    advice = advise(measured(1.0, 1.0), pair(10))
    for changes, said in (
        ({"crossover_mbit": 0.0}, "at no bandwidth"),
        ({"crossover_mbit": math.inf}, "at every bandwidth"),
        ({"crossover_mbit": 3100.0}, "Below 3.1 Gbit/s"),
        ({"hidden_budget": None}, "At 10 Mbit/s every bank"),
    ):
        assert any(said in sentence for sentence in sentences(dataclasses.replace(advice, **changes), pair(10)))
    assert [bandwidth(mbit) for mbit in (0.05, 95.6, 940, 2e6)] == [
        "50 kbit/s",
        "95.6 Mbit/s",
        "940 Mbit/s",
        "2 Tbit/s",
    ]


SMALL = [
    "plan",
    "--config",
    "quickstart",
    "--model_args={layers: 1, width: 32, heads: 2, context: 32}",
    "--batch_size=8",
]


def told(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    assert main([*SMALL, "--threads=1", "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_compute_is_kept_and_taken_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "compute.json"
    first = told(capsys, "--cluster=emulated-100mbit", f"--calibrate={file}", "--workers=2,8")
    again = told(capsys, "--cluster=emulated-100mbit", f"--compute={file}", "--workers=2,8")
    assert again == first
    assert [row["processes"] for row in first["workers"]] == [2, 8]
    assert {row["engine"] for row in first["engines"]} >= {"ddp", "zero-1", "fsdp", "mpi"}
    elsewhere = told(capsys, "--cluster=ethernet-10g", f"--compute={file}")
    assert elsewhere["compute"] == first["compute"]
    assert elsewhere["ways"][0]["exposed_ms_per_step"] < first["ways"][0]["exposed_ms_per_step"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compute.json"]
    assert main([*SMALL, "--cluster=local", f"--compute={file}", "--batch_size=4"]) == 2
    assert "was measured with batch_size 8, and this recipe has 4" in capsys.readouterr().err


def _broken(**changes: object) -> str:
    good = {"ready": {"a": [[1.0]]}, "end": [[1.0]], "drag": 0}
    recipe = {"model": "gpt", "model_args": {"layers": 1, "width": 32, "heads": 2, "context": 32}, "batch_size": 8}
    content = {"format": 1, "recipe": {**recipe, "accumulation": 1, "precision": "fp32"}, "dense": good, "shared": good}
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as measured compute"),
        ("[]", "is no measured compute of format 1"),
        (_broken(recipe=None), "was measured with model None"),
        (_broken(dense={"end": [[1]], "ready": 3, "drag": 0}), "is no measured compute"),
        (_broken(dense={"end": [[1]], "ready": {"a": [[1, 2]]}, "drag": 0}), "tables of one shape"),
        (_broken(shared={"end": [[math.inf]], "ready": {"a": [[1]]}, "drag": 0}), "must be 0 or more, and finite"),
        (_broken(shared={"end": [[1]], "ready": {"a": [[1]]}, "drag": -1}), "must be 0 or more, and finite"),
        (None, "cannot be read as measured compute"),
    ],
)
def test_a_file_that_is_no_compute(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "compute.json"
    if content is not None:
        file.write_text(content)
    assert main([*SMALL, "--cluster=local", f"--compute={file}"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["0", "2,x", "", "9999999999"])
def test_wrong_numbers_of_workers(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--cluster=local", f"--workers={wrong}"]) == 2
    assert "--workers must be numbers" in capsys.readouterr().err
    assert main([*SMALL, "--workers=2"]) == 2
    assert "--workers goes with --cluster" in capsys.readouterr().err


def test_repetitions_that_disagree_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of measured times whose shared side was measured beside another program."""
    sizes = '--model_args={"layers": 1, "width": 16, "heads": 2, "context": 8}'
    command = ["plan", sizes, "--share.budget=20%", "--batch_size=8", "--cluster=ethernet-1g"]
    file = tmp_path / "compute.json"
    assert main([*command, f"--calibrate={file}"]) == 0
    assert "in brackets, quick and slow steps" in " ".join(capsys.readouterr().out.split())
    content = json.loads(file.read_text(encoding="utf-8"))
    for side, slow in (("dense", 0.011), ("shared", 0.08)):
        steps = [0.01, slow] * 10
        content[side] = {
            "ready": {name: [[0.0]] * 20 for name in content[side]["ready"]},
            "end": [[s] for s in steps],
            "drag": 0,
        }
    file.write_text(json.dumps(content), encoding="utf-8")
    assert main([*command, f"--compute={file}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "10.5 ms dense (10.0 to 11.0), 45.0 ms shared (10.0 to 80.0)" in said
    assert (
        "Warning: the repetitions of a step disagree (shared 10.0 to 80.0 ms), probably because the machine of" in said
    )
    assert main([*command, f"--compute={file}", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["compute"]["shared_ms_spread"] == pytest.approx([10, 80])
    assert err.startswith("dist-ssn: Warning: the repetitions")
    content["shared"]["end"] = content["dense"]["end"]
    file.write_text(json.dumps(content), encoding="utf-8")
    assert main([*command, f"--compute={file}"]) == 0
    assert "Warning" not in capsys.readouterr().out
