"""Closed formulas for a network against the same collectives played message by message."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ssn.cluster import Link, load_cluster
from dist_ssn.cost.engines import HALVES, footprint
from dist_ssn.cost.fabric import ALGORITHMS, Fabric, fabric_of
from tests.test_cost import events

LINKS = st.builds(Link, st.floats(0.1, 1e5), st.floats(1, 1e6))
PAYLOADS = st.floats(1, 1e9)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), PAYLOADS, LINKS)
def test_a_ring_takes_as_long_as_its_messages(n: int, payload: float, link: Link) -> None:
    told = Fabric(n, 1, link, link).all_reduce_seconds(payload, "ring")
    assert told == pytest.approx(events.all_reduce(n, payload, link))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(1, 8), PAYLOADS, LINKS, LINKS)
def test_nodes_and_devices_take_as_long_as_their_messages(
    m: int, g: int, payload: float, within: Link, between: Link
) -> None:
    told = Fabric(m, g, within, between).all_reduce_seconds(payload, "hierarchical")
    assert told == pytest.approx(events.hierarchical(m, g, payload, within, between))


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 300), PAYLOADS, LINKS)
def test_trees_are_a_bound_that_many_parts_come_near(n: int, payload: float, link: Link) -> None:
    """Both trees carry half each, and a link serves both: as much as one tree with all of it, up and then down."""
    told = Fabric(n, 1, link, link).all_reduce_seconds(payload, "trees")
    # One tree's way up and its way down overlap when it is pipelined, so its messages alone may take half.
    alone = Fabric(n, 1, link, link).all_reduce_seconds(0, "trees")
    assert alone + (told - alone) / 2 == pytest.approx(events.trees(n, payload, link, 4000), rel=0.02)


def test_more_processes_make_trees_win_and_more_bytes_make_rings_win() -> None:
    link = Link(latency_us=50, bandwidth_mbit=1000)
    fabric = Fabric(4096, 1, link, link, "best")
    small, large = 1e4, 1e12
    assert fabric.all_reduce_seconds(small) == fabric.all_reduce_seconds(small, "trees")
    assert fabric.all_reduce_seconds(large) == fabric.all_reduce_seconds(large, "ring")
    assert all(Fabric(1, 1, link, link).all_reduce_seconds(small, one) == 0 for one in ALGORITHMS)


def test_processes_of_a_cluster() -> None:
    local = load_cluster("local")
    gpus = load_cluster("infiniband-200g")
    assert fabric_of(local, 2, 2).link == local.within
    assert fabric_of(gpus, 64, 8) == Fabric(8, 8, gpus.within, gpus.between, "best")
    assert fabric_of(gpus, 3, 8).nodes == 1
    assert fabric_of(gpus, 9, 8).nodes == 2
    faster = fabric_of(gpus, 64, 8).at(5.0)
    assert (faster.link.bandwidth_mbit, faster.within, faster.link.latency_us) == (
        5.0,
        gpus.within,
        gpus.between.latency_us,
    )


@pytest.mark.parametrize("engine", HALVES)
@pytest.mark.parametrize("n", [2, 4, 64])
def test_an_engine_takes_as_long_as_the_messages_of_its_bytes(engine: str, n: int) -> None:
    """Bytes are held against measured ones in benchmarks/tests/test_engine_bytes.py."""
    link = Link(100, 1000)
    found = footprint(engine, 1000, Fabric(n, 1, link, link))
    one = 2 * (n - 1) / n * 4000  # bytes of one all-reduce
    assert found.seconds == pytest.approx(found.wire_bytes / one * events.all_reduce(n, 4000, link))


def test_what_engines_keep() -> None:
    link = Link(100, 1000)
    kept = {engine: footprint(engine, 1000, Fabric(4, 1, link, link)).kept for engine in HALVES}
    whole = 4000
    assert kept["ddp"] == kept["mpi"] == kept["zero-0"] == 4 * whole
    assert kept["zero-1"] == 2 * whole + 2 * whole / 4
    assert kept["zero-2"] == whole + 3 * whole / 4
    assert kept["zero-3"] == kept["fsdp"] == 4 * whole / 4
    half = footprint("ddp", 1000, Fabric(4, 1, link, link), compress="fp16")
    assert half.wire_bytes == footprint("ddp", 1000, Fabric(4, 1, link, link)).wire_bytes / 2


def test_more_processes_take_longer() -> None:
    wan = load_cluster("wan")
    seconds = [fabric_of(wan, n, 1).all_reduce_seconds(1e6) for n in (1, 2, 64, 4096)]
    assert seconds == sorted(seconds) and seconds[0] == 0
