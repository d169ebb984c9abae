"""Networks that a user's function builds: cut by themselves, equal to the whole to the bit, or refused by name."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from kept_elements import kept_elements
from torch.nn import functional as F

from cache_store.errors import ConfigError
from workers.models.python.building import build
from workers.models.python.cutting import cut
from workers.models.python.outline import bridge
from workers.models.python.parts import PythonParts
from workers.models.registry import family
from workers.specs.experiment import PythonSpec

_numbers = itertools.count()
HEAD = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\nimport segprop\n"
RESIDUAL = """
class Block(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.conv = nn.Conv2d(i, o, 3, padding=1)
        self.bn = nn.BatchNorm2d(o)
        self.way = nn.Conv2d(i, o, 1)
        self.drop = nn.Dropout(0.2)
    def forward(self, x):
        return torch.relu(self.drop(self.bn(self.conv(x))) + self.way(x))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.Sequential(Block(4, 6), Block(6, 8))
        self.fc = nn.Linear(8, 5)
    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 2)
        x = self.layers(x)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))

def build(): return Net()
"""
CHAIN = """
def build(width=4):
    first = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(width, 6, 3, 2), nn.ReLU())
    return segprop.Chain({"first": first, "second": second}, [nn.Flatten(), nn.Linear(24, 5)])
"""
VGG = """
def build(): return nn.Sequential(
    nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
    nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5))
"""
TOKENS = """
class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(3, 8, 4, 4)
        self.position = nn.Parameter(torch.zeros(1, 4, 8))
    def forward(self, x): return self.project(x).flatten(2).transpose(1, 2) + self.position
class Mean(nn.Module):
    def forward(self, x): return x.mean(1)
def build():
    layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)]
    return segprop.Chain([Patches(), *layers], [Mean(), nn.Linear(8, 5)])
"""
NETWORKS = {
    "residual": (RESIDUAL, ["stem", "layers_0", "layers_1", "head"]),
    "chain": (CHAIN, ["first", "second", "head"]),
    "sequential": (VGG, ["block0", "block4", "block7", "head"]),
    "tokens": (TOKENS, ["block1", "block2", "block3", "head"]),
}


def spec(folder: Path, source: str, **settings: Any) -> PythonSpec:
    name = f"nets_{next(_numbers)}"
    (folder / f"{name}.py").write_text(HEAD + source)
    return PythonSpec(build=f"{name}:build", path=str(folder), **settings)


@pytest.mark.parametrize("case", NETWORKS)
def test_the_chain_equals_the_network_in_outputs_gradients_and_running_statistics(tmp_path: Path, case: str) -> None:
    source, names = NETWORKS[case]
    model = spec(tmp_path, source)
    parts = PythonParts(model, (3, 8, 8), 5)
    assert parts.names() == names
    whole = build(model, 3).train()
    state = whole.state_dict()
    modules = {name: parts.build(name, torch.device("cpu")).train() for name in names}
    assert sorted(key for name in names for key in parts.state_names(name)) == sorted(state)
    for name, module in modules.items():
        module.load_state_dict({key: state[key].clone() for key in parts.state_names(name)}, strict=True)
    x, targets = torch.rand(6, 3, 8, 8), torch.arange(6) % 5
    torch.manual_seed(1)
    want = whole(x)
    torch.manual_seed(1)
    value: Any = (x,)
    for name in names:
        if name != "head":
            assert tuple(value[0].shape[1:]) == parts.boundary(names.index(name))["x"]
        value = modules[name](value)
    assert torch.equal(value, want)
    F.cross_entropy(want, targets).backward()
    F.cross_entropy(value, targets).backward()
    trained = {key: tensor for module in modules.values() for key, tensor in module.named_parameters()}
    assert trained.keys() == dict(whole.named_parameters()).keys()
    for key, parameter in whole.named_parameters():
        assert torch.equal(trained[key].grad, parameter.grad), key
    after = {key: tensor for module in modules.values() for key, tensor in module.state_dict().items()}
    assert all(torch.equal(after[key], tensor) for key, tensor in whole.state_dict().items())


def test_figures_of_parts_are_those_of_the_modules(tmp_path: Path) -> None:
    found = cut(spec(tmp_path, VGG), (3, 8, 8), 5)
    first = found.outline.blocks[0]
    assert first.parameters == 3 * 4 * 9 + 4 + 8
    assert first.flops == 2 * 3 * 4 * 9 * 36
    assert first.outputs == ((4, 3, 3),)
    kept = kept_elements(copy.deepcopy(found.parts["block0"]), (torch.rand(2, 3, 8, 8),))
    assert first.saved_elements == kept // 2


def test_a_number_of_segments_merges_units_and_too_many_are_refused(tmp_path: Path) -> None:
    names = PythonParts(spec(tmp_path, VGG, segments=2), (3, 8, 8), 5).names()
    assert len(names) == 3
    with pytest.raises(ConfigError, match="segments: 4: the network has 3 places"):
        cut(spec(tmp_path, VGG, segments=4), (3, 8, 8), 5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def build(): return 3", "returned a int; allowed: a segprop.Chain"),
        ("def build(): return nn.Linear(3, 5)", "cannot take samples of shape (3, 8, 8)"),
        ("def build(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 5))", "nothing to cut"),
        ("def build(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(5))", "a lazy module"),
        ("def build(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1))", "one row of scores for each"),
        (
            "import os\ndef build():\n    w = int.from_bytes(os.urandom(3), 'little') % 30000 + 1\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(192, w), nn.Linear(w, 5))",
            "gives another network each time it is called: 1.",
        ),
        (
            "import os\ndef build():\n    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, 5))\n"
            "    net[1].bias.data.fill_(int.from_bytes(os.urandom(4), 'little') / 7)\n    return net",
            "1.bias differs between two calls under one seed",
        ),
        (
            "class Keeps(nn.Linear):\n    def __init__(self):\n        super().__init__(192, 4)\n"
            "        self.mean = torch.zeros(4)\n"
            "def build(): return nn.Sequential(nn.Flatten(), Keeps(), nn.Linear(4, 5))",
            "1.mean is a tensor outside parameters and buffers",
        ),
        (
            "class Counts(nn.Linear):\n    n = 0\n    def forward(self, x):\n        self.n += 1\n"
            "        return super().forward(x) + self.n\n"
            "def build(): return nn.Sequential(nn.Flatten(), Counts(192, 4), nn.Linear(4, 5))",
            "gives other outputs for the same input in evaluation",
        ),
        (
            "def build():\n    same = nn.Linear(192, 192)\n"
            "    blocks = [nn.Sequential(nn.Flatten(), same), nn.Sequential(nn.ReLU(), same)]\n"
            "    return segprop.Chain(blocks, nn.Linear(192, 5))",
            "block1 and block2 share",
        ),
        (
            "def build():\n    layers = [nn.Linear(192, 192), nn.Linear(192, 192), nn.Linear(192, 5)]\n"
            "    net = nn.Sequential(nn.Flatten(), *layers)\n    net[2].weight = net[1].weight\n    return net",
            "block1 and block2 share",
        ),
        (
            "class Data(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            "        self.a, self.b = nn.Linear(192, 4), nn.Linear(4, 5)\n"
            "    def forward(self, x):\n        x = self.a(x.flatten(1))\n"
            "        return self.b(x if x.sum() > 0 else -x)\n"
            "def build(): return Data()",
            "the forward of Data cannot be followed",
        ),
        (
            "class Mode(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            "        self.a, self.b = nn.Linear(192, 4), nn.Linear(4, 5)\n"
            "    def forward(self, x): return self.b(F.dropout(self.a(x.flatten(1)), 0.5, self.training))\n"
            "def build(): return Mode()",
            "does other things in training than in evaluation",
        ),
        (
            "class U(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            "        self.down, self.up, self.out = nn.Linear(192, 4), nn.Linear(4, 192), nn.Linear(192, 5)\n"
            "    def forward(self, x):\n        x = x.flatten(1)\n"
            "        return self.out(self.up(self.down(x)) + x) + x[:, :5]\n"
            "def build(): return U()",
            "behind down: flatten, down; behind up: flatten, up",
        ),
        (
            "class Left(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            "        self.a, self.b, self.c = nn.Linear(192, 4), nn.Linear(4, 5), nn.Linear(2, 2)\n"
            "    def forward(self, x): return self.b(self.a(x.flatten(1)))\n"
            "def build(): return Left()",
            "c.weight, c.bias: in the network, but its forward does not use it",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_so_is_refused_by_name(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cut(spec(tmp_path, source), (3, 8, 8), 5)
    assert message in caught.value.message
    assert caught.value.details["where"] == "model.build"


SHAPES = [(4, 8, 8), (6, 4, 4), (3, 5, 5), (16, 8), (9, 6), (12,), (7,)]


@pytest.mark.parametrize("source", SHAPES)
@pytest.mark.parametrize("target", SHAPES)
def test_adapters_lead_from_any_shape_to_any_other(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    from workers.models.python.bridges import build_adapter, build_aux

    cpu = torch.device("cpu")
    x = torch.rand(3, *source, requires_grad=True)
    state = torch.get_rng_state()
    adapter, again = (build_adapter(source, target, 5, cpu) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    (out,) = adapter((x,))
    assert out.shape == (3, *target)
    assert torch.equal(out, again((x,))[0])
    assert (bridge(source, target).layer == "none") == (source == target)
    assert build_aux(source, 5, 1, cpu)((x,)).shape == (3, 5)


def test_no_adapter_leads_to_other_dimensions() -> None:
    with pytest.raises(ConfigError, match="no adapter leads from"):
        bridge((2, 3, 4, 5), (6,))


def test_too_few_scores_for_the_classes_are_a_problem_and_more_are_none(tmp_path: Path) -> None:
    python, model = family("python"), spec(tmp_path, VGG)
    found = python.inspect(model)
    for classes, problems in ((5, 0), (4, 0), (6, 1)):
        chain = python.outline(model, found, (3, 8, 8), classes)
        assert len(list(python.fit_problems(model, chain, (3, 8, 8)))) == problems


def test_source_other_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    model = spec(tmp_path, VGG, code="0" * 64)
    for look in (family("python").inspect, lambda pinned: build(pinned, 0)):
        with pytest.raises(ConfigError, match="has changed since"):
            look(model)


def test_a_resnet_of_torchvision_is_cut_at_its_residual_blocks() -> None:
    model = PythonSpec(build="torchvision.models:resnet18", args={"num_classes": 5})
    names = list(cut(model, (3, 32, 32), 5).parts)
    assert names == ["conv1", *(f"layer{i}_{j}" for i in range(1, 5) for j in range(2)), "head"]
