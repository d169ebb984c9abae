"""Describe what a run ran on: versions and hardware, for summary and report. No paths, no user or host names."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import psutil

PACKAGES = (
    "segprop",
    "torch",
    "torchvision",
    "transformers",
    "tokenizers",
    "ray",
    "numpy",
    "pillow",
    "pyarrow",
    "safetensors",
)


@dataclass(frozen=True)
class Gpu:
    """One device, by the driver's name."""

    name: str
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Environment:
    """What a run ran on; None and empty: not found out. `packages`: name -> version, of those that are installed.
    `git_commit` ends with `+` where files differ from it."""

    packages: Mapping[str, str] = field(default_factory=dict)
    python: str | None = None
    system: str | None = None
    cpu: str | None = None
    cores: int | None = None
    memory_bytes: int | None = None
    gpus: tuple[Gpu, ...] = ()
    git_commit: str | None = None
    #: Versions whose results count as those of the packages above (`reuse_versions`).
    #: Left out of a summary where there are none (`reports.record_json.OPTIONAL`).
    reused_versions: Mapping[str, str] | None = field(default=None, metadata={"optional": True})


def describe_environment() -> Environment:
    """Look up what this process runs on."""
    return Environment(
        packages={name: version for name in PACKAGES if (version := _version(name))},
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        memory_bytes=psutil.virtual_memory().total,
        gpus=tuple(gpus()),
        git_commit=_git_commit(),
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or None


def gpus() -> list[Gpu]:
    """Ask torch where the process has loaded it, else nvidia-smi: importing torch for a name takes seconds."""
    torch = sys.modules.get("torch")
    if torch is not None:
        if not torch.cuda.is_available():
            return []
        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return [Gpu(gpu.name, gpu.total_memory) for gpu in found]
    output = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
    named = []
    for line in (output or "").splitlines():
        name, _, mebibytes = line.rpartition(",")
        if name and mebibytes.strip().isdigit():
            named.append(Gpu(name.strip(), int(mebibytes) << 20))
    return named


def _git_commit() -> str | None:
    """Return the commit of this source tree, with `+` when files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return commit + ("+" if changed else "")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
