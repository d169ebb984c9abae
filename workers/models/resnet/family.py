"""torchvision's ResNets as a model family. Loads no torch until parts, weights or an export are asked for."""

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
from workers.models.resnet.outline import resnet_outline, with_last_block
from workers.models.torchvision_family import ConvFamily
from workers.specs.experiment import ResNetSpec, TrainSpec
from workers.specs.model import expect

if TYPE_CHECKING:
    from torch import Tensor

    from workers.models.counting import Shape


class ResNetFamily(ConvFamily[ResNetSpec]):
    """See `workers.models.base.ModelFamily`."""

    name = "resnet"
    spec = ResNetSpec
    traits = Traits(
        noun="a ResNet",
        can=Capabilities(
            head_convs=None,
            variant=None,
            sharding="is for language models; ResNets, with their batch normalization, take ddp",
        ),
    )

    def outline(self, model: ResNetSpec, found: None, sample: Shape, classes: int) -> ChainOutline:
        return resnet_outline(model, sample[-1], classes)

    def with_bare_head(self, model: ResNetSpec) -> ResNetSpec:
        return replace(model, head_convs=0, segments=with_last_block(model))

    def stage_problems(
        self, stage: TrainedParts, chain: ChainOutline, train: TrainSpec, rows: int
    ) -> Iterator[Finding]:
        # A block's smallest maps are those that it gives, those of a head with convolutions are those that it takes.
        maps = {part: chain.part(part).outputs for part in stage.trained if part != "head"}
        if "head" in stage.trained and not chain.bare_head:
            maps["head"] = chain.head.inputs
        yield from single_samples.problems(stage, {**maps, **single_samples.mapped(stage, chain)}, train, rows)

    def words(self, model: ResNetSpec, found: None) -> str:
        return model.name

    def parts(self, model: ResNetSpec, sample: Shape, classes: int) -> Parts:
        from workers.models.resnet.training import ResNetParts

        return ResNetParts(model, sample[-1], classes)

    def initial_state(self, start: Start) -> dict[str, Tensor]:
        from workers.models.resnet.parts import initial_state

        return initial_state(expect(ResNetSpec, start.model), start.classes, start.seed)

    def export(self, export: Export, target: Path) -> None:
        from workers.models.resnet.export import write_checkpoint

        write_checkpoint(export, target)


RESNET = ResNetFamily()
