"""The start scripts: equal to what `dist-ssn launch` would run, clean by shellcheck, and right for their settings."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dist_ssn.cli.entry import main
from dist_ssn.cluster import Cluster, Link, Rendezvous
from dist_ssn.launch import Start, build_command
from dist_ssn.launch.scripts import main as write_scripts
from dist_ssn.launch.scripts import scripts

LAUNCH = Path(__file__).resolve().parent.parent.parent / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]


def test_the_files_are_made_from_the_commands(tmp_path: Path) -> None:
    """After a change of a launcher's arguments, run `python -m dist_ssn.launch.scripts launch`."""
    made = scripts()
    assert {path.name for path in LAUNCH.iterdir()} == {*made, "README.md"}
    for name, text in made.items():
        assert (LAUNCH / name).read_text() == text, name
        assert not re.search(r"@[a-z_]+@", text), name  # every marker is filled in
    write_scripts(str(tmp_path))
    for name, text in made.items():
        assert (tmp_path / name).read_text() == text
        assert os.access(tmp_path / name, os.X_OK) == os.access(LAUNCH / name, os.X_OK) == name.endswith(".sh")


def test_the_manifest_is_what_a_dry_run_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["launch", "--cluster", "kubernetes", "--dry-run", "--", "train", "--config", "quickstart"]) == 0
    printed = capsys.readouterr().out
    header, text = (LAUNCH / "kubernetes.yaml").read_text().split("# Goes to", 1)
    assert f"# Goes to{text}" == printed and all(line.startswith("#") for line in header.splitlines())


CLUSTER = Cluster(2, 3, Link(1, 1), Link(1, 1), interface="e0", rendezvous=Rendezvous("a", 1234), launcher="torchrun")


@pytest.mark.processes
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "mpirun"])
def test_a_script_starts_what_a_dry_run_prints(launcher: str, nodes: int, tmp_path: Path) -> None:
    """With the same facts, once as a cluster's and once as the script's variables."""
    (tmp_path / "hosts").write_text("a:3\nb:3\n")
    several = nodes > 1
    hostfile = str(tmp_path / "hosts") if several and launcher != "torchrun" else None
    rank = 1 if several and launcher != "mpirun" else None
    cluster = dataclasses.replace(CLUSTER, launcher=launcher)
    command = build_command(Start(cluster, ("x.py", "--y"), nodes, rank, hostfile=hostfile))
    settings = {"PROCESSES": "3", "NODES": str(nodes), "MASTER_PORT": "1234", "INTERFACE": "e0"}
    settings |= {"MASTER_ADDR": "a"} if several else {}
    settings |= {"HOSTFILE": hostfile} if hostfile else {}
    settings |= {"NODE_RANK": "1"} if rank is not None else {}
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "FI_TCP_IFACE")
    program = "".join(f'echo "{name}=${name}"; ' for name in names) + 'echo "$(basename "$0") $*"'
    (tmp_path / launcher).write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / launcher).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCHRUN": "torchrun", **settings}
    said = subprocess.run(
        [str(LAUNCH / f"{launcher}.sh"), "x.py", "--y"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    variables = [f"{name}={command.environment.get(name, '')}" for name in names]
    assert said.stdout.splitlines() == [*variables, " ".join(command.argv)]


@pytest.mark.processes
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


@pytest.mark.processes
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


@pytest.mark.processes
def test_deepspeed(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    hosts = str(tmp_path / "hosts")
    assert said("deepspeed.sh", tmp_path, "x.py") == (0, "- deepspeed --master_port 29500 --no_local_rank x.py\n")
    code, there = said("deepspeed.sh", tmp_path, "x.py", HOSTFILE=hosts, MASTER_ADDR="a", NODE_RANK="1", INTERFACE="e0")
    options = f"--hostfile {hosts} --num_nodes 2 --master_addr a --no_ssh --node_rank 1"
    assert (code, there) == (0, f"e0 deepspeed --master_port 29500 {options} --no_local_rank x.py\n")
    assert said("deepspeed.sh", tmp_path, "x.py", HOSTFILE=hosts, NODE_RANK="1")[0] == 2
    assert said("deepspeed.sh", tmp_path, "x.py", HOSTFILE="nowhere")[0] == 2


@pytest.mark.processes
def test_mpirun(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two\na:2\n\nb:2\n")
    hosts = str(tmp_path / "hosts")
    assert said("mpirun.sh", tmp_path, "x.py", PROCESSES="3") == (0, "- mpirun -launcher fork -n 3 python -u x.py\n")
    code, there = said("mpirun.sh", tmp_path, "x.py", HOSTFILE=hosts, PROCESSES="2", INTERFACE="e0")
    assert (code, there) == (0, f"e0 mpirun -f {hosts} -ppn 2 -iface e0 -n 4 python -u x.py\n")
    assert said("mpirun.sh", tmp_path, "x.py", HOSTFILE="nowhere")[0] == 2


@pytest.mark.processes
@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh", "mpirun.sh"])
def test_a_program_must_be_named(script: str, tmp_path: Path) -> None:
    code, text = said(script, tmp_path)
    assert code == 2 and "name the program to start" in text
