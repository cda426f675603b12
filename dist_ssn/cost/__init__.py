"""Predicted cost of a plan on a cluster, before anything is trained."""
