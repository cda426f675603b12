"""Cluster and program → command: goldens for every launcher, and every mistake in one sentence."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dist_ssn.cli.entry import main
from dist_ssn.cluster import Cluster, Link, Rendezvous, load_cluster
from dist_ssn.errors import ClusterError
from dist_ssn.launch import Command, Start, build_command, execute, text_of

ROOT = Path(__file__).resolve().parent.parent.parent
LINK = Link(50, 940)
CLUSTER = Cluster(
    4, 2, LINK, LINK, interface="eth0", rendezvous=Rendezvous("10.0.0.1", 29500), environment={"NCCL_DEBUG": "INFO"}
)
TRAIN = ("train", "--config", "my.yaml", "--name=a b")
ENV = "env GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME==eth0"


def line(
    launcher: str = "torchrun", arguments: tuple[str, ...] = TRAIN, cluster: Cluster = CLUSTER, **given: object
) -> str:
    return text_of(build_command(Start(dataclasses.replace(cluster, launcher=launcher), arguments, **given)))


def test_torchrun() -> None:
    assert line(node_rank=3) == (
        f"{ENV} NCCL_DEBUG=INFO torchrun --nnodes 4 --node-rank 3 --master-addr 10.0.0.1 --master-port 29500 "
        "--nproc-per-node 2 -m dist_ssn.cli train --config my.yaml '--name=a b'"
    )
    assert line(nodes=1, arguments=("mine.py", "--x")) == (
        "env NCCL_DEBUG=INFO torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node 2 mine.py --x"
    )
    gpu = line(
        nodes=2, node_rank=0, address="a.b", port=1, cluster=dataclasses.replace(CLUSTER, processes_per_node="gpu")
    )
    assert "--nnodes 2 --node-rank 0 --master-addr a.b --master-port 1 --nproc-per-node gpu" in gpu


def test_what_the_shell_has_set_wins_over_the_file() -> None:
    assert line(node_rank=0, environ={"GLOO_SOCKET_IFNAME": "x", "NCCL_DEBUG": "WARN"}).startswith(
        "env NCCL_SOCKET_IFNAME==eth0 torchrun"
    )


def test_deepspeed() -> None:
    assert line("deepspeed", hostfile="hosts") == (
        f"{ENV} NCCL_DEBUG=INFO deepspeed --master_port 29500 --hostfile hosts --num_nodes 4 --master_addr 10.0.0.1 "
        "--num_gpus 2 --no_local_rank --module dist_ssn.cli train --config my.yaml '--name=a b'"
    )
    assert "--master_addr 10.0.0.1 --no_ssh --node_rank 1 --num_gpus 2" in line(
        "deepspeed", hostfile="hosts", node_rank=1
    )
    assert line("deepspeed", nodes=1, arguments=("mine.py",), cluster=load_cluster("ethernet-10g")) == (
        "deepspeed --master_port 29500 --no_local_rank mine.py"
    )


def test_mpirun() -> None:
    assert line("mpirun", hostfile="hosts") == (
        f"{ENV} FI_TCP_IFACE=eth0 NCCL_DEBUG=INFO MASTER_ADDR=10.0.0.1 mpirun -f hosts -ppn 2 -iface eth0 -n 8 python -u "
        "-m dist_ssn.cli train --config my.yaml '--name=a b'"
    )
    assert line("mpirun", nodes=1, arguments=("mine.py",)) == (
        "env NCCL_DEBUG=INFO mpirun -launcher fork -n 2 python -u mine.py"
    )


SLURM = """#!/usr/bin/env bash
# Goes to the standard input of: sbatch
#SBATCH --job-name=dist-ssn
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --time=24:00:00
set -euo pipefail
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# The quotes are single: each node has a number of its own.
srun --kill-on-bad-exit=1 bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \\
  --master-addr "$MASTER_ADDR" --master-port 29500 --nproc-per-node gpu "$@"' \\
  torchrun -m dist_ssn.cli train --config my.yaml '--name=a b'
"""


def test_slurm() -> None:
    assert line("slurm", cluster=load_cluster("slurm-gpu"), nodes=3) == SLURM
    script = line("slurm", address="n1", environ={"NCCL_DEBUG": "x"})
    assert "\nexport MASTER_ADDR=n1\n" in script and "\nexport GLOO_SOCKET_IFNAME=eth0\n" in script
    assert "NCCL_DEBUG" not in script  # sbatch hands on what the shell has


@pytest.mark.processes
def test_slurm_script_does_what_it_says(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands and torchrun, that print what they were given."""
    for name, body in {
        "scontrol": 'echo "$3-first"; echo other',
        "srun": 'shift; SLURM_NNODES=3 SLURM_NODEID=2 exec "$@"',
        "torchrun": 'printf "%s\\n" "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "list"}
    for command, arguments in (
        (["bash", "-s"], []),
        (["bash", str(ROOT / "launch" / "slurm.sbatch")], ["-m", "dist_ssn.cli", *TRAIN]),
    ):
        script = line("slurm", cluster=load_cluster("slurm-gpu"), nodes=3)
        result = subprocess.run(
            [*command, *arguments],
            input=script,
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert result.stdout.splitlines() == [
            *("--nnodes", "3", "--node-rank", "2", "--master-addr", "list-first", "--master-port", "29500"),
            *("--nproc-per-node", "gpu", "-m", "dist_ssn.cli", "train", "--config", "my.yaml", "--name=a b"),
        ], result


def test_kubernetes() -> None:
    text = line("kubernetes", ("train", "--config", "quickstart"), load_cluster("kubernetes"))
    assert text.startswith("# Goes to the standard input of: kubectl apply -f -\n")
    service, job = yaml.safe_load_all(text)
    # The file in launch/ is what would run, word for word.
    assert [service, job] == list(yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text()))
    pod = job["spec"]["template"]["spec"]
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["selector"] == {"job-name": "dist-ssn"}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 4
    assert pod["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": 1}}
    cluster = dataclasses.replace(load_cluster("kubernetes"), processes_per_node=2)
    _, job = yaml.safe_load_all(line("kubernetes", ("train", "--name=$(X)"), cluster, nodes=2))
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["command"][-1] == "--name=$$(X)" and "$(JOB_COMPLETION_INDEX)" in container["command"]
    assert "resources" not in container


@pytest.mark.parametrize(
    ("launcher", "given", "wanted"),
    [
        ("torchrun", {}, "4 nodes need --node-rank, this node's number from 0 to 3: the same command is given on each"),
        ("torchrun", {"node_rank": 4}, "--node-rank must be from 0 to 3, got 4"),
        ("torchrun", {"nodes": 0}, "--nodes must be at least 1, got 0"),
        ("torchrun", {"node_rank": 0, "port": 70000}, "--port must be from 1 to 65535, got 70000"),
        ("torchrun", {"node_rank": 0, "hostfile": "x"}, "--hostfile goes with deepspeed and mpirun, not with torchrun"),
        ("deepspeed", {}, "4 nodes need --hostfile, a file with a line such as 'name slots=8' for each node"),
        ("mpirun", {}, "4 nodes need --hostfile, a file with a line such as 'name:8' for each node"),
        ("mpirun", {"node_rank": 1, "hostfile": "x"}, "--node-rank goes with torchrun and deepspeed; mpirun counts"),
        ("kubernetes", {}, "image is missing"),
        ("torchrun", {"arguments": ()}, "name what to start after two dashes, such as -- train --config quickstart"),
        (
            "torchrun",
            {"arguments": ("trian",)},
            "unknown command 'trian': known are cluster, plan, train; did you mean 'train'?",
        ),
    ],
)
def test_mistakes(launcher: str, given: dict, wanted: str) -> None:
    with pytest.raises(ClusterError) as caught:
        line(launcher, **given)
    assert wanted in str(caught.value) and str(caught.value).startswith("cluster cluster: ")


def test_all_mistakes_at_once() -> None:
    cluster = dataclasses.replace(CLUSTER, processes_per_node="gpu", rendezvous=Rendezvous())
    with pytest.raises(
        ClusterError, match=r"unknown command.*--node-rank goes with.*--hostfile.*mpirun, which does not count"
    ):
        line("mpirun", ("x",), cluster, node_rank=9)
    with pytest.raises(ClusterError, match=r"need --node-rank.*need --address"):
        line(cluster=cluster)


def test_dry_run_prints_and_runs_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "execve", None)
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.9")
    assert main(["launch", "--cluster=wan", "--dry-run", "--", "train", "--", "x"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[words.index("--node-rank") + 1] == "1" and words[words.index("--master-addr") + 1] == "10.0.0.9"
    assert words[-3:] == ["train", "--", "x"] and Path(words[words.index("--nnodes") - 1]).name == "torchrun"
    monkeypatch.setenv("NODE_RANK", "one")
    assert main(["launch", "--cluster=wan", "--dry-run", "--", "train"]) == 2
    assert "environment variable NODE_RANK must be a whole number, got 'one'" in capsys.readouterr().err


def test_a_launcher_that_is_not_there() -> None:
    with pytest.raises(ClusterError, match="kubectl-of-nobody is not installed"):
        execute(Command(("kubectl-of-nobody",)), {})


@pytest.mark.processes
def test_exit_codes_environment_and_standard_input_pass_through() -> None:
    program = (
        "import os, sys; from dist_ssn.launch import Command, execute; "
        "execute(Command(('bash', '-c', 'cat; echo $A $B; exit 7'), {'A': '1'}, 'in\\n'), {**os.environ, 'A': '0', 'B': '2'})"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (7, "in\n1 2\n"), result.stderr
