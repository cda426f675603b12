"""Facts about a cluster, read by launch, cost model and lab: `clusters/*.yaml` as frozen values."""

from dist_ssn.cluster.file import bundled_clusters, cluster_keys, cluster_schema, cluster_to_yaml, load_cluster
from dist_ssn.cluster.types import LAUNCHERS, Cluster, Link, Rendezvous

__all__ = [
    "LAUNCHERS",
    "Cluster",
    "Link",
    "Rendezvous",
    "bundled_clusters",
    "cluster_keys",
    "cluster_schema",
    "cluster_to_yaml",
    "load_cluster",
]
