"""A cable with a delay: pairs of TAP devices; frames towards the switch are carried late.

    python -m dist_ssn.lab.relay DELAY_US NAMESPACE:DEVICE:SWITCH:PORT ...

For kernels without netem. Each frame has the header by which the kernel leaves the cutting of large frames (up to 64 KiB) to the
device. The relay passes it on, so that one read carries many packets. It prints "ready" once the devices exist, and ends with its
standard input, that is, with its parent; the devices end with the relay.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import heapq
import itertools
import os
import select
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

CLONE_NEWNET = 0x40000000
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0  # <linux/if_tun.h>
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN = 1, 2, 4, 8
LARGEST = 10 + 14 + 65_536 + 4_096  # bytes: the header, Ethernet's header, a packet, and a margin
AT_ONCE = 64  # frames of one device before the other devices have their turn


@dataclass(frozen=True)
class Wire:
    """Two ends in two namespaces: a host's device and the switch's port."""

    host: str
    device: str
    switch: str
    port: str


def enter(namespace: str) -> None:
    """Moves this process into a network namespace; its open files stay as they are."""
    libc = ctypes.CDLL(None, use_errno=True)  # Python has os.setns from 3.12 on
    with open(f"/run/netns/{namespace}", "rb") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")


def open_tap(namespace: str, name: str) -> int:
    """A new TAP device in a namespace, as the descriptor from which its frames are read."""
    enter(namespace)
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(descriptor, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN)
    return descriptor


def carry(wires: Sequence[tuple[int, int]], delay_seconds: float, lifeline: int) -> None:
    """Carries frames between the two descriptors of each wire until `lifeline` ends.

    Args:
        wires: descriptors of a host's device and of the switch's port
        delay_seconds: delay of each frame from the first to the second
        lifeline: descriptor whose end ends this
    """
    other = {a: b for pair in wires for a, b in (pair, pair[::-1])}
    late = {host: delay_seconds for host, _ in wires}
    waiting: list[tuple[float, int, int, bytes]] = []  # when due, a number that keeps the order, where to, the frame
    number = itertools.count()
    sources = [lifeline, *other]
    while True:
        patience = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready = select.select(sources, [], [], patience)[0]
        if lifeline in ready and not os.read(lifeline, 1):
            return
        now = time.monotonic()
        for source in ready:
            for frame in _frames(source) if source != lifeline else ():
                if source in late:
                    heapq.heappush(waiting, (now + late[source], next(number), other[source], frame))
                else:
                    _write(other[source], frame)
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, target, frame = heapq.heappop(waiting)
            _write(target, frame)


def _frames(source: int) -> Sequence[bytes]:
    frames = []
    for _ in range(AT_ONCE):
        try:
            frames.append(os.read(source, LARGEST))
        except BlockingIOError:
            break
        except OSError:  # the device is down: nothing comes from it
            break
    return frames


def _write(target: int, frame: bytes) -> None:
    try:
        os.write(target, frame)
    except OSError:
        return  # a device that is down, or a full one, drops what it is sent, as a cable does


def main(arguments: Sequence[str]) -> int:
    """Makes the devices that the command line names, and carries their frames; returns an exit code."""
    delay_us, *names = arguments
    try:
        wires = [Wire(*name.split(":")) for name in names]
        pairs = [(open_tap(wire.host, wire.device), open_tap(wire.switch, wire.port)) for wire in wires]
    except OSError as error:
        print(f"no TAP device can be made ({error.strerror or error})", flush=True)
        return 1
    print("ready", flush=True)
    gc.disable()  # nothing here makes cycles, and a pause would be a delay
    carry(pairs, float(delay_us) / 1e6, sys.stdin.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
