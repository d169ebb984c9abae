"""Fixtures of the tests on a Ray cluster."""

from ray_cluster import cluster

__all__ = ["cluster"]
