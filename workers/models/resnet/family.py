"""torchvision's ResNets as a model family. Loads no torch until parts, weights or an export are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.file_digests import digest_of_setting
from workers.models import single_samples
from workers.models.base import (
    Capabilities,
    Export,
    Finding,
    ModelFamily,
    Parts,
    Start,
    TrainedParts,
    Traits,
    Written,
)
from workers.models.outline import ChainOutline
from workers.models.resnet.outline import resnet_outline, with_last_block
from workers.specs.experiment import ResNetSpec, TrainSpec
from workers.specs.model import expect
from workers.specs.results import INITIAL_STATE

if TYPE_CHECKING:
    from cache_store.records.nodes import Attempt
    from workers.control import Control
    from workers.models.counting import Shape


class ResNetFamily(ModelFamily[ResNetSpec, None]):
    """See `workers.models.base.ModelFamily`."""

    name = "resnet"
    spec = ResNetSpec
    domain = "images"
    traits = Traits(
        noun="a ResNet",
        can=Capabilities(
            head_convs=None,
            variant=None,
            fsdp2="fsdp2: is for language models; ResNets, with their batch normalization, take ddp",
        ),
    )

    def outline(self, model: ResNetSpec, found: None, sample: Shape, classes: int) -> ChainOutline:
        return resnet_outline(model, sample[-1], classes)

    def architecture(self, model: ResNetSpec, found: None) -> ResNetSpec:
        return replace(model, weights=None)

    def start(self, model: ResNetSpec, found: None) -> ResNetSpec:
        # How the chain is cut, or computes, later does not change the weights it starts from.
        return replace(model, segments="stages", head_convs=1, dropout=ResNetSpec.dropout)

    def weights_digest(self, model: ResNetSpec, found: None) -> str | None:
        return digest_of_setting(model.weights, "model.weights")

    def pretrained(self, model: ResNetSpec) -> bool:
        return model.weights is not None

    def with_head_convs(self, model: ResNetSpec, head_convs: int | None) -> ResNetSpec:
        return model if head_convs is None else replace(model, head_convs=head_convs)

    def with_bare_head(self, model: ResNetSpec) -> ResNetSpec:
        return replace(model, head_convs=0, segments=with_last_block(model))

    def regime_settings(self, model: ResNetSpec) -> Mapping[str, Any]:
        return {"head_convs": model.head_convs}

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

    def write_start(self, start: Start, attempt: Attempt, control: Control) -> Written:
        from workers import tensor_files
        from workers.models.chain import state_digest
        from workers.models.resnet.parts import initial_state

        state = initial_state(expect(ResNetSpec, start.model), start.classes, start.seed)
        attempt.write(INITIAL_STATE, tensor_files.TensorStream(state))
        return Written(digest=state_digest(state))

    def export(self, export: Export, target: Path) -> None:
        from workers.models.resnet.export import write_checkpoint

        write_checkpoint(export, target)


RESNET = ResNetFamily()
