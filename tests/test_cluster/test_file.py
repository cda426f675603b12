"""Cluster files: what is right is read, what is wrong is said at once, and nothing in a file runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dist_ssn.checked import REQUIRED
from dist_ssn.cluster import (
    LAUNCHERS,
    Cluster,
    Link,
    Rendezvous,
    bundled_clusters,
    cluster_keys,
    cluster_schema,
    cluster_to_yaml,
    load_cluster,
)
from dist_ssn.cluster.file import KIND, cluster_from_yaml
from dist_ssn.errors import ClusterError
from testing.write_schemas import text_of

SMALL = "nodes: 1\nprocesses_per_node: 2\nwithin: {latency_us: 50, bandwidth_mbit: 9000}\n"


def problem(text: str) -> str:
    with pytest.raises(ClusterError) as caught:
        cluster_from_yaml(text, "x.yaml")
    message = str(caught.value)
    assert message.startswith("x.yaml") and "\n" not in message and len(message) < 2000
    return message


def test_every_bundled_cluster_is_right_and_says_where_its_figures_come_from() -> None:
    clusters = {name: load_cluster(name) for name in bundled_clusters()}
    known = "emulated-100mbit ethernet-10g ethernet-1g infiniband-200g kubernetes local slurm-gpu wan"
    assert list(clusters) == known.split()
    for name, cluster in clusters.items():
        assert cluster.name == name and cluster.launcher in LAUNCHERS
        assert cluster.between.latency_us >= cluster.within.latency_us or cluster.processes_per_node == 1
        text = bundled_clusters()[name].read_text()
        assert "easured" in text.split("nodes:")[0]
        assert cluster_from_yaml(cluster_to_yaml(cluster, "a\n\nb")) == cluster
    assert clusters["emulated-100mbit"].emulated and clusters["emulated-100mbit"].nodes == 4


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "nodes: 4\nprocesses_per_node: gpu\nlauncher: slurm\ninterface: ib0\nrendezvous: {address: null, port: 1234}\n"
        'environment: {OMP_NUM_THREADS: "4", NCCL_DEBUG: INFO}\nwithin: {latency_us: 1.5, bandwidth_mbit: 1.0e+6}\n'
        "between: {latency_us: 20, bandwidth_mbit: 190000}\n"
    )
    assert load_cluster(path) == Cluster(
        4,
        "gpu",
        Link(1.5, 1e6),
        Link(20, 190000),
        "slurm",
        "ib0",
        Rendezvous(None, 1234),
        {"OMP_NUM_THREADS": "4", "NCCL_DEBUG": "INFO"},
    )
    assert load_cluster(str(path)).name == "mine"
    assert Link(20, 8).latency_seconds == pytest.approx(2e-5) and Link(20, 8).bytes_per_second == 1e6


def test_clusters_made_in_python_are_checked_when_they_are_made() -> None:
    with pytest.raises(ClusterError, match=r"^Link: bandwidth_mbit must be a number of Mbit/s above 0, got 0$"):
        Link(1, 0)
    with pytest.raises(ClusterError, match=r"^Cluster: between is missing: it must be a dict"):
        Cluster(1, 1, Link(1, 1))
    with pytest.raises(ClusterError, match=r"^Cluster: name must be text"):
        Cluster(1, 1, Link(1, 1), Link(1, 1), name=3)
    cluster = Cluster(2, 1, Link(1, 1), Link(1, 1), emulated=True, delay_ms=0.001)
    with pytest.raises(ClusterError, match=r"^Cluster: loss_percent goes with emulated: true"):
        dataclasses.replace(cluster, emulated=False, delay_ms=0, loss_percent=3)


def test_the_schema_beside_the_clusters_is_the_exported_one() -> None:
    folder = bundled_clusters()["local"].parent
    assert (folder / "cluster.schema.json").read_text() == text_of(cluster_schema()), "python -m testing.write_schemas"
    for path in bundled_clusters().values():
        assert path.read_text().startswith("# yaml-language-server: $schema=cluster.schema.json\n")
    assert {key.name for key in cluster_keys() if key.default == REQUIRED} == {
        "nodes",
        "processes_per_node",
        *(f"{link}.{key}" for link in ("within", "between") for key in ("latency_us", "bandwidth_mbit")),
    }
    readme = (folder / "README.md").read_text()
    assert all(f"`{key.name}`" in readme for key in cluster_keys())


def test_a_link_that_no_process_uses_may_be_left_out() -> None:
    assert cluster_from_yaml(SMALL).between == Link(50, 9000)
    lonely = "nodes: 3\nprocesses_per_node: 1\nbetween: {latency_us: 9, bandwidth_mbit: 100}\n"
    assert cluster_from_yaml(lonely).within == Link(9, 100)
    assert "within.latency_us is missing" in problem(lonely.replace("node: 1", "node: 2"))
    assert "between.latency_us is missing" in problem(SMALL.replace("nodes: 1", "nodes: 2"))
    assert problem("nodes: 3\nprocesses_per_node: 1").startswith(
        "x.yaml: 2 problems: (1) between.latency_us is missing"
    )
    assert problem(lonely.replace("100", "0")).startswith("x.yaml: between.bandwidth_mbit must be")
    message = problem("nodes: 1\nprocesses_per_node: 1\nlauncher: x")
    assert message.startswith("x.yaml: 2 problems: (1) launcher must be")
    assert "(2) within is missing: a cluster has at least one link" in message


def test_all_problems_are_told_at_once() -> None:
    message = problem(
        "nodez: 3\nprocesses_per_node: 0\nlauncher: pdsh\nwithin: {latency: 3, bandwidth_mbit: -1}\nrendezvous: {port: 0}\n"
        "environment: {LD_PRELOAD: x, OMP_NUM_THREADS: 1}\nbetween: 3\ndelay_ms: .nan\n"
    )
    for part in (
        "x.yaml: 10 problems: (1) ",
        "unknown key nodez; did you mean nodes?",
        "unknown key within.latency; did you mean within.latency_us?",
        "between must be a dict of keys and values (between.latency_us, between.bandwidth_mbit), got 3",
        "processes_per_node must be a whole number from 1 to 1024, or gpu, got 0",
        "launcher must be one of torchrun, deepspeed, mpirun, slurm, kubernetes, got 'pdsh'",
        "within.bandwidth_mbit must be a number of Mbit/s above 0, got -1",
        "rendezvous.port must be a whole number from 1 to 65535, got 0",
        "delay_ms must be a number of milliseconds from 0 to 100000, got nan",
        "environment.LD_PRELOAD is none of the variables that a cluster file may set",
        'environment.OMP_NUM_THREADS must be text, in quotes if it looks like something else, such as "1", got 1',
    ):
        assert part in message, message


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("interface: -e", "interface must be the name of a network device"),
        ("interface: a b", "interface must be the name of a network device"),
        ("interface: abcdefghijklmnop", "interface must be"),
        ("rendezvous: {address: --help}", "rendezvous.address must be a host name or an IP address"),
        ("rendezvous: {address: $(id)}", "rendezvous.address must be"),
        ("rendezvous: 4", "rendezvous must be a dict"),
        ("image: -x", "image must be the name of a container image"),
        ("between: x", "x.yaml: between must be a dict"),
        ("emulated: 1", "emulated must be true or false, got 1"),
        ("delay_ms: 5", "delay_ms goes with emulated: true"),
        ("loss_percent: 5", "loss_percent goes with emulated: true"),
        ("emulated: true\nlauncher: slurm", "launcher must be torchrun, deepspeed or mpirun where emulated is true"),
        (
            "emulated: true\ndelay_ms: 1\nbetween: {latency_us: 5, bandwidth_mbit: 1}",
            "at least delay_ms = 1 ms = 1000 µs",
        ),
        ("environment: {NCCL_NET_PLUGIN: evil}", "environment.NCCL_NET_PLUGIN is none of the variables"),
        ("environment: {WANDB_API_KEY: secret}", "environment.WANDB_API_KEY is none of the variables"),
        ("environment: {PATH: /x}", "environment.PATH is none of the variables"),
        ("environment: {omp: x}", "environment.omp must have a name of capital letters"),
        ('environment: {NCCL_DEBUG: "a\\nb"}', "one line of at most 1000 printable characters"),
        ('environment: {SBATCH_PARTITION: "a --wrap=id"}', "environment.SBATCH_PARTITION must be one word"),
        ("nodes: 2", "line 4: the key 'nodes' is there twice"),
        ("? {a: 1}\n: 2", "a key must be a name"),
        ("image: &x a", "line 4: anchors and aliases are not for cluster files"),
        ("image: *x", "anchors and aliases"),
        ("image: !!python/object/apply:os.system [id]", "the tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("image: !!str a", "the tag tag:yaml.org,2002:str is not for cluster files"),
        ("image: [[[[a]]]]", "nested more than 3 deep"),
        ("image: [", "this is not valid YAML"),
        ("image: 1:30\nnodes: 0x2", "line 5: the key 'nodes' is there twice"),
        ("delay_ms: 1:30", "delay_ms must be a number of milliseconds from 0 to 100000, got '1:30'"),
        ("emulated: yes", "emulated must be true or false, got 'yes'"),
        ("name:", "unknown key name; known are nodes, processes_per_node, "),
        ("name: mine", "unknown key name; known are nodes, processes_per_node, "),
        (f"image: {'9' * 5000}", "cannot be read"),
        (f"image: {'9' * 4000}", "image must be the name of a container image, or null, got 9999"),
        ("image: \x00", "not a text file"),
    ],
)
def test_mistakes(line: str, wanted: str) -> None:
    assert wanted in problem(f"{SMALL}{line}\n")


def test_what_is_no_cluster_at_all(tmp_path: Path) -> None:
    for text in ("", "[1]", "a", "3", "null", "--- 1\n--- 2"):
        problem(text)
    (tmp_path / "big.yaml").write_text(SMALL + "#" * KIND.most_bytes)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, wanted in (
        ("big.yaml", f"more than {KIND.most_bytes} bytes"),
        ("binary.yaml", "not a text file in UTF-8"),
        ("none.yaml", "does not exist in"),
        ("", "is not a file; the built-in ones are emulated-100mbit, "),
    ):
        with pytest.raises(ClusterError, match=wanted):
            load_cluster(tmp_path / name)
    with pytest.raises(ClusterError, match=r"the cluster 'ethernet-2g' does not exist"):
        load_cluster("ethernet-2g")


_TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
_KEYS = st.sampled_from(
    ["nodes", "processes_per_node", "within", "between", "environment", "rendezvous", "emulated", "delay_ms"]
)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(_TEXT | st.sampled_from(["latency_us", "port"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(_KEYS | _TEXT, _VALUES, max_size=6).map(yaml.safe_dump) | st.text(max_size=200))
def test_any_text_is_a_cluster_or_one_sentence(text: str) -> None:
    try:
        assert isinstance(cluster_from_yaml(text), Cluster)
    except ClusterError as error:
        assert "\n" not in str(error).replace(text, "")
