"""A cluster on one machine: each host a network namespace, the links between them limited, every byte on them counted (Linux)."""

from dist_ssn.lab.hosts import Lab
from dist_ssn.lab.network import Host, Network, plan_network

__all__ = ["Host", "Lab", "Network", "plan_network"]
