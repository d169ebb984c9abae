"""torchvision's ResNets as parts of a chain, built from torchvision's own modules.

A part's state names are torchvision's (`layer1.0.conv1.weight`), so the parts' state dicts together are a
torchvision state dict. Parts are assembled on the meta device and only then allocated: building one part
never allocates another. A boundary is a tuple of float tensors (B, C, H, W).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import cast

import torch
import torchvision
from torch import Tensor, nn

from workers.models import conv_adapters
from workers.models.conv_adapters import Boundary
from workers.models.given_weights import merge, other_shapes, read_state
from workers.models.outline import ChainOutline
from workers.models.resnet.outline import facts_of, resnet_outline
from workers.specs.experiment import ResNetSpec


def build_torchvision(model: ResNetSpec, classes: int) -> nn.Module:
    """A torchvision ResNet with this model's stem and classifier, initialised from the global generator.

    Takes (B, 3, H, W) and gives logits (B, classes). Replaced layers follow torchvision's rules too.
    stem "small": conv1 3x3 stride 1, no pooling. classifier "mlp": `fc` = Linear, ReLU, Dropout, Linear.
    """
    facts_of(model)
    network = cast("nn.Module", getattr(torchvision.models, model.name)(weights=None, num_classes=classes))
    if model.stem == "small":
        conv = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        network.conv1 = conv
        network.maxpool = nn.Identity()
    if model.classifier == "mlp":
        features = cast("nn.Linear", network.fc).in_features
        network.fc = nn.Sequential(
            nn.Linear(features, model.hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(model.dropout),
            nn.Linear(model.hidden, classes),
        )
    return network


def initial_state(model: ResNetSpec, classes: int, seed: int) -> dict[str, Tensor]:
    """The state dict training starts from, on the CPU; the global generators are left as they were.

    Random: what torchvision initialises after `torch.manual_seed(seed)`. With `model.weights`: that file's
    tensors; a stem or classifier of another shape stays random. ConfigError names whatever else differs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        state = dict(build_torchvision(model, classes).state_dict())
    if model.weights is None:
        return state
    given = read_state(model.weights)
    return merge(state, given, model.weights, _left_random(state, given))


def _left_random(state: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Return prefixes of what is not taken from a file: a stem of another kernel, another classifier (or none)."""
    stem = "conv1.weight"
    other_stem = stem in given and given[stem].shape != state[stem].shape
    return [*(["conv1.", "bn1."] if other_stem else []), *(["fc."] if other_shapes(state, given, "fc.") else [])]


class BlockFront(nn.Module):
    """A residual block's first convolutions, up to the head's cut: x -> (I, P)."""

    def __init__(self, block: nn.Module, convs: int) -> None:
        super().__init__()
        self._pairs = _take_convs(self, block, range(1, convs + 1))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Boundary:
        out = x
        for conv, bn in self._pairs:
            out = self.relu(getattr(self, bn)(getattr(self, conv)(out)))
        return x, out


class BlockBack(nn.Module):
    """A residual block's convolutions from `first` on, the addition and ReLU: (I, P) -> y."""

    def __init__(self, block: nn.Module, first: int, convs: int) -> None:
        super().__init__()
        self._pairs = _take_convs(self, block, range(first, convs + 1))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, identity: Tensor, out: Tensor) -> Tensor:
        last = len(self._pairs) - 1
        for index, (conv, bn) in enumerate(self._pairs):
            out = getattr(self, bn)(getattr(self, conv)(out))
            if index < last:
                out = self.relu(out)
        out += identity
        return cast("Tensor", self.relu(out))


def _take_convs(module: nn.Module, block: nn.Module, indices: range) -> list[tuple[str, str]]:
    """Register conv<i> and bn<i> of `block` in `module`; their names in forward order."""
    pairs = [(f"conv{index}", f"bn{index}") for index in indices]
    for pair in pairs:
        for name in pair:
            module.add_module(name, block.get_submodule(name))
    return pairs


class ResNetBlock(nn.Module):
    """A segment of consecutive units: boundary -> boundary. Its children run in order."""

    def __init__(self, network: nn.Module, units: tuple[str, ...], front: BlockFront | None) -> None:
        """`front` replaces the last unit when the head's cut goes through it."""
        super().__init__()
        for unit in units:
            if unit == "stem":
                for name in ("conv1", "bn1", "relu", "maxpool"):
                    self.add_module(name, network.get_submodule(name))
            else:
                cut = front is not None and unit == units[-1]
                _place(self, unit, cast("nn.Module", front) if cut else network.get_submodule(unit))

    def forward(self, boundary: Boundary) -> Boundary:
        (x,) = boundary
        for module in self.children():
            x = module(x)
        return x if isinstance(x, tuple) else (x,)


def _place(module: nn.Module, unit: str, block: nn.Module) -> None:
    """Register `block` as `layer<k>.<i>` of `module`."""
    layer, _, index = unit.partition(".")
    if layer not in module._modules:
        module.add_module(layer, nn.Sequential())
    module.get_submodule(layer).add_module(index, block)


class ResNetHead(nn.Module):
    """The rest of the last residual block, pooling and classifier.

    (I, P) -> logits (B, classes); also (x,), meaning I = P = x, when the head holds the whole block.
    """

    def __init__(self, network: nn.Module, unit: str, back: BlockBack) -> None:
        super().__init__()
        self._unit = unit
        _place(self, unit, back)
        self.avgpool = network.get_submodule("avgpool")
        self.fc = network.get_submodule("fc")

    def forward(self, boundary: Boundary) -> Tensor:
        out = self.get_submodule(self._unit)(boundary[0], boundary[-1])
        out = torch.flatten(self.avgpool(out), 1)
        return cast("Tensor", self.fc(out))


class ResNetClassifier(nn.Module):
    """The bare head, pooling and classifier: (x,) -> logits (B, classes)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.avgpool = network.get_submodule("avgpool")
        self.fc = network.get_submodule("fc")

    def forward(self, boundary: Boundary) -> Tensor:
        (x,) = boundary
        return cast("Tensor", self.fc(torch.flatten(self.avgpool(x), 1)))


@lru_cache(maxsize=16)
def _skeleton(model: ResNetSpec, classes: int) -> nn.Module:
    """The whole network on the meta device, made once: torchvision initialises there too, which takes time. Parts
    are put together from its modules and then copied; it is never changed."""
    with torch.device("meta"):
        return build_torchvision(model, classes)


def _assemble(model: ResNetSpec, chain: ChainOutline, name: str) -> nn.Module:
    """The part on the meta device, made of the skeleton's own modules: copy it before use."""
    facts = facts_of(model)
    part = chain.part(name)
    cut = facts.convs - model.head_convs
    network = _skeleton(model, chain.classes)
    if name == "head":
        if chain.bare_head:
            return ResNetClassifier(network)
        unit = part.units[0]
        back = BlockBack(network.get_submodule(unit), cut + 1, facts.convs)
        return ResNetHead(network, unit, back)
    is_cut = len(part.outputs) == 2
    front = BlockFront(network.get_submodule(part.units[-1]), cut) if is_cut else None
    return ResNetBlock(network, part.units, front)


def build_part(
    model: ResNetSpec, image_size: int, classes: int, name: str, device: str | torch.device = "cpu"
) -> nn.Module:
    """The block or head called `name`, in train mode, float32, allocated on `device` but **not initialised**.

    Weights and buffers hold whatever the memory held: load a state into every one of them before use.
    ConfigError for an impossible model, ValueError for an unknown part.
    """
    part = _assemble(model, resnet_outline(model, image_size, classes), name)
    return copy.deepcopy(part).to_empty(device=device)


def part_names(model: ResNetSpec, image_size: int, classes: int) -> list[str]:
    """Blocks in forward order, then `head`."""
    chain = resnet_outline(model, image_size, classes)
    return [*(block.name for block in chain.blocks), chain.head.name]


def part_state_names(model: ResNetSpec, image_size: int, classes: int, name: str) -> list[str]:
    """The names in a part's state dict, torchvision's own, without allocating the part."""
    return list(_assemble(model, resnet_outline(model, image_size, classes), name).state_dict())


def build_adapter(
    model: ResNetSpec,
    image_size: int,
    classes: int,
    source: int,
    target: int,
    seed: int,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """See `conv_adapters.build_adapter`; the head reads (I, P)."""
    return conv_adapters.build_adapter(resnet_outline(model, image_size, classes), source, target, seed, device)


def build_aux(
    model: ResNetSpec,
    image_size: int,
    classes: int,
    source: int,
    seed: int,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """See `conv_adapters.build_aux`."""
    return conv_adapters.build_aux(resnet_outline(model, image_size, classes), source, seed, device)
