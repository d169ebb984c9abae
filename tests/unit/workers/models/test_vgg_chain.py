"""VGGs as chains: the same numbers as torchvision's own network, and figures that its modules bear out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cache_store.errors import ConfigError
from tests.support.kept_elements import kept_elements
from workers import tensor_files
from workers.models import single_samples
from workers.models.outline import PartOutline
from workers.models.vgg.family import VGG
from workers.models.vgg.outline import CONVS, vgg_outline
from workers.models.vgg.parts import VGGParts, build_torchvision, initial_state
from workers.specs.experiment import TrainSpec, VGGName, VGGSpec

SIZE, CLASSES = 32, 5
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"name": "vgg11_bn", "hidden": 24, "dropout": 0.25}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only lose by sharing them out, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spec(**settings: Any) -> VGGSpec:
    return VGGSpec(**{**SMALL, **settings})


def bare(**settings: Any) -> VGGSpec:
    return VGG.with_bare_head(spec(**settings))


def chain(model: VGGSpec, state: dict[str, Tensor], *, assign: bool = False) -> list[nn.Module]:
    parts = VGGParts(model, SIZE, CLASSES)
    built = []
    for name in parts.names():
        part = parts.build(name, torch.device("meta") if assign else CPU)
        part.load_state_dict({key: state[key] for key in parts.state_names(name)}, strict=True, assign=assign)
        built.append(part)
    return built


def run(parts: list[nn.Module], images: Tensor) -> Tensor:
    value: Any = (images,)
    for part in parts:
        value = part(value)
    assert isinstance(value, Tensor)
    return value


def assert_same(whole: nn.Module, parts: list[nn.Module]) -> None:
    """One step in train mode with its gradients and statistics, and an evaluation."""
    images = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    found: list[Tensor] = []
    for network, forward in (([whole], whole), (parts, lambda x: run(parts, x))):
        for module in network:
            module.train().requires_grad_()
        torch.manual_seed(2)  # dropout's
        logits = forward(images)
        nn.functional.cross_entropy(logits, torch.arange(3)).backward()
        found.append(logits.detach())
        for module in network:
            module.eval()
        with torch.no_grad():
            found.append(forward(images))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    gradients = {name: weight.grad for part in parts for name, weight in part.named_parameters()}
    buffers = {name: buffer for part in parts for name, buffer in part.named_buffers()}
    for name, weight in whole.named_parameters():
        gradient = gradients[name]
        assert weight.grad is not None
        assert gradient is not None
        assert torch.equal(gradient, weight.grad), name
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffers[name], buffer), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"head_convs": 2, "segments": "blocks"},
        {"name": "vgg13", "classifier": "linear"},
        {"name": "vgg16", "head_convs": 3},
        {"name": "vgg19_bn", "segments": (("stage1", "stage2.0"), ("stage2.1", "stage3", "stage4"), ("stage5",))},
    ],
)
def test_the_chain_computes_what_torchvision_computes_to_the_bit(settings: dict[str, Any]) -> None:
    model = spec(**settings)
    state = initial_state(model, CLASSES, seed=3)
    whole = build_torchvision(model, CLASSES)
    whole.load_state_dict(state, strict=True)
    assert_same(whole, chain(model, state))


def test_a_chain_with_a_bare_head_computes_the_same() -> None:
    state = initial_state(spec(), CLASSES, seed=3)
    whole = build_torchvision(spec(), CLASSES)
    whole.load_state_dict(state, strict=True)
    assert_same(whole, chain(bare(), state))


def test_with_its_own_classifier_it_is_plain_torchvision() -> None:
    model = spec(name="vgg11", classifier="torchvision")
    state = initial_state(model, CLASSES, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        plain = torchvision.models.vgg11(num_classes=CLASSES, dropout=0.25)
    assert list(plain.state_dict()) == list(state)
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    assert_same(plain, chain(model, state, assign=True))


def test_the_parts_hold_every_tensor_of_the_network_once() -> None:
    for settings in ({}, {"head_convs": 2}, {"segments": "blocks"}, {"name": "vgg19"}):
        model = spec(**settings)
        state = initial_state(model, CLASSES, seed=3)
        parts = VGGParts(model, SIZE, CLASSES)
        assert [name for part in parts.names() for name in parts.state_names(part)] == list(state)
    torch.manual_seed(3)
    for name, tensor in build_torchvision(model, CLASSES).state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_small_classifiers_start_after_torchvisions_rules() -> None:
    state = initial_state(spec(hidden=512), CLASSES, seed=3)
    assert state["classifier.0.weight"].std().item() == pytest.approx(0.01, rel=0.02)
    assert state["features.11.weight"].std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    assert not any(state[name].any() for name in ("classifier.0.bias", "classifier.3.bias", "features.11.bias"))


def test_every_named_network_has_torchvisions_number_of_parameters() -> None:
    assert {name.removesuffix("_bn") for name in get_args(VGGName)} == set(CONVS)
    for name in get_args(VGGName):
        outline = vgg_outline(VGGSpec(name=name, classifier="torchvision"), 224, 1000)
        total = sum(part.parameters for part in (*outline.blocks, outline.head))
        assert total == torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].meta["num_params"], name


def check_part(module: nn.Module, expected: PartOutline) -> None:
    assert sum(weight.numel() for weight in module.parameters()) == expected.parameters
    assert sum(buffer.numel() for buffer in module.buffers()) == expected.buffer_elements
    inputs = tuple(torch.empty(1, *shape, device="meta") for shape in expected.inputs)
    with FlopCounterMode(display=False) as counter:
        out = module.eval()(inputs)
    assert tuple(tuple(one.shape[1:]) for one in (out if isinstance(out, tuple) else (out,))) == expected.outputs
    assert counter.get_total_flops() == expected.flops, expected.name


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (spec(), 32),
        (spec(name="vgg16", segments="blocks", classifier="torchvision"), 224),
        (bare(name="vgg13"), 70),
        (bare(segments="blocks"), 64),
    ],
)
def test_figures_are_those_of_the_modules(model: VGGSpec, size: int) -> None:
    outline, parts = vgg_outline(model, size, CLASSES), VGGParts(model, size, CLASSES)
    meta = torch.device("meta")
    for part in (*outline.blocks, outline.head):
        check_part(parts.build(part.name, meta), part)
    last = len(outline.blocks)
    for source in (1, last - 1):
        check_part(parts.build_adapter(source, last, 0, meta), outline.adapter(source, last))
    for source in (1, last):
        check_part(parts.build_aux(source, 0, meta, None), outline.aux(source))


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (spec(), 32),
        (spec(name="vgg11", segments="blocks", classifier="linear"), 64),
        (spec(name="vgg13", classifier="torchvision", dropout=0.0), 64),
        (bare(name="vgg16_bn"), 32),
    ],
)
def test_kept_elements_are_those_that_autograd_keeps(model: VGGSpec, size: int) -> None:
    outline, parts, rows = vgg_outline(model, size, CLASSES), VGGParts(model, size, CLASSES), 8
    for part in (*outline.blocks, outline.head):
        kept = kept_elements(parts.build(part.name, CPU), tuple(torch.randn(rows, *shape) for shape in part.inputs))
        # Statistics of batch normalization are not counted.
        assert kept == pytest.approx(rows * part.saved_elements, rel=0.1), part.name


def test_figures_of_a_path_add_up() -> None:
    """In-place ReLU and pooling across the joints keep each shared tensor once, and so does the sum of the outlines."""
    model, rows = spec(segments="blocks"), 8
    outline, parts = vgg_outline(model, 64, CLASSES), VGGParts(model, 64, CLASSES)
    names = ["seg1", "seg2", "seg3", "seg4"]
    last = len(outline.blocks)
    modules = [*(parts.build(name, CPU) for name in names), parts.build_adapter(4, last, 0, CPU)]
    path = nn.Sequential(*modules, parts.build("head", CPU))
    figures = [*(outline.part(name) for name in names), outline.adapter(4, last), outline.head]
    expected = sum(part.saved_elements for part in figures)
    assert kept_elements(path, (torch.randn(rows, 3, 64, 64),)) == pytest.approx(rows * expected, rel=0.02)


def test_a_local_head_maps_where_the_boundary_is_not_what_the_head_reads() -> None:
    published, cut = vgg_outline(bare(), 32, CLASSES), vgg_outline(spec(), 32, CLASSES)
    assert [published.aux_maps(source) for source in range(1, 6)] == [True, True, True, True, False]
    assert all(cut.aux_maps(source) for source in range(1, 6))
    assert published.head.units == ("classifier",)
    assert published.head_input == ((512, 1, 1),)
    assert cut.head.units == ("stage5.1", "classifier")
    assert cut.head_input == ((512, 2, 2),)


def test_lists_that_leave_convolutions_to_the_head_give_them_to_the_last_segment_of_a_bare_one() -> None:
    lists = (("stage1", "stage2"), ("stage3",), ("stage4", "stage5.0"))
    found = vgg_outline(bare(segments=lists), 32, CLASSES)
    assert [block.units[-1] for block in found.blocks] == ["stage2.0", "stage3.1", "stage5.1"]
    whole = vgg_outline(bare(segments=(*lists[:2], ("stage4",)), head_convs=2), 32, CLASSES)
    assert whole == found
    assert vgg_outline(bare(segments=(*lists[:2], ("stage4", "stage5"))), 32, CLASSES) == found


def test_weights_start_a_network_of_other_classes(tmp_path: Path) -> None:
    path = tmp_path / "given.safetensors"
    given = initial_state(spec(), 9, seed=7)
    tensor_files.write(path, given, {"format": "pt"})
    same = initial_state(spec(weights=str(path)), 9, seed=0)
    assert all(torch.equal(same[name], given[name]) for name in given)
    other = initial_state(spec(weights=str(path), classifier="linear"), CLASSES, seed=0)
    assert torch.equal(other["features.0.weight"], given["features.0.weight"])
    assert other["classifier.0.weight"].shape == (CLASSES, 512)
    with pytest.raises(ConfigError, match=r"model\.weights: .* does not fit the model: .*unexpected features\.1\."):
        initial_state(spec(weights=str(path), name="vgg11"), CLASSES, seed=0)


def test_published_weights_of_other_classes_lose_the_last_layer_alone(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in torchvision.models.vgg11().state_dict().items()}
    # One element each, spread out: half a gigabyte of ones would take time to write.
    given = {name: torch.ones(1).expand(shape) for name, shape in shapes.items()}
    path = tmp_path / "vgg11.pth"
    torch.save(given, path)
    state = initial_state(spec(name="vgg11", classifier="torchvision", weights=str(path)), CLASSES, seed=0)
    assert state["classifier.3.weight"].eq(1).all()
    assert state["classifier.6.weight"].shape == (CLASSES, 4096)
    assert state["classifier.6.weight"].std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({}, 31, "data.image_size: 31 is too small: vgg11_bn halves it 5 times; the smallest image it takes is 32"),
        ({"head_convs": 3}, 32, r"model.head_convs: 3, but the last stage of vgg11_bn has 2 .*; allowed: 1-2"),
        ({"segments": (("stage1", "stage7"),)}, 32, "'stage7' not found; did you mean 'stage5'"),
        ({"segments": (("stage1", "stage3.2"),)}, 32, "'stage3.2' not found; stage3 has blocks 0-1"),
        ({"segments": (("stage1", "stage5.1"),)}, 32, "'stage5.1' belongs to the head"),
        ({"segments": (("stage1", "classifier"),)}, 32, "'classifier' belongs to the head"),
        ({"segments": (("stage1", "stage3"), ("stage4", "stage5"))}, 32, "missing 'stage2.0'"),
        ({"name": "vgg13", "segments": (("stage1.1", "stage1.0", "stage2"),)}, 32, "missing 'stage3.0'"),
    ],
)
def test_impossible_networks_are_named(settings: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vgg_outline(spec(**settings), size, CLASSES)


class Stage:
    """A stage as rules see it."""

    name, trained, adapter = "stage2-seg2", ("seg2",), None

    def __init__(self, aux: int | None) -> None:
        self.aux = aux


@pytest.mark.parametrize(("aux", "refused"), [(None, False), (2, True), (5, False)])
def test_one_sample_alone_is_refused_where_a_local_head_maps_to_one_pixel(aux: int | None, refused: bool) -> None:
    outline = vgg_outline(bare(), 32, CLASSES)
    train = TrainSpec(batch_size=16, drop_last=False)
    found = list(VGG.stage_problems(Stage(aux), outline, train, rows=33))
    assert bool(found) == refused
    assert not refused or "one sample is alone" in found[0][1]
    # torch is asked too.
    for part, shapes in single_samples.mapped(Stage(aux), outline).items():
        assert part == "aux"
        module = VGGParts(bare(), 32, CLASSES).build_aux(2, 0, CPU, None).train()
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            module((torch.randn(1, *outline.boundaries[2][0]),))
        assert shapes == ((512, 1, 1),)
