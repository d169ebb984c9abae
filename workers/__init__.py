"""Trains: chains, data, stages. Runs in one process without Ray. Importing this package loads no torch."""
