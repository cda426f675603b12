"""The start scripts: clean by shellcheck, and the right command for their settings."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parent.parent.parent / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed: apt-get install shellcheck"
)
def test_shellcheck() -> None:
    result = subprocess.run(["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout


def said(script: str, tmp_path: Path, *arguments: str, **settings: str) -> tuple[int, str]:
    """Exit code and output of a script, whose launchers print what they were given, and the variables for gloo."""
    for name in ("torchrun", "deepspeed", "mpirun"):
        (tmp_path / name).write_text('#!/bin/sh\necho "${GLOO_SOCKET_IFNAME:--} $(basename "$0") $*"\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCHRUN": "torchrun", **settings}
    result = subprocess.run(
        [str(LAUNCH / script), *arguments], env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    return result.returncode, result.stdout + result.stderr


def test_torchrun(tmp_path: Path) -> None:
    alone = "- torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node 2 x.py --y\n"
    assert said("torchrun.sh", tmp_path, "x.py", "--y") == (0, alone)
    there = "e0 torchrun --nnodes 4 --node-rank 2 --master-addr 10.77.0.1 --master-port 29500 --nproc-per-node 1 x.py\n"
    assert said("torchrun.sh", tmp_path, "x.py", CLUSTER="emulated-100mbit", NODE_RANK="2") == (0, there)
    own = said(
        "torchrun.sh", tmp_path, "x.py", NODES="2", NODE_RANK="1", MASTER_ADDR="a", INTERFACE="b", PROCESSES="gpu"
    )
    assert own == (
        0,
        "b torchrun --nnodes 2 --node-rank 1 --master-addr a --master-port 29500 --nproc-per-node gpu x.py\n",
    )
    assert "needs NODE_RANK" in said("torchrun.sh", tmp_path, "x.py", NODES="2")[1]
    assert "needs MASTER_ADDR" in said("torchrun.sh", tmp_path, "x.py", CLUSTER="wan", NODE_RANK="0")[1]
    assert (
        "there is no clusters/x.yaml; known: emulated-100mbit.yaml"
        in said("torchrun.sh", tmp_path, "x", CLUSTER="x")[1]
    )


def test_deepspeed(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    hosts = str(tmp_path / "hosts")
    assert said("deepspeed.sh", tmp_path, "x.py") == (0, "- deepspeed --master_port 29500 --no_local_rank x.py\n")
    code, there = said("deepspeed.sh", tmp_path, "x.py", HOSTFILE=hosts, MASTER_ADDR="a", NODE_RANK="1", INTERFACE="e0")
    options = f"--hostfile {hosts} --master_addr a --no_ssh --node_rank 1"
    assert (code, there) == (0, f"e0 deepspeed --master_port 29500 --no_local_rank {options} x.py\n")
    assert said("deepspeed.sh", tmp_path, "x.py", HOSTFILE=hosts, NODE_RANK="1")[0] == 2
    assert said("deepspeed.sh", tmp_path, "x.py", HOSTFILE="nowhere")[0] == 2


def test_mpirun(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two\na:2\n\nb:2\n")
    hosts = str(tmp_path / "hosts")
    assert said("mpirun.sh", tmp_path, "x.py", PROCESSES="3") == (0, "- mpirun -launcher fork -n 3 python -u x.py\n")
    code, there = said("mpirun.sh", tmp_path, "x.py", HOSTFILE=hosts, PROCESSES="2", INTERFACE="e0")
    assert (code, there) == (0, f"e0 mpirun -f {hosts} -ppn 2 -iface e0 -n 4 python -u x.py\n")
    assert said("mpirun.sh", tmp_path, "x.py", HOSTFILE="nowhere")[0] == 2


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh", "mpirun.sh"])
def test_a_program_must_be_named(script: str, tmp_path: Path) -> None:
    code, text = said(script, tmp_path)
    assert code == 2 and "name the program to start" in text
