"""Image classifiers of libraries as model families: built by the library's own function, cut by themselves.

Loads torch and the library when a network is looked at, not before.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from workers.file_digests import digest_of_setting
from workers.models.base import Finding, FoundT, ModelFamily, Parts, Start, Traits, Written
from workers.specs.experiment import HFImageSpec, TimmSpec, TorchvisionSpec
from workers.specs.model import ModelSpec
from workers.specs.results import INITIAL_STATE

if TYPE_CHECKING:
    from torch import Tensor

    from cache_store.records.nodes import Attempt
    from workers.control import Control
    from workers.models.base import Export
    from workers.models.counting import Shape
    from workers.models.library.networks import Library
    from workers.models.outline import ChainOutline

SpecT = TypeVar("SpecT", bound=ModelSpec)
NamedT = TypeVar("NamedT", TorchvisionSpec, TimmSpec)


class LibraryFamily(ModelFamily[SpecT, FoundT]):
    """A family whose networks a library builds; see `networks.Library`."""

    domain = "images"

    @abstractmethod
    def library(self, model: ModelSpec) -> Library:
        """What builds a network of this family."""

    def outline(self, model: SpecT, found: FoundT | None, sample: Shape, classes: int) -> ChainOutline:
        from workers.models.library.networks import cut

        return cut(self.library(self.architecture(model, found)), sample, classes).outline

    def parts(self, model: SpecT, sample: Shape, classes: int) -> Parts:
        from workers.models.library.networks import cut
        from workers.models.python.parts import CutParts

        library = self.library(model)
        return CutParts(cut(library, sample, classes), classes, [self.name, library.identity])

    def fit_problems(self, model: SpecT, chain: ChainOutline, sample: Shape) -> Iterator[Finding]:
        (scores,) = chain.head.outputs
        if scores != (chain.classes,):
            yield ("model",), f"the head gives {scores[0]} scores, the data have {chain.classes} classes"

    def write_start(self, start: Start, attempt: Attempt, control: Control) -> Written:
        from workers import tensor_files
        from workers.models.chain import state_digest

        state = self.initial_state(start)
        attempt.write(INITIAL_STATE, tensor_files.TensorStream(state))
        return Written(digest=state_digest(state))

    def initial_state(self, start: Start) -> dict[str, Tensor]:
        """Return the whole network's state dict training starts from, on the CPU, made from `start` alone."""
        return self.library(start.model).initial_state(start.classes, start.seed)

    def export(self, export: Export, target: Path) -> None:
        self.library(export.model).export(export, target)


class NamedFamily(LibraryFamily[NamedT, None]):
    """A family whose networks have names, and start from a file of weights or at random."""

    def architecture(self, model: NamedT, found: None) -> NamedT:
        return replace(model, weights=None)

    def start(self, model: NamedT, found: None) -> NamedT:
        # Where it is cut changes no weight.
        return replace(model, segments="auto")

    def weights_digest(self, model: NamedT, found: None) -> str | None:
        return digest_of_setting(model.weights, "model.weights")

    def pretrained(self, model: NamedT) -> bool:
        return model.weights is not None

    def words(self, model: NamedT, found: None) -> str:
        return f"{self.name} {model.name}"


class TorchvisionLibraryFamily(NamedFamily[TorchvisionSpec]):
    """Every classifier of torchvision."""

    name = "torchvision"
    spec = TorchvisionSpec
    traits = Traits(noun="a network of torchvision")
    libraries = ("torch", "torchvision")

    def library(self, model: ModelSpec) -> Library:
        from workers.models.library.networks import Torchvision
        from workers.specs.model import expect

        return Torchvision(expect(TorchvisionSpec, model))


class TimmFamily(NamedFamily[TimmSpec]):
    """Every classifier of timm."""

    name = "timm"
    spec = TimmSpec
    traits = Traits(noun="a network of timm")
    libraries = ("torch", "timm")

    def library(self, model: ModelSpec) -> Library:
        from workers.models.library.networks import Timm
        from workers.specs.model import expect

        return Timm(expect(TimmSpec, model))


class HFImageFamily(LibraryFamily[HFImageSpec, HFImageSpec]):
    """Every image classifier of transformers. What is found of a model is its spec with the whole architecture."""

    name = "hf_image"
    spec = HFImageSpec
    traits = Traits(noun="an image classifier of transformers")
    libraries = ("torch", "transformers")

    def inspect(self, model: HFImageSpec) -> HFImageSpec:
        from workers.models.library.transformers_classifiers import with_architecture

        return with_architecture(model)

    def architecture(self, model: HFImageSpec, found: HFImageSpec | None) -> HFImageSpec:
        return replace(self._whole(model, found), path=None)

    def start(self, model: HFImageSpec, found: HFImageSpec | None) -> HFImageSpec:
        return replace(self._whole(model, found), segments="auto")

    def weights_digest(self, model: HFImageSpec, found: HFImageSpec | None) -> str | None:
        from workers.models.library.transformers_classifiers import weights_digest

        return weights_digest(model)

    def pretrained(self, model: HFImageSpec) -> bool:
        return model.path is not None

    def missing_weights(self, model: HFImageSpec, found: HFImageSpec | None) -> str | None:
        if model.path is None or any(Path(model.path).glob("*.safetensors")):
            return None
        return (
            f"model.path: {model.path} has a config.json but no *.safetensors: it can be planned for (--dry-run), not "
            "trained; without model.path, model.config starts from random weights"
        )

    def words(self, model: HFImageSpec, found: HFImageSpec | None) -> str:
        kind = (self._whole(model, found).config or {}).get("model_type")
        return f"{kind}, {model.path or 'random weights'},"

    def library(self, model: ModelSpec) -> Library:
        from workers.models.library.transformers_classifiers import Transformers
        from workers.specs.model import expect

        return Transformers(expect(HFImageSpec, model))

    def _whole(self, model: HFImageSpec, found: HFImageSpec | None) -> HFImageSpec:
        return self.inspect(model) if found is None else found


TORCHVISION = TorchvisionLibraryFamily()
TIMM = TimmFamily()
HF_IMAGE = HFImageFamily()
