"""The lab's network and the commands that make it, as pure functions of a cluster.

    host 0: e0 ── v0 ┐
    host 1: e0 ── v1 ┤ bridge, in a namespace of its own
    host 2: e0 ── v2 ┘

Every name lies in a namespace that belongs to one run. So nothing is added to the machine's own network, several labs run beside
each other with the same addresses, and deleting the namespaces removes everything.

With a delay, e0 and v0 are not the two ends of one pair, but two TAP devices with a small relay between them (relay.py).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dist_ssn.cluster import Cluster
from dist_ssn.errors import ClusterError

PREFIX = "dssn-lab"
DEVICE = "e0"  # for a cluster file without an interface
ADDRESS = "10.77.0.1"
MAX_HOSTS = 64
BURST_SECONDS, LEAST_BURST, LARGEST_BURST = 0.005, 16_384, 1 << 20  # of the rate limit, in seconds and bytes
QUEUE_SECONDS, LEAST_QUEUE = 0.05, 625_000  # queue of a port, in seconds of its rate; its least size in bytes
ON_LINE = 1514 / 1448  # bytes of an Ethernet frame per byte of a program's data in it: TCP and IP take the rest


@dataclass(frozen=True)
class Host:
    """An emulated host: a network namespace, its address, and the name of its port at the switch."""

    namespace: str
    address: str
    port: str


@dataclass(frozen=True)
class Network:
    """The lab's network.

    Args:
        hosts: in the order of their ranks
        switch: namespace of the bridge
        device: name of the network device in each host
        prefix: length of the hosts' common network's prefix
        rate_bit: bit/s on the line of each host, in each direction
        delay_us: microseconds by which each packet is held on its way to the switch
        loss_percent: percentage of packets that a host loses on receiving
    """

    hosts: tuple[Host, ...]
    switch: str
    device: str
    prefix: int
    rate_bit: int
    delay_us: float = 0.0
    loss_percent: float = 0.0

    @property
    def namespaces(self) -> tuple[str, ...]:
        """Namespaces of the hosts, then that of the switch."""
        return (*(host.namespace for host in self.hosts), self.switch)


def plan_network(cluster: Cluster, owner: str, nodes: int | None = None) -> Network:
    """The network of a cluster.

    Args:
        cluster: an emulated cluster
        owner: letters and digits that distinguish the names of this run
        nodes: number of hosts; None: as the cluster says

    Raises:
        ClusterError: the lab cannot build this cluster.
    """
    count = cluster.nodes if nodes is None else nodes
    if not cluster.emulated:
        raise ClusterError(
            f"cluster {cluster.name}: the lab builds emulated clusters only: say emulated: true in a copy of its file"
        )
    if not 2 <= count <= MAX_HOSTS:
        raise ClusterError(f"cluster {cluster.name}: the lab has from 2 to {MAX_HOSTS} hosts, got {count}")
    try:
        first = ipaddress.IPv4Address(cluster.rendezvous.address or ADDRESS)
    except ValueError:
        raise ClusterError(
            f"cluster {cluster.name}: rendezvous.address must be an IPv4 address for the lab, such as {ADDRESS}, "
            f"got {cluster.rendezvous.address!r}"
        ) from None
    net = ipaddress.IPv4Network((int(first) & 0xFFFF0000, 16))
    if first + count > net.broadcast_address or first == net.network_address:
        raise ClusterError(f"cluster {cluster.name}: {count} addresses from {first} on do not lie in one /16 network")
    hosts = tuple(Host(f"{PREFIX}-{owner}-h{i}", str(first + i), f"v{i}") for i in range(count))
    return Network(
        hosts,
        f"{PREFIX}-{owner}-sw",
        cluster.interface or DEVICE,
        net.prefixlen,
        round(cluster.between.bandwidth_mbit * ON_LINE * 1e6),
        cluster.delay_ms * 1000,
        cluster.loss_percent,
    )


def owner_of(namespace: str) -> str | None:
    """Owner of a lab's namespace, from its name; None: the namespace is not a lab's."""
    match = re.fullmatch(rf"{PREFIX}-([a-z0-9]+)-(?:h\d+|sw)", namespace)
    return match[1] if match else None


def namespace_commands(network: Network) -> list[tuple[str, ...]]:
    """The namespaces, and the switch without its ports."""
    made = [("ip", "netns", "add", name) for name in network.namespaces]
    switch = ("ip", "-n", network.switch, "link")
    return [*made, (*switch, "add", "br0", "type", "bridge"), (*switch, "set", "br0", "up")]


def cable_commands(network: Network) -> list[tuple[str, ...]]:
    """A cable from each host to the switch; the relay makes its own."""
    add = ("ip", "-n", network.switch, "link", "add")
    return [
        (*add, host.port, "type", "veth", "peer", "name", network.device, "netns", host.namespace)
        for host in network.hosts
    ]


def address_commands(network: Network) -> list[tuple[str, ...]]:
    """Addresses, rate limits and loss; then every device is switched on."""
    commands: list[tuple[str, ...]] = []
    for host in network.hosts:
        inside, device = ("ip", "-n", host.namespace), network.device
        commands += [
            # No IPv6 address: its neighbour discovery would be counted as the program's bytes.
            (*inside, "link", "set", device, "addrgenmode", "none"),
            (*inside, "addr", "add", f"{host.address}/{network.prefix}", "dev", device),
            (*inside, "link", "set", "lo", "up"),
            # The host's way out, and the switch's way to it: a full-duplex link.
            ("tc", "-n", host.namespace, "qdisc", "add", "dev", device, "root", *_limit(network.rate_bit)),
            ("tc", "-n", network.switch, "qdisc", "add", "dev", host.port, "root", *_limit(network.rate_bit)),
            (*inside, "link", "set", device, "up"),
            ("ip", "-n", network.switch, "link", "set", host.port, "addrgenmode", "none", "master", "br0", "up"),
        ]
        if network.loss_percent:
            # Else the kernel hands on up to 64 KiB as one packet, and would drop as much at once.
            commands.append((*inside, "link", "set", device, "gso_max_segs", "1"))
            commands += _loss_commands(host, network)
    return commands


def _limit(rate_bit: int) -> tuple[str, ...]:
    burst = min(max(int(rate_bit / 8 * BURST_SECONDS), LEAST_BURST), LARGEST_BURST)
    queue = max(int(rate_bit / 8 * QUEUE_SECONDS), LEAST_QUEUE)
    return ("tbf", "rate", f"{rate_bit}bit", "burst", str(burst), "limit", str(burst + queue))


def _loss_commands(host: Host, network: Network) -> Sequence[tuple[str, ...]]:
    nft = ("ip", "netns", "exec", host.namespace, "nft", "add")
    dropped = ("numgen", "random", "mod", "1000000", "<", str(round(network.loss_percent * 10_000)), "drop")
    return (
        (*nft, "table", "inet", "lab"),
        (*nft, "chain", "inet", "lab", "in", "{ type filter hook input priority 0; }"),
        (*nft, "rule", "inet", "lab", "in", "iifname", network.device, *dropped),
    )
