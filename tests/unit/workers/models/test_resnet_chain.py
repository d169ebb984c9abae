"""The parts against the real thing: torchvision's own networks, bit for bit, and the outline against both."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cache_store.errors import ConfigError
from tests.support.kept_elements import kept_elements
from workers.models.outline import PartOutline
from workers.models.resnet import parts as resnet
from workers.models.resnet.outline import RESNETS
from workers.models.resnet.outline import resnet_outline as outline
from workers.specs.experiment import ResNetSpec

CLASSES = 7
CUTS = [(name, cut) for name, facts in RESNETS.items() for cut in range(facts.convs + 1)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only lose by sharing them out, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spec(name: str, **given: Any) -> ResNetSpec:
    return ResNetSpec(name=name, **given)  # type: ignore[arg-type]


def build_chain(model: ResNetSpec, size: int, state: dict[str, Tensor]) -> list[nn.Module]:
    """All parts, each strictly loaded with its share of `state`; all of `state` is used exactly once."""
    parts, seen = [], []
    for name in resnet.part_names(model, size, CLASSES):
        part = resnet.build_part(model, size, CLASSES, name)
        names = list(part.state_dict())
        assert names == resnet.part_state_names(model, size, CLASSES, name)
        part.load_state_dict({key: state[key] for key in names}, strict=True)
        parts.append(part)
        seen += names
    assert sorted(seen) == sorted(state)
    return parts


def forward(parts: list[nn.Module], images: Tensor) -> Any:
    value: Any = (images,)
    for part in parts:
        value = part(value)
    return value


class Reference:
    """One train step and one evaluation of torchvision's own forward."""

    def __init__(self, model: ResNetSpec, size: int) -> None:
        network = resnet.build_torchvision(model, CLASSES)
        torch.manual_seed(1)
        self.images = torch.randn(2, 3, size, size)
        self.labels = torch.tensor([0, CLASSES - 1])
        self.state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        self.logits = self.step([network], lambda x: network(x))
        self.grads = {name: weight.grad for name, weight in network.named_parameters()}
        self.after = network.state_dict()
        network.eval()
        with torch.no_grad():
            self.evaluated = network(self.images)

    def step(self, parts: list[nn.Module], run: Any) -> Tensor:
        torch.manual_seed(2)  # dropout's
        for part in parts:
            part.train()
        logits: Tensor = run(self.images)
        torch.autograd.backward(nn.functional.cross_entropy(logits, self.labels))
        return logits.detach()


@functools.lru_cache(maxsize=1)
def reference(name: str, stem: str, classifier: str, size: int) -> Reference:
    # Cuts of one network are tested one after another: only the latest is kept.
    return Reference(spec(name, stem=stem, classifier=classifier), size)


def assert_same_as_torchvision(model: ResNetSpec, size: int) -> None:
    real = reference(model.name, model.stem, model.classifier, size)
    parts = build_chain(model, size, real.state)
    logits = real.step(parts, lambda images: forward(parts, images))
    assert torch.equal(logits, real.logits)
    for part in parts:
        for name, weight in part.named_parameters():
            assert weight.grad is not None
            assert torch.equal(weight.grad, real.grads[name]), name  # type: ignore[arg-type]
        for name, buffer in part.named_buffers():
            assert torch.equal(buffer, real.after[name]), name
        part.eval()
    with torch.no_grad():
        assert torch.equal(forward(parts, real.images), real.evaluated)


@pytest.mark.parametrize(("name", "cut"), CUTS)
def test_chain_is_torchvision_bit_for_bit(name: str, cut: int) -> None:
    assert_same_as_torchvision(spec(name, head_convs=cut), 32)


@pytest.mark.parametrize(
    ("name", "size", "settings"),
    [
        ("resnet18", 16, {"stem": "small", "classifier": "linear"}),
        ("resnet18", 33, {"segments": "blocks"}),
        ("resnet18", 33, {"segments": "blocks", "head_convs": 2}),
        ("resnet18", 33, {"segments": "blocks", "head_convs": 0}),
        ("resnet50", 24, {"stem": "small", "head_convs": 2, "segments": "blocks"}),
        ("resnet18", 64, {"segments": (("stem",), ("layer1", "layer2.0"), ("layer2.1", "layer3", "layer4"))}),
    ],
)
def test_other_stems_heads_and_segments(name: str, size: int, settings: dict[str, Any]) -> None:
    assert_same_as_torchvision(spec(name, **settings), size)


def test_linear_imagenet_is_plain_torchvision() -> None:
    state = resnet.initial_state(spec("resnet18", classifier="linear"), CLASSES, seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        plain = torchvision.models.resnet18(weights=None, num_classes=CLASSES).state_dict()
    assert list(state) == list(plain)
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.items())


def run_on_meta(module: nn.Module, inputs: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    out = module.eval()(tuple(torch.empty(1, *shape, device="meta") for shape in inputs))
    return tuple(tuple(one.shape[1:]) for one in (out if isinstance(out, tuple) else (out,)))


def check_part(module: nn.Module, expected: PartOutline) -> None:
    assert sum(weight.numel() for weight in module.parameters()) == expected.parameters
    assert sum(buffer.numel() for buffer in module.buffers()) == expected.buffer_elements
    with FlopCounterMode(display=False) as counter:
        assert run_on_meta(module, expected.inputs) == expected.outputs
    assert counter.get_total_flops() == expected.flops


def check_outline(model: ResNetSpec, size: int) -> None:
    chain = outline(model, size, CLASSES)
    last = len(chain.blocks)
    for part in (*chain.blocks, chain.head):
        check_part(resnet.build_part(model, size, CLASSES, part.name, "meta"), part)
    for source in (1, last - 1):
        for target in {last, source + 1}:
            adapter = resnet.build_adapter(model, size, CLASSES, source, target, 0, "meta")
            check_part(adapter, chain.adapter(source, target))
    aux = resnet.build_aux(model, size, CLASSES, last, 0, "meta")
    check_part(aux, chain.aux(last))


@pytest.mark.parametrize(("name", "cut"), CUTS)
def test_outline_is_the_real_network(name: str, cut: int) -> None:
    check_outline(spec(name, head_convs=cut, classifier="linear" if cut == 2 else "mlp"), 224)


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(["resnet18", "resnet50"]),
    size=st.one_of(st.integers(33, 97), st.integers(1, 8)),
    stem=st.sampled_from(["imagenet", "small"]),
    cut=st.integers(0, 2),
)
def test_outline_holds_for_any_image_size(name: str, size: int, stem: str, cut: int) -> None:
    check_outline(spec(name, stem=stem, head_convs=cut), size)


def check_kept(module: nn.Module, expected: PartOutline, batch: int = 8) -> None:
    inputs = tuple(torch.randn(batch, *shape) for shape in expected.inputs)
    total = kept_elements(module, inputs)
    assert total == pytest.approx(batch * expected.saved_elements, rel=0.1), expected.name


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("resnet18", {}),
        ("resnet18", {"head_convs": 2, "dropout": 0.0, "stem": "small", "segments": "blocks"}),
        ("resnet18", {"segments": (("stem",), ("layer1", "layer2", "layer3", "layer4"))}),
        ("resnet50", {"head_convs": 2}),
        ("resnet50", {"head_convs": 0}),
        ("resnext50_32x4d", {"head_convs": 3, "classifier": "linear", "segments": "blocks"}),
    ],
)
def test_saved_elements_are_what_autograd_keeps(name: str, given: dict[str, Any]) -> None:
    model, size = spec(name, **given), 32 if "stem" in given else 64
    chain = outline(model, size, CLASSES)
    last = len(chain.blocks)
    for part in (*chain.blocks, chain.head):
        module = resnet.build_part(model, size, CLASSES, part.name)
        check_kept(module, part)
    check_kept(resnet.build_adapter(model, size, CLASSES, 1, last, 0), chain.adapter(1, last))
    # What a local classifier without a mapping counts, its block keeps: their sum is looked at below.
    source = 1 if chain.bare_head else last
    check_kept(resnet.build_aux(model, size, CLASSES, source, 0), chain.aux(source))


def test_figures_of_a_path_add_up() -> None:
    """Over a whole path autograd keeps each shared tensor once, and so does the sum of the outlines."""
    model, size, batch = spec("resnet18"), 64, 8
    chain = outline(model, size, CLASSES)
    parts = [resnet.build_part(model, size, CLASSES, "seg1")]
    parts += [resnet.build_adapter(model, size, CLASSES, 1, 4, 0)]
    parts += [resnet.build_part(model, size, CLASSES, "head")]

    class Path(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(parts)

        def forward(self, boundary: Any) -> Any:
            for part in self.parts:
                boundary = part(boundary)
            return boundary

    total = kept_elements(Path(), (torch.randn(batch, 3, size, size),))
    expected = sum(p.saved_elements for p in (chain.part("seg1"), chain.adapter(1, 4), chain.part("head")))
    assert total == pytest.approx(batch * expected, rel=0.02)


def test_figures_of_a_last_segment_and_its_local_classifier_add_up() -> None:
    model, batch = spec("resnet18", head_convs=0), 8
    chain = outline(model, 64, CLASSES)
    local = resnet.build_aux(model, 64, CLASSES, 4, 0)
    assert list(local.state_dict()) == ["fc.weight", "fc.bias"]
    path = nn.Sequential(resnet.build_part(model, 64, CLASSES, "seg4"), local)
    total = kept_elements(path, tuple(torch.randn(batch, *shape) for shape in chain.boundaries[3]))
    expected = chain.part("seg4").saved_elements + chain.aux(4).saved_elements
    # Statistics of batch normalization are a fortieth of so small a path, the last ReLU's result is a tenth.
    assert total == pytest.approx(batch * expected, rel=0.03)


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_initial_weights_are_the_same_wherever_the_head_begins(cut: int) -> None:
    state = resnet.initial_state(spec("resnet50", head_convs=cut), CLASSES, 5)
    other = resnet.initial_state(spec("resnet50"), CLASSES, 5)
    assert list(state) == list(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def test_whole_block_head_takes_one_tensor_or_both() -> None:
    model = spec("resnet50", head_convs=3)
    head = resnet.build_part(model, 64, CLASSES, "head")
    state = resnet.initial_state(model, CLASSES, 0)
    head.load_state_dict({name: state[name] for name in head.state_dict()})
    x = torch.randn(2, 2048, 2, 2)
    head.eval()
    assert torch.equal(head((x,)), head((x.clone(), x.clone())))


def test_adapters_and_aux_come_from_their_seed_alone() -> None:
    model = spec("resnet18")
    before = torch.get_rng_state()
    first, second, other = (resnet.build_adapter(model, 64, CLASSES, 1, 4, seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.state_dict()["conv.weight"], other.state_dict()["conv.weight"])
    aux = resnet.build_aux(model, 64, CLASSES, 2, 3)
    state = resnet.initial_state(model, CLASSES, 9)
    assert torch.equal(torch.get_rng_state(), before)
    weight = aux.state_dict()["conv.weight"]
    assert weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.05)
    assert aux.state_dict()["bn.running_var"].eq(1).all()
    assert aux.state_dict()["bn.num_batches_tracked"] == 0
    assert aux.state_dict()["fc.weight"].std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.05)
    assert aux.state_dict()["fc.bias"].eq(0).all()
    again = resnet.initial_state(model, CLASSES, 9)
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


def test_adapter_output_feeds_every_target() -> None:
    model = spec("resnet18")
    adapter = resnet.build_adapter(model, 64, CLASSES, 1, 2, 0)
    assert [tuple(t.shape) for t in adapter((torch.randn(2, 64, 16, 16),))] == [(2, 128, 8, 8)]
    split = resnet.build_adapter(model, 64, CLASSES, 1, 4, 0)((torch.randn(2, 64, 16, 16),))
    assert [tuple(t.shape) for t in split] == [(2, 512, 2, 2), (2, 512, 2, 2)]
    aux = resnet.build_aux(model, 64, CLASSES, 4, 0)
    assert aux((torch.randn(2, 512, 2, 2), torch.randn(2, 512, 2, 2))).shape == (2, CLASSES)


def test_a_part_allocates_only_itself() -> None:
    model = spec("resnet50")
    part = resnet.build_part(model, 64, CLASSES, "seg1", "cpu")
    assert {tensor.device.type for tensor in part.state_dict().values()} == {"cpu"}
    assert not any(name.startswith(("layer2", "layer3", "layer4", "fc")) for name in part.state_dict())
    held = sum(tensor.untyped_storage().nbytes() for tensor in part.state_dict().values())
    expected = outline(model, 64, CLASSES).part("seg1")
    assert held <= 4 * (expected.parameters + 2 * expected.buffer_elements)


def test_parts_survive_copying() -> None:
    part = resnet.build_part(spec("resnet18"), 32, CLASSES, "seg4")
    clone = copy.deepcopy(part)
    assert list(clone.state_dict()) == list(part.state_dict())
    assert next(clone.parameters()) is not next(part.parameters())


def test_unknown_part() -> None:
    with pytest.raises(ValueError, match="no part 'seg7'"):
        resnet.build_part(spec("resnet18"), 32, CLASSES, "seg7")


@functools.lru_cache(maxsize=1)
def published() -> dict[str, Tensor]:
    """A file as torchvision publishes it: 1000 classes, and without num_batches_tracked."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        state = torchvision.models.resnet18(weights=None).state_dict()
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def save(state: Any, path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_fill_everything_but_another_classifier(tmp_path: Path, suffix: str) -> None:
    path = save(published(), tmp_path / f"resnet18{suffix}")
    state = resnet.initial_state(spec("resnet18", weights=path), CLASSES, 0)
    random = resnet.initial_state(spec("resnet18"), CLASSES, 0)
    assert list(state) == list(random)
    for name, tensor in state.items():
        source = random if name.startswith("fc.") or name.endswith("num_batches_tracked") else published()
        assert torch.equal(tensor, source[name]), name
    same = resnet.initial_state(spec("resnet18", classifier="linear", weights=path), 1000, 0)
    assert torch.equal(same["fc.weight"], published()["fc.weight"])


def test_weights_with_another_stem_leave_the_whole_stem_random(tmp_path: Path) -> None:
    given = {name: tensor.half() for name, tensor in published().items()} | {"bn1.weight": torch.full((64,), 2.0)}
    path = save(given, tmp_path / "half.safetensors")
    state = resnet.initial_state(spec("resnet18", stem="small", weights=path), CLASSES, 0)
    assert state["conv1.weight"].shape == (64, 3, 3, 3)
    assert state["bn1.weight"].eq(1).all()
    assert state["layer1.0.conv1.weight"].dtype == torch.float32
    assert torch.equal(state["layer1.0.conv1.weight"], given["layer1.0.conv1.weight"].float())


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    given = published() | {"extra": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}
    del given["bn1.weight"]
    path = save(given, tmp_path / "odd.pth")
    with pytest.raises(ConfigError) as caught:
        resnet.initial_state(spec("resnet18", weights=path), CLASSES, 0)
    for expected in (
        "unexpected extra",
        "missing bn1.weight",
        "layer1.0.conv1.weight is (1,), not (64, 64, 3, 3)",
    ):
        assert expected in caught.value.message
    with pytest.raises(ConfigError, match=r"missing layer1\.2\.conv1\.weight.* and \d+ more"):
        resnet.initial_state(spec("resnet34", weights=save(published(), tmp_path / "small.pth")), CLASSES, 0)


def test_unreadable_weights(tmp_path: Path) -> None:
    for name, content, expected in (
        ("none.pth", None, "does not exist"),
        ("some.bin", b"x", r"neither \.safetensors nor"),
        ("bad.pth", b"not a pickle", "cannot be read"),
        ("bad.safetensors", b"xxxxxxxxxxxx", "cannot be read"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=expected):
            resnet.initial_state(spec("resnet18", weights=str(path)), CLASSES, 0)
    with pytest.raises(ConfigError, match="is not a state dict"):
        resnet.initial_state(spec("resnet18", weights=save([1], tmp_path / "list.pth")), CLASSES, 0)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    path = save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match="cannot be read"):
        resnet.initial_state(spec("resnet18", weights=path), CLASSES, 0)
    assert not marker.exists()
