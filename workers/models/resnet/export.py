"""A trained ResNet as an ordinary checkpoint: safetensors that torchvision loads with `strict=True`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from cache_store.storage.durable import write_atomically
from workers import tensor_files
from workers.models.base import Export
from workers.specs.experiment import ResNetSpec
from workers.specs.model import expect

_LOADING = '''"""Rebuild this model with torchvision alone: `model = load()`."""

from pathlib import Path

import torchvision
from safetensors.torch import load_file
from torch import nn


def load():
    here = Path(__file__).parent
    model = torchvision.models.{name}(num_classes={classes})
{stem}{classifier}    model.load_state_dict(load_file(here / "model.safetensors"), strict=True)
    return model.eval()
'''
_STEM = (
    "    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)\n"
    "    model.maxpool = nn.Identity()\n"
)
_CLASSIFIER = (
    "    features = model.fc.in_features\n"
    "    model.fc = nn.Sequential(\n"
    "        nn.Linear(features, {hidden}), nn.ReLU(), nn.Dropout({dropout}), nn.Linear({hidden}, {classes})\n"
    "    )\n"
)


def write_checkpoint(export: Export, target: Path) -> None:
    """Write `model.safetensors`, `load_model.py` and, last, `model.json` into `target`. Equal weights of the
    same nodes give the same bytes."""
    model = expect(ResNetSpec, export.model)
    state = {name: tensor for _, part in export.states for name, tensor in part.items()}
    facts = {
        "model": asdict(model),
        "classes": export.classes,
        "class_names": list(export.data.get("class_names", ())),
        "preprocessing": dict(export.data.get("preprocessing", {})),
        "sources": dict(export.sources),
    }
    loading = _LOADING.format(
        name=model.name,
        classes=export.classes,
        stem=_STEM if model.stem == "small" else "",
        classifier=_CLASSIFIER.format(hidden=model.hidden, dropout=model.dropout, classes=export.classes)
        if model.classifier == "mlp"
        else "",
    )
    tensor_files.write(target / "model.safetensors", state, {"format": "pt", "model": model.name})
    write_atomically(target / "load_model.py", loading.encode())
    write_atomically(target / "model.json", (json.dumps(facts, indent=2) + "\n").encode())
