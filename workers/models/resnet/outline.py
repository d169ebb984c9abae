"""torchvision's ResNets as arithmetic: the units of the chain, cut into segments and head. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass

from cache_store.errors import ConfigError
from workers.models.counting import Cost, Layer, Shape, conv_bn, elements, max_pool, mlp
from workers.models.outline import ChainOutline, Piece, join
from workers.models.segments import Segments, group, suggestion, with_units
from workers.specs.experiment import ResNetSpec


@dataclass(frozen=True)
class ResNetFacts:
    """What distinguishes the members of the family."""

    layers: tuple[int, int, int, int]
    #: Convolutions of one residual block: 2 (basic) or 3 (bottleneck).
    convs: int
    groups: int = 1
    base_width: int = 64

    @property
    def expansion(self) -> int:
        return 4 if self.convs == 3 else 1


RESNETS: dict[str, ResNetFacts] = {
    "resnet18": ResNetFacts((2, 2, 2, 2), 2),
    "resnet34": ResNetFacts((3, 4, 6, 3), 2),
    "resnet50": ResNetFacts((3, 4, 6, 3), 3),
    "resnet101": ResNetFacts((3, 4, 23, 3), 3),
    "resnet152": ResNetFacts((3, 8, 36, 3), 3),
    "wide_resnet50_2": ResNetFacts((3, 4, 6, 3), 3, base_width=128),
    "resnext50_32x4d": ResNetFacts((3, 4, 6, 3), 3, groups=32, base_width=4),
}


@dataclass(frozen=True)
class _Conv:
    """One convolution + BN of a residual block."""

    channels: int
    kernel: int
    stride: int = 1
    groups: int = 1


def facts_of(model: ResNetSpec) -> ResNetFacts:
    """ConfigError for an unknown name or a head that takes more convolutions than a block has.

    Users choose 1 and more. 0 is the bare head that `ResNetFamily.with_bare_head` asks for.
    """
    facts = RESNETS.get(model.name)
    if facts is None:
        raise ConfigError(
            f"model.name: {model.name!r} is not known; {suggestion(model.name, RESNETS)}allowed: {', '.join(RESNETS)}",
            where="model.name",
            value=model.name,
            allowed=list(RESNETS),
        )
    if not 0 <= model.head_convs <= facts.convs:
        raise ConfigError(
            f"model.head_convs: {model.head_convs}, but the last block of {model.name} has "
            f"{facts.convs} convolutions; allowed: 1-{facts.convs}",
            where="model.head_convs",
            value=model.head_convs,
            allowed=list(range(1, facts.convs + 1)),
        )
    return facts


def resnet_outline(model: ResNetSpec, image_size: int, classes: int) -> ChainOutline:
    """The chain of `model` for square RGB images of `image_size` pixels and `classes` classes.

    ConfigError, with what is allowed and the nearest known name: unknown model, a head that takes more convolutions
    than the last block has, segments that do not cover the chain once and in order, images so small that nothing is
    left of them.
    """
    facts = facts_of(model)
    if image_size < 1:
        # Every window of a ResNet is padded so that one pixel stays one pixel: nothing smaller fails.
        raise ConfigError(
            f"data.image_size: {image_size} is too small; the smallest image {model.name} takes is 1",
            where="data.image_size",
            value=image_size,
        )
    if classes < 1:
        raise ConfigError(f"classes: {classes}; at least 1 is needed", where="classes", value=classes)
    pieces, tail = _walk(model, facts, image_size, classes)
    by_unit = {piece.unit: piece for piece in pieces}
    in_head = tuple(piece.unit for piece in tail[:-1] if piece.unit not in by_unit)
    groups = group(model.segments, list(by_unit), in_head)
    blocks = tuple(
        join(f"seg{index}", [by_unit[unit] for unit in units]) for index, units in enumerate(groups, start=1)
    )
    head = join("head", tail)
    return ChainOutline(
        blocks=blocks,
        head=head,
        boundaries=(*(block.inputs for block in blocks), head.inputs),
        head_input=(head.inputs[0], head.inputs[-1]) if model.head_convs else head.inputs,
        classes=classes,
        aux_channels=512 * facts.expansion,
        bare_head=model.head_convs == 0,
    )


def with_last_block(model: ResNetSpec) -> Segments:
    """Return the segments of a model with the last residual block in the last one, where lists leave it to the head."""
    facts = RESNETS.get(model.name)
    if facts is None or model.head_convs < facts.convs:
        return model.segments
    return with_units(model.segments, [f"layer4.{facts.layers[-1] - 1}"])


def _walk(model: ResNetSpec, facts: ResNetFacts, image_size: int, classes: int) -> tuple[list[Piece], list[Piece]]:
    """Pieces before the head's cut, and those of the head."""
    pieces = [_stem(model, image_size)]
    tail: list[Piece] = []
    for stage, count in enumerate(facts.layers, start=1):
        for index in range(count):
            unit = f"layer{stage}.{index}"
            (shape,) = pieces[-1].outputs
            convs = _convs(facts, stage, index)
            if model.head_convs and (stage, index) == (4, count - 1):
                front = convs[: facts.convs - model.head_convs]
                if front:
                    pieces.append(_front(unit, shape, front))
                tail.append(_back(unit, pieces[-1].outputs, convs[len(front) :]))
            else:
                pieces.append(_block(unit, shape, convs, stage, index))
    classifier = _classifier(model, (tail or pieces)[-1].outputs[0], classes)
    return pieces, [*tail, classifier]


def _stem(model: ResNetSpec, image_size: int) -> Piece:
    image = (3, image_size, image_size)
    small = model.stem == "small"
    layer = conv_bn(image, 64, kernel=3 if small else 7, stride=1 if small else 2)
    cost = layer.cost + Cost(saved_elements=elements(image))
    output = layer.output
    if not small:
        output, added = max_pool(layer.output, kernel=3, stride=2, padding=1)
        cost += added
    return Piece("stem", (image,), (output,), cost)


def _convs(facts: ResNetFacts, stage: int, index: int) -> list[_Conv]:
    planes = 64 << (stage - 1)
    stride = 2 if stage > 1 and index == 0 else 1
    if facts.convs == 2:
        return [_Conv(planes, 3, stride), _Conv(planes, 3)]
    width = planes * facts.base_width // 64 * facts.groups
    return [_Conv(width, 1), _Conv(width, 3, stride, facts.groups), _Conv(planes * facts.expansion, 1)]


def _run(shape: Shape, convs: list[_Conv]) -> Layer:
    """Convolutions with BN, ReLU between them; counts BN inputs and every convolution's input."""
    cost = Cost()
    for conv in convs:
        cost += Cost(saved_elements=elements(shape))
        shape, added = conv_bn(shape, conv.channels, conv.kernel, conv.stride, conv.groups)
        cost += added
    return Layer(shape, cost)


def _block(unit: str, shape: Shape, convs: list[_Conv], stage: int, index: int) -> Piece:
    output, cost = _run(shape, convs)
    if index == 0 and (stage > 1 or shape[0] != output[0]):
        stride = max(conv.stride for conv in convs)
        cost += conv_bn(shape, output[0], kernel=1, stride=stride).cost
    return Piece(unit, (shape,), (output,), cost)


def _front(unit: str, shape: Shape, convs: list[_Conv]) -> Piece:
    """The last block up to the cut: x -> (I, P). P is counted by the head, which keeps it."""
    output, cost = _run(shape, convs)
    return Piece(unit, (shape,), (shape, output), cost)


def _back(unit: str, inputs: tuple[Shape, ...], convs: list[_Conv]) -> Piece:
    """The last block after the cut. The final ReLU's result is kept although pooling keeps nothing."""
    output, cost = _run(inputs[-1], convs)
    return Piece(unit, inputs, (output,), cost + Cost(saved_elements=elements(output)))


def _classifier(model: ResNetSpec, features: Shape, classes: int) -> Piece:
    """Global average pooling and the classifier. A bare head is trained alone, so of its input nothing is kept."""
    hidden = [] if model.classifier == "linear" else [model.hidden]
    return Piece("fc", (features,), ((classes,),), mlp([features[0], *hidden, classes], model.dropout))
