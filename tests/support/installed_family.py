"""Packages that bring a model family, installed into a folder as pip leaves them: sources, metadata, an entry point."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GROUP = "segprop.model_families"
#: Three blocks on 8x8 digits, everything else small.
MLP: dict[str, Any] = {
    "model": {"family": "mlp", "widths": [32, 24, 16]},
    "data": {
        "name": "digits",
        "image_size": 8,
        "augment": "none",
        "validation": 64,
        "train_limit": 512,
        "test_limit": 128,
    },
    "training": {"epochs": 6, "batch_size": 32, "optimizer": {"lr": 3e-3}},
    "resources": {"runner": "local", "device": "cpu", "slots": 1, "threads": 1},
}


def install(folder: Path, package: str, entries: dict[str, str]) -> None:
    """Write the metadata of `package` 1.0 with these entry points: family -> `module:object`."""
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"[{GROUP}]", *(f"{name} = {value}" for name, value in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")


def install_mlp(folder: Path) -> Path:
    """Install `segprop_mlp`, which brings the family `mlp`; returns the folder, which belongs on PYTHONPATH."""
    shutil.copytree(Path(__file__).with_name("segprop_mlp"), folder / "segprop_mlp")
    install(folder, "segprop_mlp", {"mlp": "segprop_mlp.family:FAMILY"})
    return folder


def python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the packages in `site` installed beside segprop."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
