"""Classifiers of torchvision, timm and transformers: cut by following their own forward, equal to it to the bit."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cache_store.errors import ConfigError
from workers.models.base import Export, Start
from workers.models.library.networks import cut
from workers.models.python.cutting import cut_network
from workers.models.registry import family
from workers.specs.experiment import HFImageSpec, TimmSpec, TorchvisionSpec

pytest.importorskip("timm", reason="timm is not installed (segprop[timm])")
VIT = {
    "model_type": "vit",
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
SWIN = {"embed_dim": 12, "depths": (1, 2), "num_heads": (2, 2), "window_size": 4, "patch_size": 4, "img_size": 32}
#: Case -> model, and the blocks that it is cut into.
NETWORKS: dict[str, tuple[Any, list[str]]] = {
    "torchvision": (
        TorchvisionSpec(name="shufflenet_v2_x0_5", segments=3),
        ["conv1_0", "stage2_3", "stage4_1"],
    ),
    "timm tokens": (
        TimmSpec(name="vit_tiny_patch16_224", args={"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24}),
        ["patch_embed", "block0", "block1"],
    ),
    "timm maps with channels last": (
        TimmSpec(name="swin_tiny_patch4_window7_224", args=SWIN),
        ["patch_embed", "layers_0", "layers_1_downsample", "layers_1_blocks_0", "layers_1_blocks_1"],
    ),
    "transformers": (
        HFImageSpec(family="hf_image", config=VIT),
        ["vit_embeddings", "vit_layers_0", "vit_layers_1", "vit_layers_2"],
    ),
}
SAMPLE, CLASSES = (3, 32, 32), 5


def whole(model: Any, seed: int = 3) -> nn.Module:
    """The library's own network, its forward as the library has it."""
    return family(model.family).library(model).built(CLASSES, seed)  # type: ignore[attr-defined, no-any-return]


def scores(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    given = network(x)
    return given if isinstance(given, torch.Tensor) else given.logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", NETWORKS)
def test_the_chain_equals_the_librarys_own_forward_and_its_gradients_to_the_bit(case: str) -> None:
    model, names = NETWORKS[case]
    own = family(model.family)
    parts = own.parts(own.architecture(model, own.inspect(model)), SAMPLE, CLASSES)
    assert parts.names() == [*names, "head"]
    network = whole(model).train()
    state = network.state_dict()
    modules = {name: parts.build(name, torch.device("cpu")).train() for name in parts.names()}
    for name, module in modules.items():
        module.load_state_dict({key: state[key].clone() for key in parts.state_names(name)}, strict=True)
    x, targets = torch.rand(7, *SAMPLE), torch.arange(7) % CLASSES
    torch.manual_seed(1)
    want = scores(network, x)
    torch.manual_seed(1)
    value: Any = (x,)
    for module in modules.values():
        value = module(value)
    assert torch.equal(value, want)
    F.cross_entropy(want, targets).backward()
    F.cross_entropy(value, targets).backward()
    trained = {key: tensor for module in modules.values() for key, tensor in module.named_parameters()}
    for key, parameter in network.named_parameters():
        other = trained[key].grad
        assert (parameter.grad is None and other is None) or torch.equal(other, parameter.grad), key
    after = {key: tensor for module in modules.values() for key, tensor in module.state_dict().items()}
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize("case", NETWORKS)
def test_what_is_exported_the_library_loads_with_equal_scores(tmp_path: Path, case: str) -> None:
    model, _ = NETWORKS[case]
    own = family(model.family)
    settled = own.architecture(model, own.inspect(model))
    network = whole(model, 7).eval()
    states = iter([("all", dict(network.state_dict()))])
    export = Export(settled, CLASSES, states, {}, {"class_names": list("abcde")}, {})
    own.export(export, tmp_path / "model")
    loaded = runpy.run_path(str(tmp_path / "model" / "load_model.py"))["load"]()
    x = torch.rand(3, *SAMPLE)
    with torch.no_grad():
        assert torch.equal(scores(loaded, x), scores(network, x))
    if model.family == "hf_image":
        assert json.loads((tmp_path / "model" / "config.json").read_text())["id2label"]["1"] == "b"
        # And what was exported is something to start from; a classifier of other classes is drawn.
        again = HFImageSpec(family="hf_image", path=str(tmp_path / "model"))
        assert own.missing_weights(again, None) is None
        start = own.initial_state(Start(own.start(again, own.inspect(again)), 4, 1, SAMPLE))  # type: ignore[attr-defined]
        kept = [key for key, tensor in network.state_dict().items() if torch.equal(start[key], tensor)] if start else []
        assert set(network.state_dict()) - set(kept) == {"classifier.weight", "classifier.bias"}


def test_a_torchvision_file_of_other_classes_starts_all_but_the_classifier(tmp_path: Path) -> None:
    model = TorchvisionSpec(name="shufflenet_v2_x0_5")
    torch.save(whole(model).state_dict(), tmp_path / "w.pth")
    given = TorchvisionSpec(name="shufflenet_v2_x0_5", weights=str(tmp_path / "w.pth"))
    start = family("torchvision").initial_state(Start(given, 8, 9, SAMPLE))  # type: ignore[attr-defined]
    assert start["fc.weight"].shape[0] == 8
    assert torch.equal(start["conv1.0.weight"], whole(model).state_dict()["conv1.0.weight"])
    assert family("torchvision").weights_digest(given, None) is not None


def test_blocks_of_maps_with_channels_last_are_bridged_over_channels() -> None:
    model, names = NETWORKS["timm maps with channels last"]
    outline = cut(family("timm").library(model), SAMPLE, CLASSES).outline  # type: ignore[attr-defined]
    assert outline.boundaries[1] == ((8, 8, 12),)
    assert outline.has_channels_last(1)
    assert outline.channels_first(1) == (12, 8, 8)
    parts = family("timm").parts(model, SAMPLE, CLASSES)
    last = len(names) - 1
    adapter = parts.build_adapter(1, last, 0, torch.device("cpu"))
    assert sum(p.numel() for p in adapter.parameters()) == outline.adapter(1, last).parameters == 12 * 24 + 2 * 24
    assert adapter((torch.rand(2, 8, 8, 12),))[0].shape == (2, 4, 4, 24)
    assert parts.build_aux(1, 0, torch.device("cpu"), None)((torch.rand(2, 8, 8, 12),)).shape == (2, CLASSES)


@pytest.mark.parametrize(
    ("model", "where", "message"),
    [
        (
            TorchvisionSpec(name="swin_q"),
            "model.name",
            "'swin_q' is no classifier of torchvision; did you mean 'swin_t'",
        ),
        (TorchvisionSpec(name="raft_large"), "model.name", "'raft_large' is no classifier of torchvision"),
        (TimmSpec(name="vit_tiny_patch8"), "model.name", "is no classifier of timm; did you mean"),
        (TorchvisionSpec(name="mnasnet0_5", args={"alpha": 1}), "model.name", "cannot be built: TypeError"),
        (TorchvisionSpec(name="vit_b_32"), "model.name", "cannot take samples of shape (3, 32, 32)"),
        (TorchvisionSpec(name="googlenet"), "model.name", "does other things in training than in evaluation"),
        (
            TimmSpec(name="coat_lite_tiny", args={"img_size": 32}),
            "model.name",
            "serial_blocks1_0 and serial_blocks1_1 share serial_blocks1.0.cpe.proj.weight",
        ),
        (HFImageSpec(family="hf_image"), "model.config", "neither model.path nor model.config is given"),
        (HFImageSpec(family="hf_image", config={"model_type": "bert"}), "model.config", "has no image classifier"),
        (HFImageSpec(family="hf_image", config={**VIT, "auto_map": {}}), "model.config", "auto_map: names code"),
        (HFImageSpec(family="hf_image", config={**VIT, "hidden_size": "x"}), "model.config", "vit: "),
        (HFImageSpec(family="hf_image", path="nowhere"), "model.path", "nowhere is no folder with a config.json"),
    ],
)
def test_what_is_no_chain_or_no_network_is_refused_by_name(model: Any, where: str, message: str) -> None:
    own = family(model.family)
    with pytest.raises(ConfigError) as caught:
        own.outline(model, own.inspect(model), SAMPLE, CLASSES)
    assert message in caught.value.message
    assert caught.value.details["where"] == where
    assert "segprop.Chain" not in caught.value.message


def test_a_folder_without_weights_is_planned_for_and_not_trained(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(VIT))
    own, model = family("hf_image"), HFImageSpec(family="hf_image", path=str(tmp_path))
    assert len(own.outline(model, own.inspect(model), SAMPLE, CLASSES).blocks) == 4
    assert "no *.safetensors" in str(own.missing_weights(model, None))
    assert own.weights_digest(model, None) is None


class _Windows(nn.Module):
    """Gives tokens and, beside them, their grid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 6, 3, padding=1), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        given = self.conv(x)
        return self.norm(given.flatten(2).transpose(1, 2)), (given.shape[2], given.shape[3])


class _Sized(nn.Module):
    """Decides by sizes and types, hands sizes and tuples on, and makes the number of samples anew late."""

    def __init__(self, *, by_samples: bool = False) -> None:
        super().__init__()
        self.stages = nn.ModuleList([_Windows(3), _Windows(6), _Windows(6)])
        self.fc, self.by_samples = nn.Linear(6, 5), by_samples

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = x.shape[0]
        if x.dtype != torch.float32 or x.shape[-1] % 2:
            raise ValueError("even sizes alone")
        for stage in self.stages:
            tokens, (height, width) = stage(x)
            x = tokens.transpose(1, 2).reshape(count, -1, height, width)
        if self.by_samples and count == 2:
            x = x + 1
        return self.fc(x.view(count, 6, height * width).mean(-1))


def test_sizes_decide_and_cross_joints_and_the_number_of_samples_stays_open() -> None:
    network = _Sized()
    found = cut_network(network, (3, 8, 8), "auto", by_sample=True)
    assert list(found.parts) == ["stages_0", "stages_1", "stages_2", "head"]
    for samples in (1, 4, 9):
        x = torch.rand(samples, 3, 8, 8)
        value: Any = (x,)
        for part in found.parts.values():
            value = part(value)
        assert torch.equal(value, network(x))


def test_what_the_number_of_samples_decides_is_refused() -> None:
    with pytest.raises(ConfigError, match="does something else as a chain than as a whole"):
        cut_network(_Sized(by_samples=True), (3, 8, 8), "auto", by_sample=True)
