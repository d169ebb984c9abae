"""ViTs as chains: the same numbers as torchvision's own network, and figures that its modules bear out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cache_store.errors import ConfigError
from workers import tensor_files
from workers.models.vit.outline import VITS, vit_outline
from workers.models.vit.parts import ViTParts, build_torchvision, initial_state
from workers.specs.experiment import ViTName, ViTSpec

SMALL: dict[str, Any] = {"patch": 4, "layers": 3, "hidden": 48, "heads": 4, "mlp": 96}
SIZE, CLASSES = 16, 5


def spec(**settings: Any) -> ViTSpec:
    return ViTSpec(**{**SMALL, **settings})


def network(state: dict[str, Tensor], **settings: Any) -> nn.Module:
    whole = build_torchvision(spec(**settings), SIZE, CLASSES)
    whole.load_state_dict(state, strict=True)
    return whole


def chain(state: dict[str, Tensor], **settings: Any) -> list[nn.Module]:
    parts = ViTParts(spec(**settings), SIZE, CLASSES)
    built = []
    for name in parts.names():
        part = parts.build(name, torch.device("cpu"))
        part.load_state_dict({key: state[key] for key in parts.state_names(name)}, strict=True)
        built.append(part)
    return built


def random_state() -> dict[str, Tensor]:
    """A start whose classifier is not zero, so that every part has gradients."""
    state = initial_state(spec(), SIZE, CLASSES, seed=3)
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(tensor.shape, generator=generator) if name == "heads.head.weight" else tensor
        for name, tensor in state.items()
    }


def run(parts: list[nn.Module], images: Tensor) -> Tensor:
    value: Any = (images,)
    for part in parts:
        value = part(value)
    assert isinstance(value, Tensor)
    return value


def test_the_chain_computes_what_torchvision_computes_to_the_bit() -> None:
    state, images = random_state(), torch.randn(6, 3, SIZE, SIZE)
    whole, parts = network(state), chain(state)
    target = torch.arange(6) % CLASSES
    for mode in (True, False):
        for module in (whole, *parts):
            module.train(mode)
        expected, found = whole(images), run(parts, images)
        assert torch.equal(found, expected)
    with torch.inference_mode():
        assert torch.equal(run(parts, images), whole(images))
    nn.functional.cross_entropy(expected, target).backward()
    nn.functional.cross_entropy(found, target).backward()
    gradients = {name: parameter.grad for part in parts for name, parameter in part.named_parameters()}
    for name, parameter in whole.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(gradients[name], parameter.grad), name


def test_the_parts_hold_every_tensor_of_the_network_once() -> None:
    state = initial_state(spec(), SIZE, CLASSES, seed=3)
    parts = ViTParts(spec(), SIZE, CLASSES)
    names = [name for part in parts.names() for name in parts.state_names(part)]
    assert sorted(names) == sorted(state)
    torch.manual_seed(3)
    for name, tensor in build_torchvision(spec(), SIZE, CLASSES).state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_every_named_network_has_torchvisions_number_of_parameters() -> None:
    assert set(get_args(ViTName)) == set(VITS)
    for name, size in [(name, 518 if name == "vit_h_14" else 224) for name in VITS]:
        with torch.device("meta"):
            whole = getattr(torchvision.models, name)(image_size=size)
        outline = vit_outline(ViTSpec(name=name), size, 1000)
        expected = sum(parameter.numel() for parameter in whole.parameters())
        assert sum(part.parameters for part in (*outline.blocks, outline.head)) == expected, name
    # Documented by torchvision for its published weights.
    assert expected == 633_470_440


def test_operations_are_those_that_torch_counts() -> None:
    outline = vit_outline(spec(), SIZE, CLASSES)
    value: Any = (torch.randn(1, 3, SIZE, SIZE),)
    for outlined, part in zip((*outline.blocks, outline.head), chain(random_state()), strict=True):
        with FlopCounterMode(display=False) as counter:
            value = part(value)
        assert counter.get_total_flops() == outlined.flops, outlined.name


@pytest.mark.parametrize("name", ["embed", "layer0", "head"])
def test_kept_elements_are_those_that_autograd_keeps(name: str) -> None:
    outline = vit_outline(spec(), SIZE, CLASSES)
    parts = dict(zip(ViTParts(spec(), SIZE, CLASSES).names(), chain(random_state()), strict=True))
    part = parts[name].train()
    rows = 8
    value = tuple(torch.randn(rows, *shape) for shape in outline.part(name).inputs)
    weights = {parameter.untyped_storage().data_ptr() for parameter in part.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = part(value)
    del result
    elements = sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept.values()) / rows
    # Statistics of normalisations, and what attention keeps of every row's sum, are not counted.
    assert outline.part(name).saved_elements == pytest.approx(elements, rel=0.06)


def test_weights_start_a_network_for_other_images_and_classes(tmp_path: Path) -> None:
    path = tmp_path / "given.safetensors"
    given = random_state()
    tensor_files.write(path, given, {"format": "pt"})
    same = initial_state(spec(weights=str(path)), SIZE, CLASSES, seed=0)
    assert all(torch.equal(same[name], given[name]) for name in given)
    other = initial_state(spec(weights=str(path)), 24, 7, seed=0)
    assert other["encoder.pos_embedding"].shape == (1, 37, 48)
    # The class token's own position is not interpolated.
    assert torch.equal(other["encoder.pos_embedding"][:, 0], given["encoder.pos_embedding"][:, 0])
    assert other["heads.head.weight"].shape == (7, 48)
    with pytest.raises(ConfigError, match=r"model\.weights: .* does not fit the model: .*encoder_layer_0"):
        initial_state(spec(weights=str(path), mlp=128), SIZE, CLASSES, seed=0)


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"heads": 5}, 16, "model.heads: 5 heads cannot share a width of 48 evenly"),
        ({}, 18, "data.image_size: 18 is no multiple of the patch, which has 4 pixels"),
        ({"patch": 32}, 16, "data.image_size: 16 is no multiple of the patch, which has 32 pixels"),
    ],
)
def test_impossible_networks_are_named(settings: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vit_outline(spec(**settings), size, CLASSES)
