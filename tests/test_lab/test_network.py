"""The lab's network as commands, without running one."""

from __future__ import annotations

import dataclasses
import os

import pytest

from dist_ssn.cli.entry import main
from dist_ssn.cluster import Cluster, Link, Rendezvous, load_cluster
from dist_ssn.errors import ClusterError
from dist_ssn.lab.hosts import require, this_owner
from dist_ssn.lab.network import address_commands, cable_commands, namespace_commands, owner_of, plan_network
from dist_ssn.lab.run import files, host_commands

CLUSTER = load_cluster("emulated-100mbit")


def words(commands: list[tuple[str, ...]]) -> list[str]:
    return [" ".join(command) for command in commands]


def test_every_name_is_the_run_s_own() -> None:
    network = plan_network(CLUSTER, "7x9", nodes=2)
    assert [dataclasses.astuple(host) for host in network.hosts] == [
        ("dssn-lab-7x9-h0", "10.77.0.1", "v0"),
        ("dssn-lab-7x9-h1", "10.77.0.2", "v1"),
    ]
    assert words(namespace_commands(network)) == [
        "ip netns add dssn-lab-7x9-h0",
        "ip netns add dssn-lab-7x9-h1",
        "ip netns add dssn-lab-7x9-sw",
        "ip -n dssn-lab-7x9-sw link add br0 type bridge",
        "ip -n dssn-lab-7x9-sw link set br0 up",
    ]
    assert words(cable_commands(network))[1] == (
        "ip -n dssn-lab-7x9-sw link add v1 type veth peer name e0 netns dssn-lab-7x9-h1"
    )
    limit = "root tbf rate 99957459bit burst 62473 limit 687473"
    assert words(address_commands(network))[7:] == [
        "ip -n dssn-lab-7x9-h1 link set e0 addrgenmode none",
        "ip -n dssn-lab-7x9-h1 addr add 10.77.0.2/16 dev e0",
        "ip -n dssn-lab-7x9-h1 link set lo up",
        f"tc -n dssn-lab-7x9-h1 qdisc add dev e0 {limit}",
        f"tc -n dssn-lab-7x9-sw qdisc add dev v1 {limit}",
        "ip -n dssn-lab-7x9-h1 link set e0 up",
        "ip -n dssn-lab-7x9-sw link set v1 addrgenmode none master br0 up",
    ]
    # Every command names a namespace of the run: none touches the machine's own network.
    for command in (*namespace_commands(network), *cable_commands(network), *address_commands(network)):
        assert any("dssn-lab-7x9-" in word for word in command), command


def test_loss_is_a_share_of_single_packets() -> None:
    lossy = plan_network(dataclasses.replace(CLUSTER, loss_percent=2.5), "1x1")
    said = words(address_commands(lossy))
    assert "ip -n dssn-lab-1x1-h3 link set e0 gso_max_segs 1" in said
    assert said[-1].endswith("nft add rule inet lab in iifname e0 numgen random mod 1000000 < 25000 drop")


def test_whose_a_namespace_is() -> None:
    assert owner_of("dssn-lab-7x9-h12") == owner_of("dssn-lab-7x9-sw") == "7x9"
    for name in ("h0", "dssn-lab", "dssn-lab-7x9", "dssn-lab-7x9-x", "my-dssn-lab-7x9-h0", "dssn-lab-7x9-h0-x"):
        assert owner_of(name) is None
    assert this_owner().startswith(f"{os.getpid()}x") and this_owner() != this_owner()


@pytest.mark.parametrize(
    ("change", "nodes", "wanted"),
    [
        ({"emulated": False}, None, "the lab builds emulated clusters only: say emulated: true in a copy of its file"),
        ({}, 1, "the lab has from 2 to 64 hosts, got 1"),
        ({}, 65, "the lab has from 2 to 64 hosts, got 65"),
        ({"rendezvous": Rendezvous("host")}, None, "rendezvous.address must be an IPv4 address for the lab"),
        ({"rendezvous": Rendezvous("10.77.255.253")}, None, "4 addresses from 10.77.255.253 on do not lie in one /16"),
    ],
)
def test_clusters_that_the_lab_cannot_build(change: dict, nodes: int | None, wanted: str) -> None:
    with pytest.raises(ClusterError, match="cluster emulated-100mbit: ") as caught:
        plan_network(dataclasses.replace(CLUSTER, **change), "1x1", nodes)
    assert wanted in str(caught.value)


def test_without_root_it_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.chdir(tmp_path)
    for arguments in (["run", "--cluster=emulated-100mbit", "--", "train"], ["clean"]):
        assert main(["lab", *arguments]) == 2
        assert "the lab needs root, for it makes network namespaces and limits their rate" in capsys.readouterr().err


def test_a_missing_program_is_named_by_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: None if name in ("nft", "tc") else name)
    with pytest.raises(ClusterError, match="the lab needs iproute2 and nftables"):
        require(loss=True)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["run"], "dist-ssn lab run needs --cluster"),
        (["run", "--cluster=local", "--", "train"], "cluster local: the lab builds emulated clusters only"),
        (["run", "--cluster=emulated-100mbit", "--", "trian"], "unknown command 'trian'"),
        (["run", "--cluster=emulated-100mbit"], "name what to start after two dashes"),
        (["walk"], "invalid choice: 'walk'"),
    ],
)
def test_mistakes(arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["lab", *arguments]) == 2
    assert wanted in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_each_launcher_on_the_hosts(tmp_path) -> None:
    def started(launcher: str) -> tuple[list[str], dict[str, str], list[dict]]:
        cluster = dataclasses.replace(CLUSTER, launcher=launcher)
        network = plan_network(cluster, "1x1", nodes=2)
        commands = host_commands(cluster, network, ["train"], tmp_path)
        return (
            [" ".join(command.argv) for command in commands],
            files(cluster, network),
            [dict(command.environment) for command in commands],
        )

    lines, made, variables = started("torchrun")
    assert not made and [line[:53] for line in lines] == [
        f"torchrun --nnodes 2 --node-rank {rank} --master-addr 10.77" for rank in (0, 1)
    ]
    assert variables[1] == {"GLOO_SOCKET_IFNAME": "e0", "NCCL_SOCKET_IFNAME": "=e0"}
    lines, made, _ = started("deepspeed")
    assert made == {"hostfile": "10.77.0.1 slots=1\n10.77.0.2 slots=1\n"}
    assert f"--hostfile {tmp_path}/hostfile" in lines[1] and "--no_ssh --node_rank 1" in lines[1]
    lines, made, variables = started("mpirun")
    assert len(lines) == 1 and made["hostfile"] == "10.77.0.1:1\n10.77.0.2:1\n"
    assert '10.77.0.2) exec ip netns exec dssn-lab-1x1-h1 sh -c "$*" ;;' in made["ssh"]
    assert variables[0]["HYDRA_LAUNCHER_EXEC"] == f"{tmp_path}/ssh" and variables[0]["MASTER_ADDR"] == "10.77.0.1"


def test_links_of_a_cluster() -> None:
    cluster = Cluster(2, 2, Link(1, 2), Link(3, 4))
    assert (cluster.link(1), cluster.link(2)) == (Link(1, 2), Link(3, 4))
