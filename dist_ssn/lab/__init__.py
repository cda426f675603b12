"""A cluster on one machine (Linux): each host a network namespace, with limited links and every byte on them counted."""

from dist_ssn.lab.hosts import Lab
from dist_ssn.lab.network import Host, Network, plan_network

__all__ = ["Host", "Lab", "Network", "plan_network"]
