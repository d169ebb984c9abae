"""The pure outline: published tables, segmentations, messages; and that it stays free of torch."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_store.errors import ConfigError
from workers.models.counting import stride_between
from workers.models.outline import ChainOutline
from workers.models.resnet.outline import RESNETS
from workers.models.resnet.outline import resnet_outline as outline
from workers.specs.experiment import ResNetName, ResNetSpec


def chain(name: str = "resnet18", size: int = 224, classes: int = 10, **settings: Any) -> ChainOutline:
    return outline(ResNetSpec(name=name, **settings), size, classes)  # type: ignore[arg-type]


def message(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        chain(**settings)
    return caught.value.message


def test_no_torch_is_imported() -> None:
    code = "import sys; from workers.models import registry; from workers.specs.experiment import ResNetSpec;"
    code += "model = ResNetSpec(name='resnet50');"
    code += "registry.family_of(model).outline(model, None, (3, 224, 224), 10).adapter(1, 4);"
    code += "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_outlines_travel_between_processes() -> None:
    assert pickle.loads(pickle.dumps(chain())) == chain()  # noqa: S301  our own bytes


def test_every_name_of_the_spec_is_known() -> None:
    assert set(RESNETS) == set(get_args(ResNetName))


def test_published_shapes_of_resnet18() -> None:
    found = chain("resnet18")
    assert [part.name for part in found.blocks] == ["seg1", "seg2", "seg3", "seg4"]
    assert found.boundaries == (
        ((3, 224, 224),),
        ((64, 56, 56),),
        ((128, 28, 28),),
        ((256, 14, 14),),
        ((512, 7, 7), (512, 7, 7)),
    )
    assert found.head_input == found.boundaries[4]
    assert found.head.outputs == ((10,),)
    assert found.blocks[0].units == ("stem", "layer1.0", "layer1.1")
    assert found.blocks[3].units == ("layer4.0", "layer4.1")
    assert found.head.units == ("layer4.1", "fc")


@pytest.mark.parametrize(("cut", "path_channels"), [(1, 512), (2, 512), (3, 2048)])
def test_published_shapes_of_resnet50(cut: int, path_channels: int) -> None:
    found = chain("resnet50", head_convs=cut)
    assert [shapes[0] for shapes in found.boundaries] == [
        (3, 224, 224),
        (256, 56, 56),
        (512, 28, 28),
        (1024, 14, 14),
        (2048, 7, 7),
    ]
    assert found.head_input == ((2048, 7, 7), (path_channels, 7, 7))
    assert len(found.boundaries[4]) == (1 if cut == 3 else 2)
    assert found.blocks[3].outputs == found.head.inputs == found.boundaries[4]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_adapters_reach_the_head_with_strides_8_4_2(name: str) -> None:
    found = chain(name)
    assert [found.adapter_stride(source, 4) for source in (1, 2, 3)] == [8, 4, 2]
    for source in (1, 2, 3):
        assert found.adapter(source, 4).outputs == found.head_input
        assert found.adapter(source, 4).inputs == found.boundaries[source]
    assert found.adapter(1, 3).outputs == found.boundaries[3]
    assert found.aux(4).outputs == ((10,),)
    assert found.aux_channels == (512 if name == "resnet18" else 2048)


def test_torchvision_parameter_totals() -> None:
    published = {"resnet18": 11689512, "resnet34": 21797672, "resnet50": 25557032, "resnet101": 44549160}
    published |= {"resnet152": 60192808, "wide_resnet50_2": 68883240, "resnext50_32x4d": 25028904}
    for name, parameters in published.items():
        found = chain(name, classes=1000, classifier="linear")
        assert sum(part.parameters for part in (*found.blocks, found.head)) == parameters
    found = chain("resnet50", classes=1000, classifier="linear")
    flops = sum(part.flops for part in (*found.blocks, found.head))
    assert flops == pytest.approx(2 * 4.089e9, rel=1e-3)


@given(
    name=st.sampled_from(list(RESNETS)),
    cut=st.integers(1, 2),
    stem=st.sampled_from(["imagenet", "small"]),
    size=st.integers(1, 300),
)
def test_segmentation_changes_no_total_and_every_grid_is_reached(name: str, cut: int, stem: str, size: int) -> None:
    stages, blocks = (
        chain(name, size, head_convs=cut, stem=stem, segments=segments) for segments in ("stages", "blocks")
    )
    for figure in ("parameters", "buffer_elements", "flops"):
        totals = [sum(getattr(part, figure) for part in (*found.blocks, found.head)) for found in (stages, blocks)]
        assert totals[0] == totals[1]
    for found in (stages, blocks):
        for before, part in zip(found.boundaries, (*found.blocks, found.head), strict=True):
            assert before == part.inputs
        for left, right in zip(found.blocks, (*found.blocks, found.head)[1:], strict=False):
            assert left.outputs == right.inputs
    for source in range(1, 5):
        for target in range(source, 5):
            assert stages.adapter(source, target).outputs == stages.adapter_target(target)


def test_blocks_segments() -> None:
    found = chain(segments="blocks")
    assert [part.units for part in found.blocks][:2] == [("stem", "layer1.0"), ("layer1.1",)]
    assert found.blocks[-1].units == ("layer4.1",)
    assert len(found.blocks) == 8
    assert len(chain(segments="blocks", head_convs=2).blocks) == 7


def test_explicit_segments_equal_stages_whatever_the_head_takes() -> None:
    lists = (("stem", "layer1"), ("layer2",), ("layer3.0", "layer3.1"), ("layer4",))
    for cut in (1, 2):
        assert chain(segments=lists, head_convs=cut) == chain(head_convs=cut)
    halves = chain(segments=(("stem",), ("layer1", "layer2"), ("layer3", "layer4.0"), ("layer4.1",)))
    assert [part.name for part in halves.blocks] == ["seg1", "seg2", "seg3", "seg4"]
    assert halves.boundaries[1] == ((64, 56, 56),)


REST = ("layer2", "layer3", "layer4")


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ((("stem", "layer1", "layer3.9"), REST), "'layer3.9' not found; layer3 has blocks 0-5"),
        ((("stem", "layer1"), ("layr2", "layer3", "layer4")), "'layr2' not found; did you mean 'layer2'?"),
        ((("steam", "layer1", *REST),), "'steam' not found; did you mean 'stem'?"),
        ((("stem", "layer1"), ("layer1.2", *REST)), "'layer1.2' is listed 2 times (seg1, seg2)"),
        (
            (("stem", "layer1"), ("layer3", "layer4")),
            "missing 'layer2.0', 'layer2.1', 'layer2.2', 'layer2.3'",
        ),
        ((("layer1", "stem"), REST), "'layer1.0' is out of order: 'stem' comes first"),
        ((("stem", "layer1"), (), REST), "seg2 is empty"),
        ((), "no segment given"),
        ((("stem", "layer1", *REST, "fc"),), "'fc' belongs to the head"),
        ("stage", "'stage' is not known; allowed: stages, blocks or lists of units"),
    ],
)
def test_impossible_segments(segments: Any, expected: str) -> None:
    found = message(name="resnet34", segments=segments)
    assert found.startswith("model.segments: ")
    assert expected in found


def test_all_segment_problems_are_reported_at_once() -> None:
    found = message(segments=(("stam", "layer1"), ("layer2.7",)))
    assert "'stam'" in found
    assert "layer2 has blocks 0-1" in found


def test_a_block_wholly_in_the_head_is_not_listed() -> None:
    lists = (("stem", "layer1"), ("layer2", "layer3", "layer4.0", "layer4.1"))
    assert "'layer4.1' belongs to the head" in message(segments=lists, head_convs=2)
    assert chain(segments=lists, head_convs=1).blocks[1].units[-1] == "layer4.1"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"head_convs": 3},
            "model.head_convs: 3, but the last block of resnet18 has 2 convolutions; allowed: 1-2",
        ),
        ({"name": "resnet50", "head_convs": 4}, "allowed: 1-3"),
        ({"name": "resnet5O"}, "model.name: 'resnet5O' is not known; did you mean 'resnet50'?"),
        ({"size": 0}, "data.image_size: 0 is too small; the smallest image resnet18 takes is 1"),
        ({"classes": 0}, "classes: 0; at least 1 is needed"),
    ],
)
def test_impossible_models(settings: dict[str, Any], expected: str) -> None:
    assert expected in message(**settings)


def test_grids_that_no_stride_reaches() -> None:
    for source, target in (((1, 4, 4), (1, 8, 8)), ((1, 5, 5), (1, 4, 4))):
        with pytest.raises(ConfigError, match="no stride takes"):
            stride_between((source,), (target,))
    assert stride_between(((1, 9, 9),), ((1, 2, 2),)) == 5  # the smallest that does, not the ratio of 8
    with pytest.raises(ConfigError, match="no stride"):
        chain().adapter(4, 1)


def test_caller_errors() -> None:
    with pytest.raises(ValueError, match="no part 'seg9' in this chain, which has seg1, seg2"):
        chain().part("seg9")
    with pytest.raises(ValueError, match=r"outside the boundaries 0\.\.4"):
        chain().adapter(1, 5)
    assert chain().part("head") is not None


def test_outlines_are_values() -> None:
    assert chain() == chain()
    assert dataclasses.asdict(chain().head)["name"] == "head"
