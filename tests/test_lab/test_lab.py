"""The lab itself, on this machine's kernel: rates, counters, delay, loss, and that nothing is left on any way out."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_ssn.cluster import load_cluster
from dist_ssn.errors import ClusterError
from dist_ssn.lab import Lab, plan_network
from dist_ssn.lab import run as lab_run
from dist_ssn.lab.hosts import PACKAGES, remove_stale, this_owner
from dist_ssn.launch import Command

CLUSTER = load_cluster("emulated-100mbit")


def why_not() -> str | None:
    """Why the lab cannot be tried here, or None."""
    missing = sorted({package for name, package in PACKAGES.items() if shutil.which(name) is None})
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "the lab needs Linux and root"
    if missing:
        return f"the lab needs {' and '.join(missing)}: apt-get install {' '.join(missing)}"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return None if tried.returncode == 0 else "no network namespaces may be made here"


pytestmark = [pytest.mark.distributed, pytest.mark.skipif(bool(why_not()), reason=str(why_not()))]
_number = itertools.count()

SERVE = """
import socket
with socket.create_server(("10.77.0.2", 5000)) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    while connection.recv(1 << 20):
        pass
    connection.sendall(b"x")
"""
SEND = """
import socket, sys, time
size = int(sys.argv[1])
start = time.monotonic()
with socket.create_connection(("10.77.0.2", 5000)) as connection:
    connection.sendall(bytes(size))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
print(time.monotonic() - start)
"""
ECHO = """
import socket
with socket.socket(type=socket.SOCK_DGRAM) as box:
    box.bind(("10.77.0.2", 5000))
    print("ready", flush=True)
    while True:
        box.sendto(*box.recvfrom(100))
"""
PING = """
import socket, sys, time
with socket.socket(type=socket.SOCK_DGRAM) as box:
    box.settimeout(float(sys.argv[2]))
    times = []
    for number in range(int(sys.argv[1])):
        start = time.monotonic()
        box.sendto(b"x", ("10.77.0.2", 5000))
        try:
            box.recv(100)
            times.append(time.monotonic() - start)
        except TimeoutError:
            pass
print(len(times), sorted(times)[len(times) // 2])
"""


def lab(**change: object) -> Lab:
    network = plan_network(dataclasses.replace(CLUSTER, **change), this_owner(), nodes=2)
    return Lab(network)


def until(condition: Callable[[], object], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def talk(where: Lab, folder: Path, server: str, client: str, *arguments: str) -> list[float]:
    """Runs a server on host 1 and a client on host 0; returns the numbers that the client prints."""
    said = folder / f"said{next(_number)}"
    with said.open("wb") as log:
        serving = where.start(1, [sys.executable, "-c", server], os.environ, log)
        assert until(lambda: b"ready" in said.read_bytes()), said.read_text()
        with (folder / "client").open("wb") as out:
            assert where.start(0, [sys.executable, "-c", client, *arguments], os.environ, out).wait(60) == 0, (
                folder / "client"
            ).read_text()
        serving.kill()
        serving.wait()
    return [float(word) for word in (folder / "client").read_text().split()]


def namespaces(owner: str = "") -> list[str]:
    names = [path.name for path in Path("/run/netns").iterdir()] if Path("/run/netns").exists() else []
    return [name for name in names if name.startswith(f"dssn-lab-{owner or os.getpid()}")]


def test_rate_and_counters_and_two_labs_side_by_side(tmp_path: Path) -> None:
    size = 3_000_000
    with lab() as one, lab() as other:
        before = one.counters()
        seconds = talk(one, tmp_path, SERVE, SEND, str(size))[0]
        sent, received = (after - then for after, then in zip(one.counters(), before, strict=True))
        assert size < sent.sent_bytes < 1.06 * size and sent.sent_bytes == pytest.approx(
            received.received_bytes, abs=2000
        )
        assert seconds > 0.9 * (size - 100_000) * 8 / 95.6e6  # the rate limit's burst comes at once
        assert max(count.sent_bytes for count in other.counters()) < 2000  # same addresses, another network
        assert len(namespaces()) == 6
    assert not namespaces()


def test_delay(tmp_path: Path) -> None:
    if not Path("/dev/net/tun").exists():
        pytest.skip("there is no /dev/net/tun, so no delay can be emulated")
    between = dataclasses.replace(CLUSTER.between, latency_us=20_100)
    with lab(delay_ms=20, between=between) as where:
        count, seconds = talk(where, tmp_path, ECHO, PING, "20", "2")
        assert count == 20 and 0.040 < seconds < 0.080
        assert talk(where, tmp_path, SERVE, SEND, "3000000")[0] < 10  # large packets pass the relay too
    assert not namespaces()


def test_loss(tmp_path: Path) -> None:
    with lab(loss_percent=30) as where:
        count = talk(where, tmp_path, ECHO, PING, "200", "0.01")[0]
        assert 0.3 * 200 < count < 0.7 * 200  # 0.7 × 0.7 of them come there and back
    assert not namespaces()


def test_nothing_is_left_when_the_kernel_refuses() -> None:
    where = lab(interface="lo")  # there is one already
    with pytest.raises(ClusterError, match="the lab cannot be built here: ip -n dssn-lab-"):
        where.__enter__()
    assert not namespaces()


def test_a_host_that_fails_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for torchrun: host 0 would go on for long, and host 1 fails."""
    program = "import sys, time; print('hello', flush=True); sys.exit(3) if sys.argv[1] == '1' else time.sleep(100)"
    monkeypatch.setattr(
        lab_run,
        "found",
        lambda command, path: Command((sys.executable, "-c", program, command.argv[4]), command.environment),
    )
    monkeypatch.setattr(lab_run, "GRACE_SECONDS", 1)
    before = signal.getsignal(signal.SIGTERM)
    result = lab_run.run(CLUSTER, ["train"], tmp_path / "logs", os.environ, nodes=2)
    assert result.code == 3 and len(result.counters) == 2 and signal.getsignal(signal.SIGTERM) is before
    out, err = capsys.readouterr()
    assert out == "hello\n" and "host 1 ended with exit code 3; the end of" in err
    assert (tmp_path / "logs" / "host-1.log").read_text().startswith("# 10.77.0.2: ")
    assert len(json.loads((tmp_path / "logs" / "counters.json").read_text())) == 2
    assert not namespaces()


SLEEPER = """
import os, time
print("sleeping", os.environ["RANK"], flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_lab_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    command = [sys.executable, "-m", "dist_ssn.cli", "lab", "run", "--cluster=emulated-100mbit", "--nodes=2"]
    with (tmp_path / "said").open("wb") as said:
        job = subprocess.Popen(
            [*command, f"--logs={tmp_path}", "--", "sleeper.py"],
            stdout=said,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent.parent)},
            start_new_session=True,
        )
    logs = [tmp_path / "host-0.log", tmp_path / "host-1.log"]
    try:
        started = until(lambda: all(log.exists() and "sleeping" in log.read_text() for log in logs), 60)
        assert started, (tmp_path / "said").read_text()
        assert len(namespaces(f"{job.pid}x")) == 3
        os.killpg(job.pid, number)  # as a terminal does
        code = job.wait(60)
    finally:
        job.kill()
        job.wait()
        stale = remove_stale()
    assert not namespaces(f"{job.pid}x")
    if number == signal.SIGKILL:
        assert code == -9 and len(stale) == 3 and all(name.startswith(f"dssn-lab-{job.pid}x") for name in stale)
    else:
        assert code == 128 + number and not stale, (tmp_path / "said").read_text()
        assert "10.77.0.2" in (tmp_path / "said").read_text()  # the table of counters
    listed = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in listed.splitlines() if "sleeper.py" in line]
