"""A trained ResNet as an ordinary checkpoint: safetensors that torchvision loads with `strict=True`."""

from __future__ import annotations

from pathlib import Path

from workers.models.base import Export
from workers.models.torchvision_folder import write_folder
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
    """Write the folder `target`, as `write_folder` says."""
    model = expect(ResNetSpec, export.model)
    loading = _LOADING.format(
        name=model.name,
        classes=export.classes,
        stem=_STEM if model.stem == "small" else "",
        classifier=_CLASSIFIER.format(hidden=model.hidden, dropout=model.dropout, classes=export.classes)
        if model.classifier == "mlp"
        else "",
    )
    write_folder(export, model, model.name, loading, target)
