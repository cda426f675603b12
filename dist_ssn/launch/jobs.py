"""Text for the two launchers that take a file instead of a command line: Slurm's job script and Kubernetes' manifest."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from dist_ssn.cluster import Cluster

NAME = "dist-ssn"

# sbatch's own variables, as the options of a script: the script then says everything.
_OPTIONS = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_TIMELIMIT": "time",
}


def job_script(
    cluster: Cluster,
    program: Sequence[str],
    nodes: int,
    address: str | None,
    port: int,
    environment: Mapping[str, str],
) -> str:
    """The script for sbatch: one torchrun on each node, which starts the node's processes.

    Args:
        cluster: the cluster
        program: program for torchrun: a script, or -m and a module, and its arguments
        nodes: number of nodes
        address: address of node 0; None: the first name in Slurm's list
        port: free TCP port of node 0
        environment: variables of every process; those of sbatch become options of the script
    """
    options = {
        "job-name": NAME,
        "nodes": str(nodes),
        "ntasks-per-node": "1",  # one torchrun
        "exclusive": None,  # all of the node's processors and GPUs
        "requeue": None,
        "open-mode": "append",  # after a requeue the log goes on
        "output": "%x-%j.log",
    }
    options |= {_OPTIONS[name]: value for name, value in environment.items() if name in _OPTIONS}
    lines = ["#!/usr/bin/env bash"]
    lines += [f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in options.items()]
    lines += ["set -euo pipefail"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items() if name not in _OPTIONS]
    found = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    lines += [f"export MASTER_ADDR={shlex.quote(address) if address else found}"]
    lines += [
        "# The quotes are single: each node has a number of its own.",
        'srun --kill-on-bad-exit=1 bash -c \'exec torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \\',
        f'  --master-addr "$MASTER_ADDR" --master-port {port} --nproc-per-node {cluster.processes_per_node} "$@"\' \\',
        f"  torchrun {shlex.join(program)}",
    ]
    return "\n".join(lines) + "\n"


def job_manifest(
    cluster: Cluster, program: Sequence[str], nodes: int, port: int, environment: Mapping[str, str]
) -> str:
    """The manifest for kubectl: an indexed Job with one torchrun per pod, and the Service by which they find pod 0."""
    torchrun = [
        *("torchrun", "--nnodes", str(nodes), "--node-rank", "$(JOB_COMPLETION_INDEX)"),
        *("--master-addr", f"{NAME}-0.{NAME}", "--master-port", str(port)),
        *("--nproc-per-node", str(cluster.processes_per_node)),
        *(word.replace("$(", "$$(") for word in program),  # Kubernetes fills in $(NAME); $$( stays $(
    ]
    container: dict[str, Any] = {
        "name": NAME,
        "image": cluster.image,
        "command": torchrun,
        "ports": [{"containerPort": port}],
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    if environment:
        container["env"] = [{"name": name, "value": value} for name, value in environment.items()]
    if cluster.processes_per_node == "gpu":
        container["resources"] = {"limits": {"nvidia.com/gpu": 1}}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": NAME},
        "spec": {
            "clusterIP": "None",  # no address of its own: a name for each pod
            "publishNotReadyAddresses": True,  # pods meet before they are ready
            "selector": {"job-name": NAME},
            "ports": [{"port": port}],
        },
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": NAME},
        "spec": {
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            "backoffLimit": 3 * nodes,  # a lost pod ends the torchrun of every pod, and all begin again
            "template": {
                "spec": {
                    "subdomain": NAME,
                    "restartPolicy": "OnFailure",
                    "containers": [container],
                    # Without it, /dev/shm has 64 MiB, which NCCL's buffers can exceed.
                    "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
                }
            },
        },
    }
    return yaml.safe_dump_all([service, job], sort_keys=False, width=120)
