"""torchvision's VGGs as parts of a chain, built from torchvision's own modules.

A part's state names are torchvision's (`features.0.weight`), so the parts' state dicts together are a torchvision state
dict. A boundary is a tuple of one float tensor (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.vgg import VGG, make_layers

from workers.models import conv_adapters
from workers.models.conv_adapters import Boundary
from workers.models.given_weights import merge, other_shapes, read_state
from workers.models.torchvision_parts import TorchvisionParts
from workers.models.vgg.outline import CHANNELS, convs_of, normalized, vgg_outline
from workers.specs.experiment import VGGSpec


def build_torchvision(model: VGGSpec, classes: int) -> VGG:
    """Build torchvision's network with this model's classifier, initialised from the global generator.

    Takes (B, 3, H, W) and gives logits (B, classes). Replaced layers follow torchvision's rules too.
    """
    layers: list[str | int] = []
    for count, channels in zip(convs_of(model), CHANNELS, strict=True):
        layers += [*[channels] * count, "M"]
    if model.classifier == "torchvision":
        return VGG(make_layers(layers, normalized(model)), classes, dropout=model.dropout)
    with torch.device("meta"):
        # Its own classifier takes half a gigabyte, only to be replaced.
        network = VGG(nn.Sequential(), init_weights=False)
    network.features = make_layers(layers, normalized(model))
    network.avgpool = nn.AdaptiveAvgPool2d((1, 1))
    network.classifier = _small_classifier(model, classes)
    _initialise(network)
    return network


def _small_classifier(model: VGGSpec, classes: int) -> nn.Sequential:
    if model.classifier == "linear":
        return nn.Sequential(nn.Linear(CHANNELS[-1], classes))
    return nn.Sequential(
        nn.Linear(CHANNELS[-1], model.hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(model.dropout),
        nn.Linear(model.hidden, classes),
    )


def _initialise(network: nn.Module) -> None:
    """Initialise as torchvision does. BatchNorm is made as it begins."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 0.01)
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


def initial_state(model: VGGSpec, classes: int, seed: int) -> dict[str, Tensor]:
    """Return the state dict training starts from, on the CPU; the global generators are left as they were.

    Random: what torchvision initialises after `torch.manual_seed(seed)`. With `model.weights`: that file's tensors; a
    classifier of another shape stays random, of torchvision's own one the last layer alone where only the number of
    classes differs. ConfigError names whatever else differs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        state = dict(build_torchvision(model, classes).state_dict())
    if model.weights is None:
        return state
    given = read_state(model.weights)
    return merge(state, given, model.weights, _left_random(model, state, given))


def _left_random(model: VGGSpec, state: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Return prefixes of what is not taken from a file."""
    if not other_shapes(state, given, "classifier."):
        return []
    wide = model.classifier == "torchvision"
    if wide and not any(other_shapes(state, given, f"classifier.{layer}.") for layer in (0, 3)):
        return ["classifier.6."]
    return ["classifier."]


def _modules_of(model: VGGSpec) -> dict[str, list[int]]:
    """Unit -> indices of its modules in torchvision's `features`."""
    found: dict[str, list[int]] = {}
    start = 0
    for stage, count in enumerate(convs_of(model), start=1):
        for index in range(count):
            length = 2 + normalized(model) + (index == count - 1)
            found[f"stage{stage}.{index}"] = list(range(start, start + length))
            start += length
    return found


def _features(network: VGG, indices: Iterable[int]) -> nn.Sequential:
    """Modules of the network's `features` under their own names."""
    features = nn.Sequential()
    for index in indices:
        features.add_module(str(index), network.features.get_submodule(str(index)))
    return features


class Block(nn.Module):
    """A segment of consecutive units: (x,) -> (y,)."""

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        self.features = features

    def forward(self, boundary: Boundary) -> Boundary:
        (x,) = boundary
        return (cast("Tensor", self.features(x)),)


class Head(nn.Module):
    """The last convolutions (a bare head has none), pooling and classifier: (x,) -> logits (B, classes)."""

    def __init__(self, features: nn.Sequential, avgpool: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.avgpool = avgpool
        self.classifier = classifier

    def forward(self, boundary: Boundary) -> Tensor:
        (x,) = boundary
        return cast("Tensor", self.classifier(torch.flatten(self.avgpool(self.features(x)), 1)))


@lru_cache(maxsize=16)
def _skeleton(model: VGGSpec, classes: int) -> VGG:
    """The whole network on the meta device, made once. Parts are put together from its modules and then copied."""
    with torch.device("meta"):
        return build_torchvision(model, classes)


class VGGParts(TorchvisionParts):
    """See `workers.models.base.Parts`."""

    def __init__(self, model: VGGSpec, image_size: int, classes: int) -> None:
        super().__init__(vgg_outline(model, image_size, classes))
        self._model, self._classes = model, classes

    def _assemble(self, name: str) -> nn.Module:
        network, modules = _skeleton(self._model, self._classes), _modules_of(self._model)
        part = self._chain.part(name)
        features = _features(network, [index for unit in part.units for index in modules.get(unit, [])])
        return Head(features, network.avgpool, network.classifier) if name == "head" else Block(features)

    def build_adapter(self, source: int, target: int, seed: int, device: torch.device) -> nn.Module:
        return conv_adapters.build_adapter(self._chain, source, target, seed, device)

    def build_aux(self, source: int, seed: int, device: torch.device, head: Mapping[str, Tensor] | None) -> nn.Module:
        return conv_adapters.build_aux(self._chain, source, seed, device)

    def identity(self) -> str:
        return self._model.name
