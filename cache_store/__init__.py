"""Keeps: snapshots and commits on fsspec storage. Knows neither Ray nor models."""
