"""`dist-ssn doctor`: says what is there and why an engine does not work, and never fails itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_ssn.cli import doctor, probes
from dist_ssn.cli.entry import main
from dist_ssn.engines import ENGINES

TORCH = {"torch": "2.13", "cuda": None, "rocm": None, "threads": 1, "distributed": True, "gloo": True, "nccl": False}
TORCH |= {"cudnn": None, "gpus": []}
GOOD: dict[str, Any] = {
    "torch": TORCH,
    "fsdp": {"fully_shard": True},
    "deepspeed": {"deepspeed": "0.19"},
    "mpi": {"mpi4py": "4.1", "library": "MPICH Version: 5.0", "standard": [4, 1]},
}


@pytest.fixture(scope="module")
def as_process() -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dist_ssn.cli", "doctor", "--json"],
        env={**os.environ, "WANDB_API_KEY": "secret", "NCCL_DEBUG": "WARN"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.mark.processes
def test_findings_of_this_machine(as_process: subprocess.CompletedProcess[str]) -> None:
    assert (as_process.returncode, as_process.stderr) == (0, "")
    found = json.loads(as_process.stdout)
    assert list(found) == ["versions", "machine", "launchers", "environment", "engines"]
    for name in ("dist_ssn", "Python", "torch", "CUDA", "NCCL", "gloo", "mpi4py", "MPI library", "DeepSpeed", "W&B"):
        assert found["versions"][name]
    assert found["engines"].keys() == ENGINES.keys()
    assert found["engines"]["ddp"]["works"] and found["engines"]["fsdp"]["works"]
    assert found["environment"]["NCCL_DEBUG"] == "WARN" and "secret" not in as_process.stdout
    assert f"{os.cpu_count()}, " in found["machine"]["cores"]


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the probes find, instead of asking them."""
    facts = dict(GOOD)
    monkeypatch.setattr(doctor, "probe_all", lambda names, seconds: facts)
    return facts


def test_text_is_a_table_with_the_same_findings(
    probed: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["doctor"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["versions:"] in lines and ["engines:"] in lines
    assert ["torch", "2.13"] in lines and ["ddp", "works.", "Over", "gloo."] in lines


@pytest.mark.parametrize(
    ("facts", "engine", "why"),
    [
        (
            {"torch": {"error": "ImportError: libtorch.so"}},
            "ddp",
            "torch cannot be imported (ImportError: libtorch.so).",
        ),
        ({"torch": TORCH | {"distributed": False}}, "fsdp", "This torch is built without torch.distributed."),
        ({"torch": TORCH | {"gloo": False, "nccl": True}}, "ddp", "This torch has neither gloo nor, with a GPU, NCCL."),
        ({"fsdp": {"error": "ImportError: x"}}, "fsdp", "This torch has no FSDP2 (ImportError: x)."),
        (
            {"deepspeed": {"error": "OSError: x"}},
            "deepspeed",
            "DeepSpeed is installed and cannot be imported (OSError: x).",
        ),
        ({"mpi": {"error": "RuntimeError: no libmpi"}}, "mpi", "cannot be imported (RuntimeError: no libmpi)."),
    ],
)
def test_why_an_engine_does_not_work(
    facts: dict[str, Any], engine: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda package: "1.0")
    found = doctor.engines({**GOOD, **facts})[engine]
    assert not found["works"] and found["why"].endswith(why)


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda package: None)
    gone = {"error": "ModuleNotFoundError: x"}
    found = doctor.engines({**GOOD, "mpi": gone, "deepspeed": gone})
    assert found["mpi"]["why"].startswith("mpi4py with an MPI library is not installed: pip install 'dist_ssn[mpi]'")
    assert found["deepspeed"]["why"].startswith("DeepSpeed is not installed: pip install 'dist_ssn[deepspeed]'")


def test_backends_of_a_gpu() -> None:
    torch = TORCH | {"cuda": "13.0", "nccl": True, "nccl_version": "2.29.1", "gpus": ["H100"], "cudnn": 91900}
    found = doctor.engines({**GOOD, "torch": torch})
    assert found["ddp"] == {"works": True, "why": "Over NCCL and gloo."}
    assert doctor._versions({**GOOD, "torch": torch})["CUDA"] == "13.0 (H100)"


def test_a_finding_that_fails_costs_only_itself(
    probed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("no such thing")

    monkeypatch.setattr(doctor.shutil, "which", fail)
    monkeypatch.setattr(os, "sysconf", fail)
    probed.update({name: {"error": "its import ended with exit code -11"} for name in GOOD})
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["memory"] == found["launchers"]["mpirun"] == "unknown (OSError: no such thing)"
    assert not any(engine["works"] for engine in found["engines"].values())
    assert "exit code -11" in found["versions"]["torch"]
    assert "exit code -11" in found["versions"]["MPI library"] or found["versions"]["mpi4py"] == "not installed"


LIBRARIES = {
    "torch": "import os; os.abort()",
    "deepspeed": "import time; time.sleep(60)",
    "mpi4py": "raise ImportError('a broken\\nmpi4py')",
}


@pytest.mark.processes
def test_libraries_that_crash_or_hang_or_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in LIBRARIES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = doctor.probe_all(doctor.PROBES, seconds=5)
    assert found["torch"]["error"].startswith("its import ended with exit code -6")
    assert found["deepspeed"] == {"error": "its import took more than 5 seconds"}
    assert found["mpi"] == {"error": "ImportError: a broken"}


@pytest.mark.processes
def test_a_python_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "No such file" in doctor.probe_all(("torch",), seconds=5)["torch"]["error"]


@pytest.mark.processes
def test_probes_start_no_process_group_and_no_mpi() -> None:
    program = (
        "from dist_ssn.cli import probes\n"
        "print(*(probes.main(name) for name in ('torch', 'fsdp', 'mpi')))\n"
        "import torch.distributed as dist\n"
        "assert not dist.is_initialized()\n"
        "try:\n    from mpi4py import MPI\nexcept ImportError:\n    pass\nelse:\n    assert not MPI.Is_initialized()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("0 0 0\n")
    assert set(doctor.PROBES) == set(probes.PROBES)
