"""Perceptrons of three blocks for small images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from workers.models.base import Export, ModelFamily, Parts, Start, Traits, Written
from workers.models.counting import Cost, Shape, elements
from workers.models.outline import ChainOutline, PartOutline, Piece, join
from workers.specs.model import ModelSpec

if TYPE_CHECKING:
    from cache_store.records.nodes import Attempt
    from workers.control import Control


@dataclass(frozen=True, kw_only=True)
class MLPSpec(ModelSpec):
    """Three blocks of a linear layer and a ReLU each, and a linear head."""

    family: Literal["mlp"] = "mlp"
    #: Features behind each block.
    widths: tuple[Annotated[int, Ge(1)], Annotated[int, Ge(1)], Annotated[int, Ge(1)]] = (64, 48, 32)


@dataclass(frozen=True)
class MLPChain(ChainOutline):
    """Adapters and local heads are linear layers too."""

    def adapter(self, source: int, target: int) -> PartOutline:
        return _linear("adapter", self.boundaries[source][0], self.boundaries[target][0])

    def aux(self, source: int) -> PartOutline:
        return _linear("aux", self.boundaries[source][0], (self.classes,))


def _linear(name: str, inputs: Shape, outputs: Shape) -> PartOutline:
    return join(name, [Piece(name, (inputs,), (outputs,), Cost.linear(elements(inputs), elements(outputs)))])


class MLPFamily(ModelFamily[MLPSpec, None]):
    name = "mlp"
    spec = MLPSpec
    domain = "images"
    traits = Traits(noun="an MLP", sized_weights=True)

    def outline(self, model: MLPSpec, found: None, sample: Shape, classes: int) -> ChainOutline:
        shapes: list[Shape] = [sample, *((width,) for width in model.widths)]
        blocks = [_linear(f"block{n}", *pair) for n, pair in enumerate(pairwise(shapes), start=1)]
        head = _linear("head", shapes[-1], (classes,))
        boundaries = tuple((shape,) for shape in shapes)
        return MLPChain(tuple(blocks), head, boundaries, boundaries[-1], classes, aux_channels=0)

    def words(self, model: MLPSpec, found: None) -> str:
        return f"an MLP of {' + '.join(map(str, model.widths))}"

    def parts(self, model: MLPSpec, sample: Shape, classes: int) -> Parts:
        from segprop_mlp.network import MLPParts

        return MLPParts(model.widths, sample, classes)

    def write_start(self, start: Start, attempt: Attempt, control: Control) -> Written:
        from safetensors.torch import save

        from segprop_mlp.network import initial_state
        from workers.models.chain import state_digest

        assert isinstance(start.model, MLPSpec)
        assert start.sample is not None
        state = initial_state(start.model.widths, start.sample, start.classes, start.seed)
        attempt.write("state.safetensors", save(state))
        return Written(digest=state_digest(state))

    def export(self, export: Export, target: Path) -> None:
        from safetensors.torch import save

        state: dict[str, Any] = {}
        for _, part in export.states:
            state |= part
        target.mkdir(parents=True, exist_ok=True)
        (target / "model.safetensors").write_bytes(save(state))
        facts: Mapping[str, Any] = {
            "model": asdict(export.model),  # type: ignore[call-overload]
            "class_names": export.data["class_names"],
            "sources": export.sources,
        }
        (target / "model.json").write_text(json.dumps(facts))


FAMILY = MLPFamily()
