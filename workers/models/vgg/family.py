"""torchvision's VGGs as a model family. Loads no torch until parts or weights are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from workers.models import single_samples
from workers.models.base import (
    Capabilities,
    Export,
    Finding,
    Parts,
    Start,
    TrainedParts,
    Traits,
)
from workers.models.outline import ChainOutline
from workers.models.torchvision_family import ConvFamily
from workers.models.vgg.outline import CHANNELS, vgg_outline, with_head_units
from workers.specs.experiment import TrainSpec, VGGSpec
from workers.specs.model import expect

if TYPE_CHECKING:
    from torch import Tensor

    from workers.models.counting import Shape

_LOADING = '''"""Rebuild this model with torchvision alone: `model = load()`."""

from pathlib import Path

import torchvision
from safetensors.torch import load_file
from torch import nn


def load():
    here = Path(__file__).parent
    model = torchvision.models.{name}(num_classes={classes}, dropout={dropout}, init_weights=False)
{classifier}    model.load_state_dict(load_file(here / "model.safetensors"), strict=True)
    return model.eval()
'''
_POOLING = "    model.avgpool = nn.AdaptiveAvgPool2d((1, 1))\n"
_CLASSIFIERS = {
    "torchvision": "",
    "linear": _POOLING + "    model.classifier = nn.Sequential(nn.Linear({features}, {classes}))\n",
    "mlp": _POOLING + "    model.classifier = nn.Sequential(\n"
    "        nn.Linear({features}, {hidden}), nn.ReLU(), nn.Dropout({dropout}), nn.Linear({hidden}, {classes})\n"
    "    )\n",
}


class VGGFamily(ConvFamily[VGGSpec]):
    """See `workers.models.base.ModelFamily`."""

    name = "vgg"
    spec = VGGSpec
    traits = Traits(
        noun="a VGG",
        can=Capabilities(head_convs=None, variant=None, sharding="is for language models; VGGs take ddp"),
    )

    def outline(self, model: VGGSpec, found: None, sample: Shape, classes: int) -> ChainOutline:
        return vgg_outline(model, sample[-1], classes)

    def with_bare_head(self, model: VGGSpec) -> VGGSpec:
        return replace(model, head_convs=0, segments=with_head_units(model))

    def stage_problems(
        self, stage: TrainedParts, chain: ChainOutline, train: TrainSpec, rows: int
    ) -> Iterator[Finding]:
        # The network's own batch normalization stands before pooling: of the smallest image it sees 2x2.
        yield from single_samples.problems(stage, single_samples.mapped(stage, chain), train, rows)

    def words(self, model: VGGSpec, found: None) -> str:
        return model.name

    def parts(self, model: VGGSpec, sample: Shape, classes: int) -> Parts:
        from workers.models.vgg.parts import VGGParts

        return VGGParts(model, sample[-1], classes)

    def initial_state(self, start: Start) -> dict[str, Tensor]:
        from workers.models.vgg.parts import initial_state

        return initial_state(expect(VGGSpec, start.model), start.classes, start.seed)

    def export(self, export: Export, target: Path) -> None:
        from workers.models.torchvision_folder import write_folder

        model = expect(VGGSpec, export.model)
        classifier = _CLASSIFIERS[model.classifier].format(
            features=CHANNELS[-1], hidden=model.hidden, dropout=model.dropout, classes=export.classes
        )
        loading = _LOADING.format(name=model.name, classes=export.classes, dropout=model.dropout, classifier=classifier)
        write_folder(export, model, model.name, loading, target)


VGG = VGGFamily()
