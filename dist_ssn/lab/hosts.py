"""The lab's network: built, used, read and removed."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dist_ssn.errors import ClusterError
from dist_ssn.lab.network import Network, address_commands, cable_commands, namespace_commands, owner_of

PACKAGES = {"ip": "iproute2", "tc": "iproute2", "nft": "nftables"}
END_SECONDS = 5
"""Time between asking the hosts' processes to end and ending them."""
_labs = itertools.count()


@dataclass(frozen=True)
class Counters:
    """Traffic of a host's network device so far, headers included."""

    sent_bytes: int
    received_bytes: int
    sent_packets: int
    received_packets: int

    def __sub__(self, before: Counters) -> Counters:
        return Counters(*(getattr(self, name) - value for name, value in vars(before).items()))


class Lab:
    """A network of emulated hosts, as a context manager: built on entering, removed on leaving, whatever happened inside.

    Raises:
        ClusterError: on entering: this user is not root, a program is missing, or the kernel refused a command.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._relay: subprocess.Popen[str] | None = None

    def __enter__(self) -> Lab:
        require(loss=self.network.loss_percent > 0)
        remove_stale()
        try:
            _run_all(namespace_commands(self.network))
            if self.network.delay_us:
                self._start_relay()
            else:
                _run_all(cable_commands(self.network))
            _run_all(address_commands(self.network))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process on the hosts, and removes the network; a second call does nothing."""
        end_processes(self.network.namespaces)
        if self._relay is not None:
            assert self._relay.stdin is not None
            self._relay.stdin.close()  # its sign to end
            try:
                self._relay.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._relay.kill()
                self._relay.wait()
            if self._relay.stdout is not None:
                self._relay.stdout.close()
            self._relay = None
        remove(self.network.namespaces)

    def start(
        self, host: int, argv: Sequence[str], environment: Mapping[str, str], log: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """Starts a program on a host, in its own session: a terminal's Ctrl-C does not reach it."""
        inside = ["ip", "netns", "exec", self.network.hosts[host].namespace]
        return subprocess.Popen(
            [*inside, *argv],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def counters(self) -> list[Counters]:
        """Counters of each host's device."""
        return [_counters(host.namespace, self.network.device) for host in self.network.hosts]

    def _start_relay(self) -> None:
        network = self.network
        wires = [f"{host.namespace}:{network.device}:{network.switch}:{host.port}" for host in network.hosts]
        self._relay = subprocess.Popen(
            [sys.executable, "-m", "dist_ssn.lab.relay", str(network.delay_us), *wires],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._relay.stdout is not None
        said = self._relay.stdout.readline()  # it says one line, or ends
        if said != "ready\n":
            raise ClusterError(f"delay_ms cannot be emulated here: {said.strip() or 'the relay ended without a word'}")


def require(loss: bool = False) -> None:
    """Checks that a lab can be built here.

    Args:
        loss: with packet loss

    Raises:
        ClusterError: this is not Linux, this user is not root, or a program is missing.
    """
    if not sys.platform.startswith("linux"):
        raise ClusterError(f"the lab needs Linux, for its hosts are network namespaces, and this is {sys.platform}")
    if os.geteuid() != 0:
        raise ClusterError(
            "the lab needs root, for it makes network namespaces and limits their rate: start it with sudo"
        )
    wanted = ["ip", "tc", *(["nft"] if loss else [])]
    missing = sorted({PACKAGES[name] for name in wanted if shutil.which(name) is None})
    if missing:
        raise ClusterError(f"the lab needs {' and '.join(missing)}: install the package of that name")


def this_owner() -> str:
    """Part of a lab's names that identifies the process it belongs to: its number, its start time, and a count of its labs."""
    return f"{os.getpid()}x{_start_time(os.getpid())}n{next(_labs)}"


def remove_stale() -> list[str]:
    """Removes the namespaces of labs whose process was killed, and the processes in them.

    Returns:
        Names of the removed namespaces.
    """
    listed = _run(("ip", "-j", "netns", "list")).stdout.strip()
    names = [entry["name"] for entry in json.loads(listed or "[]")]
    stale = [name for name in names if (owner := owner_of(name)) and not _is_alive(owner)]
    end_processes(stale)
    remove(stale)
    return stale


def end_processes(namespaces: Iterable[str]) -> None:
    """Ends every process in these namespaces: SIGTERM, and after END_SECONDS SIGKILL."""
    names = [name for name in namespaces if Path("/run/netns", name).exists()]
    for number, seconds in ((signal.SIGTERM, END_SECONDS), (signal.SIGKILL, END_SECONDS)):
        for pid in _pids(names):
            _signal(pid, number)
        if _until(lambda: not _pids(names), seconds):
            return


def remove(namespaces: Iterable[str]) -> None:
    """Removes those of the namespaces that exist, with the devices in them."""
    for name in namespaces:
        if Path("/run/netns", name).exists():
            _run(("ip", "netns", "del", name), check=False)


def _pids(namespaces: Iterable[str]) -> list[int]:
    return [int(pid) for name in namespaces for pid in _run(("ip", "netns", "pids", name), check=False).stdout.split()]


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it was faster


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _is_alive(owner: str) -> bool:
    match = re.fullmatch(r"(\d+)x(\d+)n\d+", owner)
    return match is not None and _start_time(int(match[1])) == match[2]


def _start_time(pid: int) -> str:
    """Start time of a process in clock ticks since boot; with the number, it identifies the process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _counters(namespace: str, device: str) -> Counters:
    stats = json.loads(_run(("ip", "-n", namespace, "-j", "-s", "link", "show", "dev", device)).stdout)[0]["stats64"]
    sent, received = stats["tx"], stats["rx"]
    return Counters(sent["bytes"], received["bytes"], sent["packets"], received["packets"])


def _run_all(commands: Iterable[tuple[str, ...]]) -> None:
    for command in commands:
        _run(command)


def _run(command: tuple[str, ...], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    # A session of its own, so that Ctrl-C does not end it half-way.
    result = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    if check and result.returncode:
        raise ClusterError(f"the lab cannot be built here: {' '.join(command)}: {' '.join(result.stderr.split())}")
    return result
