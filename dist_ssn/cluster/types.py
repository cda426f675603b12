"""Facts about a cluster, as one frozen and typed value; the keys of `clusters/*.yaml` are the fields below."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge, Gt, Le
from pydantic import BeforeValidator, Field, StrictBool, StrictFloat, StrictInt, model_validator
from typing_extensions import Self

from dist_ssn.checked import Problem, Says, checked, refuse, shown
from dist_ssn.errors import ClusterError

Launcher = Literal["torchrun", "deepspeed", "mpirun", "slurm", "kubernetes"]
LAUNCHERS: tuple[Launcher, ...] = get_args(Launcher)
MAX_NODES, MAX_PROCESSES = 100_000, 1_024

# A cluster file may come from somebody else, and an environment variable can make a process load a library or run a program
# (LD_PRELOAD, PYTHONPATH, NCCL_NET_PLUGIN, …). So only these names are taken, unless they name something to load, run or write;
# every other variable can be set in one's own shell. A secret has no place in such a file either.
ENVIRONMENT = (
    *("NCCL_*", "GLOO_*", "TORCH_NCCL_*", "TORCH_DISTRIBUTED_DEBUG", "OMP_*", "KMP_*", "FI_*", "UCX_*", "MPICH_*"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "DS_ACCELERATOR", "WANDB_MODE"),
    *(f"SBATCH_{what}" for what in ("ACCOUNT", "CONSTRAINT", "PARTITION", "QOS", "RESERVATION", "TIMELIMIT")),
)
_LOADS_OR_WRITES = re.compile("PLUGIN|PATH|FILE|EXEC|LIB|DIR|LOAD|AGENT|CMD|COMMAND|TOOL|KEY|SECRET|TOKEN|PASS")


def _environment(variables: Any) -> Any:
    """Refuses names and values that no cluster file may set."""
    if isinstance(variables, Mapping):
        refuse("environment", _environment_problems(variables))
    return variables


def _environment_problems(variables: Mapping[Any, Any]) -> Iterator[Problem]:
    for name, value in variables.items():
        known = isinstance(name, str) and any(fnmatch.fnmatchcase(name, pattern) for pattern in ENVIRONMENT)
        if not isinstance(name, str) or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            text = "must have a name of capital letters, digits and underscores"
        elif not known or _LOADS_OR_WRITES.search(name):
            text = "is none of the variables that a cluster file may set: set it in your own shell instead"
        elif not isinstance(value, str):
            text = f'must be text, in quotes if it looks like something else, such as "1", got {shown(value)}'
        elif name.startswith("SBATCH_") and not re.fullmatch(r"[\w.,:@&|*()\[\]-]+", value):
            text = f"must be one word, as sbatch's option takes it, got {shown(value)}"
        elif not value.isprintable() or len(value) > 1000:
            text = f"must be one line of at most 1000 printable characters, got {shown(value)}"
        else:
            continue
        yield Problem(name if isinstance(name, str) and len(name) <= 80 else shown(name), text)


def _words(text: str) -> Says:
    """The same words for a wrong type and a wrong value."""
    return Says(text, text)


@checked(ClusterError)
class Link:
    """Link between two processes."""

    latency_us: Annotated[StrictFloat, Ge(0), Le(1e8), _words("a number of microseconds, 0 or more")]
    """Microseconds that one small message takes, one way, from process to process."""
    bandwidth_mbit: Annotated[StrictFloat, Gt(0), Le(1e9), _words("a number of Mbit/s above 0")]
    """Mbit/s that one process can send over it while its node's other processes are silent."""

    @property
    def latency_seconds(self) -> float:
        """Latency in seconds."""
        return self.latency_us / 1e6

    @property
    def bytes_per_second(self) -> float:
        """Bandwidth in bytes per second."""
        return self.bandwidth_mbit * 1e6 / 8


# None of the texts below can be an option of a program, or more than one word of a shell.


@checked(ClusterError)
class Rendezvous:
    """Address and port where the processes meet."""

    address: Annotated[
        str | None,
        Field(pattern=r"^[A-Za-z0-9:][\w.:-]*$", max_length=253, examples=["10.0.0.1"]),
        _words("a host name or an IP address, or null"),
    ] = None
    """Name or address of node 0, as the other nodes reach it; null: not known before the start."""
    port: Annotated[StrictInt, Ge(1), Le(65535), _words("a whole number from 1 to 65535")] = 29500
    """A free TCP port there."""


@checked(ClusterError)
class Cluster:
    """A cluster."""

    nodes: Annotated[
        StrictInt, Ge(1), Le(MAX_NODES), _words(f"a whole number from 1 to {MAX_NODES}"), Field(examples=[4])
    ]
    """Number of nodes."""
    processes_per_node: Annotated[
        Annotated[StrictInt, Ge(1), Le(MAX_PROCESSES)] | Literal["gpu"],
        _words(f"a whole number from 1 to {MAX_PROCESSES}, or gpu"),
        Field(examples=["gpu", 2]),
    ]
    """Number of processes to start on each node; gpu: one per GPU."""
    within: Link
    between: Link
    launcher: Annotated[Launcher, _words(f"one of {', '.join(LAUNCHERS)}")] = "torchrun"
    """Program that starts the processes."""
    interface: Annotated[
        str | None,
        Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=15, examples=["eth0"]),
        _words("the name of a network device such as eth0, or null"),
    ] = None
    """Network device between the nodes; null: gloo, NCCL or MPI choose."""
    rendezvous: Rendezvous = Rendezvous()
    environment: Annotated[
        Mapping[str, str],
        BeforeValidator(_environment),
        Field(examples=[{"NCCL_DEBUG": "INFO"}]),
        _words("a dict of keys and values"),
    ] = dataclasses.field(default_factory=dict)
    """Environment variables of every process, beside the launcher's."""
    image: Annotated[
        str | None,
        Field(pattern=r"^[A-Za-z0-9][\w./:@-]*$", max_length=255, examples=["dist-ssn:latest"]),
        _words("the name of a container image, or null"),
    ] = None
    """Container image (kubernetes)."""
    emulated: StrictBool = False
    """Build it on one machine in the lab: each node is a network namespace, and between is a rate limit."""
    delay_ms: Annotated[StrictFloat, Ge(0), Le(1e5), _words("a number of milliseconds from 0 to 100000")] = 0.0
    """Milliseconds by which the lab delays every packet, one way; part of between.latency_us."""
    loss_percent: Annotated[StrictFloat, Ge(0), Le(99), _words("a number from 0 to 99")] = 0.0
    """Percentage of the packets that the lab drops."""
    name: Annotated[str, Field(exclude=True)] = dataclasses.field(default="cluster", compare=False)
    """Name of the file, without its ending."""

    def rules(self) -> Iterator[Problem]:
        """Rules across keys."""
        if not self.emulated:
            for key in ("delay_ms", "loss_percent"):
                if value := getattr(self, key):
                    yield Problem(key, f"goes with emulated: true, for only the lab can make it so, got {value:g}")
        elif self.processes_per_node == "gpu":
            yield Problem("processes_per_node", "must be a whole number where emulated is true, got 'gpu'")
        elif self.launcher in ("slurm", "kubernetes"):
            text = f"must be torchrun, deepspeed or mpirun where emulated is true, got {self.launcher!r}"
            yield Problem("launcher", text)
        if self.delay_ms * 1000 > self.between.latency_us:
            yield Problem(
                "between.latency_us",
                f"must be at least delay_ms = {self.delay_ms:g} ms = {self.delay_ms * 1000:g} µs, which is part of it, "
                f"got {self.between.latency_us:g}",
            )

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse("Cluster", self.rules())
        return self

    def link(self, nodes: int) -> Link:
        """Link that a collective over this number of nodes waits for."""
        return self.between if nodes > 1 else self.within
