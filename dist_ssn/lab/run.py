"""A program on the lab's hosts, started by the cluster's launcher: logs, counters, signals, and the exit code."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dist_ssn.cluster import Cluster
from dist_ssn.lab.hosts import Counters, Lab, this_owner
from dist_ssn.lab.network import Network, plan_network
from dist_ssn.launch import Command, Start, build_command
from dist_ssn.launch.run import found

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 30
"""Time for the other hosts to end after one has failed, or after a signal."""
POLL_SECONDS = 0.1
LAST_LINES = 20
"""Lines shown of the log of a host that failed."""
DEFAULTS = {
    "OMP_NUM_THREADS": "1",  # hosts share this machine's cores
    "PYTHONUNBUFFERED": "1",  # what a process prints is in its log at once
    # MPI libraries see that all ranks are on one machine, and would use its memory instead of the emulated links.
    "UCX_TLS": "tcp,self",
    "FI_PROVIDER": "tcp",
}
"""Variables of the hosts' processes, where they are not set already."""


@dataclasses.dataclass
class Stopped:
    """The last signal to this process, and the number of signals."""

    number: int = 0
    count: int = 0


@dataclasses.dataclass(frozen=True)
class LabResult:
    """Result of a run on the lab's hosts.

    Args:
        code: 0; else the exit code of the first host that failed; 128 + the signal's number for one that a signal ended
        logs: folder of host-0.log … and counters.json
        counters: traffic of each host's device during the run
    """

    code: int
    logs: Path
    counters: tuple[Counters, ...]


def host_commands(cluster: Cluster, network: Network, arguments: Sequence[str], logs: Path) -> list[Command]:
    """Commands for the hosts, from host 0 on: a launcher for each, or with mpirun for the first alone."""
    start = Start(
        cluster,
        tuple(arguments),
        nodes=len(network.hosts),
        address=network.hosts[0].address,
        hostfile=None if cluster.launcher == "torchrun" else str(logs / "hostfile"),
    )
    if cluster.launcher == "mpirun":
        command = build_command(start)
        # mpirun's ssh: it goes into a namespace instead of to another machine.
        ssh = {"HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXEC": str(logs / "ssh")}
        return [dataclasses.replace(command, environment={**command.environment, **ssh})]
    return [build_command(dataclasses.replace(start, node_rank=rank)) for rank in range(len(network.hosts))]


def files(cluster: Cluster, network: Network) -> dict[str, str]:
    """Name → content of the launchers' files: a hostfile, and a program in place of ssh."""
    slots = cluster.processes_per_node
    line = {"deepspeed": f"{{}} slots={slots}", "mpirun": f"{{}}:{slots}"}.get(cluster.launcher)
    if line is None:
        return {}
    made = {"hostfile": "".join(f"{line.format(host.address)}\n" for host in network.hosts)}
    if cluster.launcher == "mpirun":
        cases = "".join(
            f'  {host.address}) exec ip netns exec {host.namespace} sh -c "$*" ;;\n' for host in network.hosts
        )
        made["ssh"] = (
            '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\nhost=$1\nshift\ncase $host in\n'
            f'{cases}  *) echo "there is no host $host" >&2; exit 255 ;;\nesac\n'
        )
    return made


def run(
    cluster: Cluster, arguments: Sequence[str], logs: Path, environ: Mapping[str, str], nodes: int | None = None
) -> LabResult:
    """Builds the lab, runs a program on its hosts, shows host 0's output, and removes the lab.

    Args:
        cluster: an emulated cluster
        arguments: the program, as for `dist-ssn launch`
        logs: folder for the hosts' logs and counters.json
        environ: variables of the hosts' processes
        nodes: number of hosts; None: as the cluster says

    Raises:
        ClusterError: the cluster cannot be built or the command is wrong; nothing remains then.
    """
    network = plan_network(cluster, this_owner(), nodes)
    commands = host_commands(cluster, network, arguments, logs)  # its mistakes come before the lab is built
    logs.mkdir(parents=True, exist_ok=True)
    for name, content in files(cluster, network).items():
        (logs / name).write_text(content, encoding="utf-8")
        (logs / name).chmod(0o755)
    with _signals() as stopped, ExitStack() as stack:
        lab = stack.enter_context(Lab(network))
        before = lab.counters()
        processes = []
        for rank, command in enumerate(commands):
            command = found(command, environ.get("PATH", os.defpath))
            log = stack.enter_context((logs / f"host-{rank}.log").open("wb"))
            log.write(f"# {network.hosts[rank].address}: {shlex.join(command.argv)}\n".encode())
            log.flush()
            path = os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", os.defpath)])
            variables = {**DEFAULTS, **environ, **command.environment, "PATH": path}
            processes.append(lab.start(rank, command.argv, variables, log))
        code = _wait(processes, logs, stopped)
        counters = tuple(after - then for after, then in zip(lab.counters(), before, strict=True))
    result = LabResult(code, logs, counters)
    (logs / "counters.json").write_text(
        json.dumps([dataclasses.asdict(count) for count in counters], indent=2) + "\n", encoding="utf-8"
    )
    return result


def _wait(processes: Sequence[subprocess.Popen[bytes]], logs: Path, stopped: Stopped) -> int:
    """Waits for all hosts, passes signals on, and ends the others when one has failed and they do not end by themselves."""
    handed_on = first = 0
    deadline = float("inf")
    with (logs / "host-0.log").open("rb") as shown:
        shown.readline()  # the command
        while True:
            _show(shown.read())
            codes = [process.poll() for process in processes]
            failed = next((index for index, code in enumerate(codes) if code), None)
            if failed is not None and not first and not handed_on:
                first = codes[failed] or 0
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                _tell_failure(failed, first, logs)
            if None not in codes:
                _show(shown.read())
                break
            if stopped.count > handed_on:
                handed_on = stopped.count
                deadline = time.monotonic() + (GRACE_SECONDS if handed_on == 1 else 0)
                for process in processes:
                    if process.poll() is None:
                        os.killpg(process.pid, stopped.number)  # as a terminal does: to the launcher and its processes
            if time.monotonic() > deadline:
                for process in processes:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(POLL_SECONDS)
    if handed_on and any(codes):  # a program may as well end in order when it is asked to
        return 128 + stopped.number
    return first if first >= 0 else 128 - first


def _show(output: bytes) -> None:
    if output:
        sys.stdout.write(output.decode(errors="replace"))
        sys.stdout.flush()


def _tell_failure(host: int, code: int, logs: Path) -> None:
    log = logs / f"host-{host}.log"
    how = f"exit code {code}" if code > 0 else f"signal {-code}"
    if host == 0:  # its output was shown
        print(f"dist-ssn: host 0 ended with {how}; its log is {log}", file=sys.stderr)
    else:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        print(f"dist-ssn: host {host} ended with {how}; the end of {log}:", *last, sep="\n", file=sys.stderr)


@contextmanager
def _signals() -> Iterator[Stopped]:
    """Notes signals instead of raising, so that none interrupts the building or the removal of the lab."""
    stopped = Stopped()

    def note(number: int, _: object) -> None:
        stopped.number = number
        stopped.count += 1

    before = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show_table(network: Network, result: LabResult) -> None:
    """Prints each host's counters."""
    table = Table("host", "address", "sent, bytes", "received, bytes", "packets sent", "log")
    for index, (host, count) in enumerate(zip(network.hosts, result.counters, strict=True)):
        log = result.logs / f"host-{index}.log"
        table.add_row(
            *(
                f"{index}",
                host.address,
                f"{count.sent_bytes:,}",
                f"{count.received_bytes:,}",
                f"{count.sent_packets:,}",
            ),
            str(log) if log.exists() else "",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
