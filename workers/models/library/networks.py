"""Networks that a library builds: the same weights from the same seed, cut by following the library's own forward."""

from __future__ import annotations

import contextlib
import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cache_store.errors import ConfigError
from cache_store.keys import digest_json
from cache_store.suggest import did_you_mean
from workers.models.base import Export
from workers.models.counting import Shape
from workers.models.given_weights import merge, other_shapes, read_state
from workers.models.python.building import Refused, seeded
from workers.models.python.cutting import Cut, Segments, cut_network
from workers.models.python.tracing import single_input
from workers.models.torchvision_folder import write_folder
from workers.specs.as_json import to_json
from workers.specs.experiment import TimmSpec, TorchvisionSpec
from workers.specs.model import ModelSpec


class Library(ABC):
    """Builds one network. `identity`: JSON that names what it computes; `where`: the key that messages name."""

    where: str
    #: As messages call the network.
    words: str

    def __init__(self, model: ModelSpec, segments: Segments) -> None:
        self.model, self.segments = model, segments

    @property
    def identity(self) -> Any:
        return to_json(self.model)

    @abstractmethod
    def build(self, classes: int) -> nn.Module:
        """The library's network with `classes` scores, its weights drawn from the global generators."""

    @abstractmethod
    def with_one_input(self, network: nn.Module) -> nn.Module:
        """The same network with a forward that takes images and gives scores, by way of the library's own."""

    @abstractmethod
    def initial_state(self, classes: int, seed: int) -> dict[str, Tensor]:
        """Return the state dict training starts from."""

    @abstractmethod
    def export(self, export: Export, target: Path) -> None:
        """Write the folder `target`, so that the library loads it."""

    def refuse(self, problem: str) -> ConfigError:
        """Return an error about this network."""
        return ConfigError(f"{self.where}: {self.words}: {problem}", where=self.where)

    def built(self, classes: int, seed: int) -> nn.Module:
        """The network from this seed. ConfigError with the library's words where it refuses its arguments."""
        with seeded(seed), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            # Of what libraries warn about building there is nothing that a user of ours can change.
            warnings.simplefilter("ignore")
            try:
                return self.build(classes)
            except ConfigError:
                raise
            except Exception as error:  # whatever a library raises at arguments it does not take
                raise self.refuse(f"cannot be built: {type(error).__name__}: {_first_line(error)}") from error

    def classifier(self, classes: int) -> list[str]:
        """Names of the tensors whose shapes depend on the number of classes."""
        with torch.device("meta"):
            shapes = [
                {name: tensor.shape for name, tensor in self.built(count, 0).state_dict().items()}
                for count in (classes, classes + 1)
            ]
        return [name for name, shape in shapes[0].items() if shapes[1].get(name) != shape]


def cut(library: Library, sample: Shape, classes: int) -> Cut:
    """Build the network, cut it and try it on samples of this shape. ConfigError at the library's key for what cannot
    be trained so."""
    return _cut(_Key(library), sample, classes)


class _Key:
    """A library's network that can be looked up by."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._digest = digest_json([library.identity, library.segments])

    def __hash__(self) -> int:
        return hash(self._digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._digest == other._digest


@lru_cache(maxsize=4)
def _cut(key: _Key, sample: Shape, classes: int) -> Cut:
    library = key.library
    network = library.with_one_input(library.built(classes, 0))
    try:
        return cut_network(network, sample, library.segments, by_sample=True)
    except Refused as error:
        raise library.refuse(error.problem) from error


class Named(Library):
    """A network that has a name, with a file of weights or without."""

    where = "model.name"

    def __init__(self, model: TorchvisionSpec | TimmSpec) -> None:
        super().__init__(model, model.segments)
        self.words, self.name, self.args, self.weights = model.name, model.name, model.args, model.weights

    def with_one_input(self, network: nn.Module) -> nn.Module:
        kind = type(network)

        def forward(self: nn.Module, x: Tensor) -> Any:
            return kind.forward(self, x)

        return single_input(network, forward)

    def initial_state(self, classes: int, seed: int) -> dict[str, Tensor]:
        state = dict(self.built(classes, seed).state_dict())
        if self.weights is None:
            return state
        given = read_state(self.weights)
        own = self.classifier(classes)
        return merge(state, given, self.weights, own if any(other_shapes(state, given, name) for name in own) else ())

    def unknown(self, names: Sequence[str]) -> ConfigError:
        """Return an error about a name that the library does not know."""
        close = did_you_mean(self.name, names)
        return ConfigError(
            f"{self.where}: {self.name!r} is no classifier of {self.model.family}{close}",
            where=self.where,
            value=self.name,
        )


class Torchvision(Named):
    """A network of `torchvision.models`."""

    def build(self, classes: int) -> nn.Module:
        import torchvision

        known = torchvision.models.list_models(module=torchvision.models)
        if self.name not in known:
            raise self.unknown(known)
        network: nn.Module = torchvision.models.get_model(self.name, weights=None, num_classes=classes, **self.args)
        return network

    def export(self, export: Export, target: Path) -> None:
        loading = _LOADING.format(
            library="torchvision",
            call=f"torchvision.models.get_model({self.name!r}, weights=None, num_classes={export.classes}",
            args=self.args,
        )
        write_folder(export, export.model, self.name, loading, target)  # type: ignore[arg-type]


class Timm(Named):
    """A network of `timm`."""

    def build(self, classes: int) -> nn.Module:
        timm = _timm()
        if not timm.is_model(self.name):
            raise self.unknown(timm.list_models())
        network: nn.Module = timm.create_model(self.name, pretrained=False, num_classes=classes, **self.args)
        return network

    def export(self, export: Export, target: Path) -> None:
        loading = _LOADING.format(
            library="timm",
            call=f"timm.create_model({self.name!r}, pretrained=False, num_classes={export.classes}",
            args=self.args,
        )
        write_folder(export, export.model, self.name, loading, target)  # type: ignore[arg-type]


_LOADING = '''"""Rebuild this model with {library} alone: `model = load()`."""

from pathlib import Path

import {library}
from safetensors.torch import load_file


def load():
    model = {call}, **{args!r})
    # Its own state says which version of a module it is of, which a file of tensors does not.
    state, weights = model.state_dict(), load_file(Path(__file__).parent / "model.safetensors")
    if state.keys() != weights.keys():
        raise ValueError(f"other tensors: {{sorted(state.keys() ^ weights.keys())}}")
    state.update(weights)
    model.load_state_dict(state, strict=True)
    return model.eval()
'''


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            "model.family: timm is not installed (pip install 'segprop[timm]')", where="model.family", value="timm"
        ) from error
    return timm


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
