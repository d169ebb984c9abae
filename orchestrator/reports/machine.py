"""Describe the machine of a run for the report."""

from __future__ import annotations

from orchestrator.environment import Environment, Gpu
from orchestrator.units import bytes_text


def environment_rows(environment: Environment) -> list[tuple[str, str]]:
    """Return (what, value) for all that is known of the environment."""
    memory = environment.memory_bytes
    rows = [
        ("packages", ", ".join(f"{name} {version}" for name, version in environment.packages.items() if version)),
        ("python", environment.python),
        ("system", environment.system),
        ("cpu", environment.cpu),
        ("cores", environment.cores),
        ("memory", None if memory is None else bytes_text(memory)),
        ("GPUs", ", ".join(map(_gpu, environment.gpus))),
        ("git commit", environment.git_commit),
    ]
    return [(what, str(value)) for what, value in rows if value not in (None, "")]


def machine_words(environment: Environment) -> str:
    """Return the machine in a line: GPUs, CPU with its cores, memory."""
    parts = [_gpu(gpu) for gpu in environment.gpus]
    if environment.cpu:
        cores = environment.cores
        parts.append(environment.cpu + (f", {cores} core{'s' if cores > 1 else ''}" if cores else ""))
    if environment.memory_bytes:
        parts.append(f"{bytes_text(environment.memory_bytes)} memory")
    return " · ".join(parts)


def _gpu(gpu: Gpu) -> str:
    return f"{gpu.name} ({bytes_text(gpu.memory_bytes)})"
