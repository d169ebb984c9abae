"""The parts of a chain and the boundaries between them, as figures. Pure Python.

The activation model (`saved_elements`): elements of the distinct tensors that autograd keeps per sample from
forward to backward when the part trains and its input needs no gradient.

- A convolution keeps its input (for its weights' gradient), a BatchNorm keeps its input, an in-place ReLU
  keeps its result, which is also the next convolution's input and counts once. A downsample convolution
  shares the block's input. The residual addition keeps nothing.
- Max-pooling keeps its input and one (int64) index per output, counted as one element. Global average
  pooling keeps nothing. A linear layer keeps its input, dropout its mask.
- The last of a part's outputs is not counted: whoever reads it counts it as its input. So the figures of the
  parts of a path add up without counting a tensor twice.
- Per-channel statistics, weights, buffers and temporary workspace are not activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from workers.models.counting import Cost, Shape, elements, scaled_conv_bn, stride_between


@dataclass(frozen=True)
class PartOutline:
    """One part. Shapes are of one sample, without the batch dimension.

    flops: of one forward pass of one sample, 2 per multiply-accumulate of convolutions and linear layers.
    saved_elements: see the module's docstring; the last output is not counted.
    """

    name: str
    units: tuple[str, ...]
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    parameters: int
    buffer_elements: int
    flops: int
    saved_elements: int


@dataclass(frozen=True)
class ChainOutline:
    """The chain's parts and the boundaries between them.

    boundaries[d] enters block d and boundaries[n] enters the head; boundaries[0] is the image.
    head_input is what adapters emit for the head: (I, P), also where boundaries[n] is one tensor; with a bare head
    that tensor alone.
    """

    blocks: tuple[PartOutline, ...]
    head: PartOutline
    boundaries: tuple[tuple[Shape, ...], ...]
    head_input: tuple[Shape, ...]
    classes: int
    #: Channels that an auxiliary head's convolution emits (those of the chain's last block).
    aux_channels: int
    #: The head is pooling and classifier alone. Then a local head needs no mapping where the boundary has its shape.
    bare_head: bool = False

    def part(self, name: str) -> PartOutline:
        """The block or head called `name`; ValueError when there is none."""
        for part in (*self.blocks, self.head):
            if part.name == name:
                return part
        known = ", ".join(part.name for part in (*self.blocks, self.head))
        raise ValueError(f"no part {name!r} in this chain, which has {known}")

    def held_together(self, parts: Sequence[PartOutline]) -> list[PartOutline]:
        """The same parts, with what some of them share (`ModelFamily.ties`) counted once."""
        return list(parts)

    def adapter_target(self, target: int) -> tuple[Shape, ...]:
        """What an adapter to `target` emits: the input of block `target`, or (I, P) for the head (n)."""
        self._check_boundary("target", target)
        return self.head_input if target == len(self.blocks) else self.boundaries[target]

    def adapter_stride(self, source: int, target: int) -> int:
        """Stride with which a 1x1 convolution on boundary `source` reaches the grid of `target` exactly.

        ConfigError where no stride does.
        """
        self._check_boundary("source", source)
        return stride_between(self.boundaries[source], self.adapter_target(target))

    def adapter(self, source: int, target: int) -> PartOutline:
        """1x1 convolution, BN and ReLU from boundary `source` to the input of block `target` (n: the head).

        The channels are split into the tensors of the target. ConfigError when the grid cannot be reached.
        """
        stride = self.adapter_stride(source, target)
        outputs = self.adapter_target(target)
        cost = scaled_conv_bn(self.boundaries[source], sum(shape[0] for shape in outputs), stride).cost
        # ReLU's result is one storage; the last output's share of it is counted by the reader.
        cost += Cost(saved_elements=sum(map(elements, outputs[:-1])))
        return _part("adapter", ("adapter",), self.boundaries[source], outputs, cost)

    def aux_maps(self, source: int) -> bool:
        """Tell whether LW's local head on boundary `source` begins with a mapping to what the head reads."""
        return not (self.bare_head and self.boundaries[source] == self.head_input)

    def aux(self, source: int) -> PartOutline:
        """LW's local head on boundary `source`: 1x1 convolution on the head's grid, BN, ReLU (where `aux_maps`), GAP,
        linear."""
        if not self.aux_maps(source):
            # Pooling keeps nothing, but the ReLU that the block ends with keeps its result, which is this input.
            cost = Cost(saved_elements=sum(map(elements, self.boundaries[source])))
            cost += Cost.linear(self.aux_channels, self.classes)
            return _part("aux", ("aux",), self.boundaries[source], ((self.classes,),), cost)
        stride = self.adapter_stride(source, len(self.blocks))
        scaled = scaled_conv_bn(self.boundaries[source], self.aux_channels, stride)
        cost = scaled.cost + Cost(saved_elements=elements(scaled.output))
        cost += Cost.linear(self.aux_channels, self.classes)
        return _part("aux", ("aux",), self.boundaries[source], ((self.classes,),), cost)

    def _check_boundary(self, what: str, index: int) -> None:
        if not 0 <= index <= len(self.blocks):
            raise ValueError(f"adapter {what} {index} is outside the boundaries 0..{len(self.blocks)}")


@dataclass(frozen=True)
class AlikeChainOutline(ChainOutline):
    """A chain whose boundaries between layers have one shape: identity adapters, whole heads as local ones."""

    def adapter(self, source: int, target: int) -> PartOutline:
        """Identity: every boundary between layers has the same shape."""
        self._check_boundary("source", source)
        self._check_boundary("target", target)
        shape = self.boundaries[source]
        return PartOutline("adapter", ("adapter",), shape, shape, 0, 0, 0, 0)

    def aux(self, source: int) -> PartOutline:
        """LW's local head: one like the network's own."""
        self._check_boundary("source", source)
        return replace(self.head, name="aux", units=("aux",))


def _part(
    name: str, units: tuple[str, ...], inputs: tuple[Shape, ...], outputs: tuple[Shape, ...], cost: Cost
) -> PartOutline:
    return PartOutline(
        name=name,
        units=units,
        inputs=inputs,
        outputs=outputs,
        parameters=cost.parameters,
        buffer_elements=cost.buffer_elements,
        flops=cost.flops,
        saved_elements=cost.saved_elements,
    )


@dataclass(frozen=True)
class Piece:
    """What one unit (or the part of it on one side of the head's cut) does to a boundary."""

    unit: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    cost: Cost


def join(name: str, pieces: list[Piece]) -> PartOutline:
    """Consecutive pieces as one part."""
    cost = Cost()
    for piece in pieces:
        cost += piece.cost
    return _part(name, tuple(p.unit for p in pieces), pieces[0].inputs, pieces[-1].outputs, cost)
