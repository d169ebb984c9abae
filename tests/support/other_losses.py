"""A network and data of a user's own whose targets are no classes: vectors of six numbers, three numbers to tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from planning import merged

SOURCE = """
import torch
from torch import nn
import segprop

def net(outputs=3):
    blocks = {name: nn.Sequential(nn.Linear(w, 8), nn.ReLU()) for name, w in (("a", 6), ("b", 8), ("c", 8))}
    return segprop.Chain(blocks, nn.Linear(8, outputs))

class Rows(torch.utils.data.Dataset):
    def __init__(self, rows, seed, kind):
        self.x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))
        y = self.x @ torch.randn(6, 3, generator=torch.Generator().manual_seed(9))
        self.y = {"numbers": y, "labels": (y > 0).long(), "scalar": y[:, 0], "classes": y.argmax(dim=1)}[kind]
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        y = self.y[i]
        return self.x[i], y.item() if y.ndim == 0 else y

def splits(kind="numbers"):
    return {"train": Rows(120, 1, kind), "test": Rows(40, 2, kind)}

def power(output, targets, exponent=1.5):
    return (output - targets).abs().pow(exponent).mean()

def focal(output, targets):
    logs = output.log_softmax(1).gather(1, targets[:, None])[:, 0]
    return -((1 - logs.exp()) ** 2 * logs).mean()

def rounded(output, targets):
    return (output.detach().round() - targets).square().mean()

def rows(output, targets):
    return (output - targets).square()
"""

SETTINGS: dict[str, Any] = {
    "data": {"name": "python", "validation": 30},
    "training": {"epochs": 2, "batch_size": 16, "optimizer": {"lr": 0.01}, "loss": {"name": "mse"}},
    "snapshots": {"mode": "always", "group_rows": 16},
    "resources": {"runner": "local", "device": "cpu", "slots": 1, "threads": 1},
}


def write(folder: Path, changes: dict[str, Any] | None = None, module: str = "mine") -> Path:
    """A configuration of these, with its code beside it; `changes` have dotted keys."""
    (folder / f"{module}.py").write_text(SOURCE)
    own = {"model": {"family": "python", "build": f"{module}:net"}, "data.build": f"{module}:splits"}
    settings = merged(SETTINGS, {**own, "run_dir": str(folder / "run"), **(changes or {})})
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path
