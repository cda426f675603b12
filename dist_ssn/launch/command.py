"""The command that starts a program on a cluster, as a pure function.

Reasons for the options of each launcher. torchrun gets the node's number and node 0's address: then ranks follow the nodes' order,
and no node has to look up its own host name, as it must for torchrun's c10d rendezvous. On one node everything stays on loopback.
DeepSpeed's launcher and mpirun take the nodes' names from a hostfile. It describes one job, not the cluster, and so is no key of a
cluster file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from dist_ssn.cluster import Cluster
from dist_ssn.errors import ClusterError, unknown_choice
from dist_ssn.launch.jobs import job_manifest, job_script

OURS = ("train", "plan", "cluster")
"""Commands of dist-ssn that run on many processes."""


@dataclass(frozen=True)
class Start:
    """A program on a cluster.

    Args:
        cluster: the cluster
        arguments: `train --config …`, `cluster probe …`, or a script of the user's with its arguments
        nodes: number of nodes; None: as the cluster says
        node_rank: number of this node, from 0; None: not given
        address: name or address of node 0, instead of the cluster's; None: as the cluster says
        port: free TCP port of node 0, instead of the cluster's; None: as the cluster says
        hostfile: file with the nodes' names in the launcher's own format (deepspeed, mpirun)
        environ: variables that are already set; they win over the cluster's
    """

    cluster: Cluster
    arguments: tuple[str, ...]
    nodes: int | None = None
    node_rank: int | None = None
    address: str | None = None
    port: int | None = None
    hostfile: str | None = None
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Command:
    """A program to run.

    Args:
        argv: program and arguments
        environment: variables to set for it
        stdin: text for its standard input, such as a job script; None: no text
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    stdin: str | None = None


@dataclass(frozen=True)
class _Job:
    """A checked start, with every default filled in."""

    cluster: Cluster
    program: tuple[str, ...]  # as torchrun takes it: a script, or -m and a module, and its arguments
    nodes: int
    node_rank: int | None
    address: str | None
    port: int
    hostfile: str | None
    environment: Mapping[str, str]


def build_command(start: Start) -> Command:
    """The command that starts a program, on this node or on all nodes, by the cluster's launcher.

    Raises:
        ClusterError: one sentence that names everything that is missing, contradictory or impossible.
    """
    problems = list(_problems(start))
    if problems:
        raise ClusterError(f"cluster {start.cluster.name}: {'; '.join(problems)}")
    cluster = start.cluster
    job = _Job(
        cluster,
        _program(start.arguments),
        cluster.nodes if start.nodes is None else start.nodes,
        start.node_rank,
        start.address or cluster.rendezvous.address,
        start.port or cluster.rendezvous.port,
        start.hostfile,
        {},
    )
    wanted = environment_of(cluster, job.nodes)
    missing = {name: value for name, value in wanted.items() if name not in start.environ}
    return LAUNCH[cluster.launcher](_Job(**{**vars(job), "environment": missing}))


def environment_of(cluster: Cluster, nodes: int) -> dict[str, str]:
    """Variables of every process: the cluster's own, and those by which gloo, NCCL and MPI find the interface."""
    made: dict[str, str] = {}
    if cluster.interface and nodes > 1:
        # "=": NCCL would take eth0 for the beginning of eth01 too.
        made = {"GLOO_SOCKET_IFNAME": cluster.interface, "NCCL_SOCKET_IFNAME": f"={cluster.interface}"}
        if cluster.launcher == "mpirun":
            made["FI_TCP_IFACE"] = cluster.interface
    return {**made, **cluster.environment}


def _program(arguments: tuple[str, ...]) -> tuple[str, ...]:
    return ("-m", "dist_ssn.cli", *arguments) if arguments[0] in OURS else arguments


def _problems(start: Start) -> Iterator[str]:
    cluster = start.cluster
    nodes = cluster.nodes if start.nodes is None else start.nodes
    one_by_one = cluster.launcher == "torchrun" or (cluster.launcher == "deepspeed" and start.node_rank is not None)
    if not start.arguments:
        yield "name what to start after two dashes, such as -- train --config quickstart"
    elif start.arguments[0] not in OURS and not start.arguments[0].endswith(".py"):
        yield f"{unknown_choice('command', start.arguments[0], OURS)}; a script of your own ends in .py"
    if nodes < 1:
        yield f"--nodes must be at least 1, got {nodes}"
    if start.port is not None and not 0 < start.port < 65536:
        yield f"--port must be from 1 to 65535, got {start.port}"
    if start.node_rank is not None and cluster.launcher not in ("torchrun", "deepspeed"):
        yield f"--node-rank goes with torchrun and deepspeed; {cluster.launcher} counts the nodes itself"
    elif start.node_rank is not None and not 0 <= start.node_rank < max(nodes, 1):
        yield f"--node-rank must be from 0 to {nodes - 1}, got {start.node_rank}"
    if nodes > 1 and cluster.launcher == "torchrun" and start.node_rank is None:
        yield (
            f"{nodes} nodes need --node-rank, this node's number from 0 to {nodes - 1}: the same command is given on each"
        )
    if nodes > 1 and one_by_one and not (start.address or cluster.rendezvous.address):
        yield f"{nodes} nodes need --address, the name or address at which they reach node 0"
    if nodes > 1 and cluster.launcher in ("deepspeed", "mpirun") and start.hostfile is None:
        line = "'name slots=8'" if cluster.launcher == "deepspeed" else "'name:8'"
        yield f"{nodes} nodes need --hostfile, a file with a line such as {line} for each node"
    if start.hostfile is not None and cluster.launcher not in ("deepspeed", "mpirun"):
        yield f"--hostfile goes with deepspeed and mpirun, not with {cluster.launcher}"
    if cluster.processes_per_node == "gpu" and cluster.launcher == "mpirun":
        yield "processes_per_node must be a whole number for mpirun, which does not count GPUs"
    if cluster.launcher == "kubernetes" and not cluster.image:
        yield "image is missing: pods need the name of a container image that has dist_ssn in it"


def _torchrun(job: _Job) -> Command:
    where = ("--standalone", "--local-addr=127.0.0.1")  # without an address, torchrun listens on the host's name
    if job.nodes > 1:
        where = (
            *("--nnodes", str(job.nodes), "--node-rank", str(job.node_rank)),
            *("--master-addr", str(job.address), "--master-port", str(job.port)),
        )
    return Command(
        ("torchrun", *where, "--nproc-per-node", str(job.cluster.processes_per_node), *job.program), job.environment
    )


def _deepspeed(job: _Job) -> Command:
    where = ["--master_port", str(job.port)]
    if job.nodes > 1:
        where += ["--hostfile", str(job.hostfile), "--num_nodes", str(job.nodes)]
        if job.address:
            where += ["--master_addr", job.address]
        if job.node_rank is not None:  # started on each node; else it reaches the others by ssh
            where += ["--no_ssh", "--node_rank", str(job.node_rank)]
    if job.cluster.processes_per_node != "gpu":
        where += ["--num_gpus", str(job.cluster.processes_per_node)]
    module = ("--module", *job.program[1:]) if job.program[0] == "-m" else job.program
    return Command(("deepspeed", *where, "--no_local_rank", *module), job.environment)


def _mpirun(job: _Job) -> Command:
    processes = int(job.cluster.processes_per_node)
    where, environment = ("-launcher", "fork"), dict(job.environment)  # one node needs no ssh
    if job.nodes > 1:
        if job.address:  # where rank 0 listens for what is not MPI's; else on its host's name
            environment["MASTER_ADDR"] = job.address
        where = ("-f", str(job.hostfile), "-ppn", str(processes))
        if job.cluster.interface:
            where += ("-iface", job.cluster.interface)
    # -u: what a process prints goes through mpirun's pipes, and would come only at the end.
    return Command(
        ("mpirun", *where, "-n", str(job.nodes * processes), "python", "-u", *job.program),
        environment,
    )


def _slurm(job: _Job) -> Command:
    script = job_script(job.cluster, job.program, job.nodes, job.address, job.port, job.environment)
    return Command(("sbatch",), stdin=script)


def _kubernetes(job: _Job) -> Command:
    manifest = job_manifest(job.cluster, job.program, job.nodes, job.port, job.environment)
    return Command(("kubectl", "apply", "-f", "-"), stdin=manifest)


LAUNCH: dict[str, Callable[[_Job], Command]] = {
    "torchrun": _torchrun,
    "deepspeed": _deepspeed,
    "mpirun": _mpirun,
    "slurm": _slurm,
    "kubernetes": _kubernetes,
}
