"""Seconds of an exchange of `dist_ssn.sync`: on the network, and in encoding and decoding. Pure arithmetic.

Letters: S bytes that each worker hands in, n workers.
"""

from __future__ import annotations

from dist_ssn.cost.fabric import Fabric
from dist_ssn.cost.rates import Rates
from dist_ssn.sync import routes
from dist_ssn.sync.codecs import find_codec
from dist_ssn.sync.rounds import Vector


def gather_seconds(payload: float, workers: int, fabric: Fabric) -> float:
    """Seconds of an all-gather of S bytes: n - 1 rounds in a ring. gloo's receiver announces each, which is one more latency."""
    if workers < 2:
        return 0.0
    return (workers - 1) * (latencies(fabric) * fabric.link.latency_seconds + payload / fabric.link.bytes_per_second)


def all_to_all_seconds(payload: float, workers: int, fabric: Fabric) -> float:
    """Seconds of an all-to-all of S bytes, all messages at once; the workers of a node share its link."""
    if workers < 2:
        return 0.0
    per_node = 1 if fabric.nodes < 2 else workers / fabric.nodes
    away = (workers - per_node) / workers if fabric.nodes > 1 else (workers - 1) / workers
    return latencies(fabric) * fabric.link.latency_seconds + per_node * away * payload / fabric.link.bytes_per_second


def exchange_seconds(vector: Vector, codec: str, workers: int, fabric: Fabric) -> float:
    """Seconds of an exchange on the network."""
    found = routes.traffic(find_codec(codec), vector.values, vector.plain, workers)
    if found.route == "all-reduce":
        alone = fabric.all_reduce_seconds(0) if latencies(fabric) > 1 else 0.0
        return fabric.all_reduce_seconds(found.packed_bytes) + alone
    gathered = gather_seconds(found.handed.get("all_gather", 0), workers, fabric)
    if found.route == "all-gather":
        return gathered
    return gathered + all_to_all_seconds(found.handed["all_to_all"], workers, fabric)


def coding_seconds(vector: Vector, codec: str, workers: int, rates: Rates) -> float:
    """Seconds in which a worker encodes and decodes in an exchange."""
    found = routes.traffic(find_codec(codec), vector.values, vector.plain, workers)
    if found.route == "all-reduce" or workers < 2:
        return 0.0
    seconds = 0.0
    for kind, values in routes.lanes_of(find_codec(codec), vector.values, vector.plain):
        encode, decode = rates.encode[kind.name], rates.decode[kind.name]
        if found.route == "all-gather":
            seconds += values * (encode + workers * decode)
        else:  # the parts of its own piece, its mean, and all means
            seconds += values * (encode + decode + encode / workers + decode)
    return seconds


def latencies(fabric: Fabric) -> int:
    """Latencies of a round: gloo's receiver announces that it is ready, NCCL's does not."""
    return 2 if fabric.algorithm == "ring" else 1
