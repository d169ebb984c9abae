"""A user's network as parts: its blocks, its head, the shapes between them and what each costs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cache_store.errors import ConfigError
from cache_store.keys import digest_json
from workers.models.counting import Cost, Shape
from workers.models.outline import PartOutline, Piece, join
from workers.models.python.building import build, builds_alike, refuse, seeded
from workers.models.python.chain_module import Chain
from workers.models.python.following import Followed, Joint, follow, name_of, part_of, runs_alike, units
from workers.models.python.layout import channels_last
from workers.models.python.outline import PythonOutline
from workers.specs.as_json import to_json
from workers.specs.experiment import PythonSpec

Segments = str | int

_SAMPLES = 2


@dataclass(frozen=True)
class Cut:
    """A network's parts by name, the head last, with weights that mean nothing, and their figures."""

    parts: Mapping[str, nn.Module]
    outline: PythonOutline


def cut(model: PythonSpec, sample: Shape, classes: int) -> Cut:
    """Build the network, cut it and try it on samples of this shape. ConfigError for what cannot be trained so."""
    found = _cut(_Key(digest_json(to_json(model)), model), sample)
    return replace(found, outline=replace(found.outline, classes=classes))


class _Key:
    """A spec that can be looked up by: its arguments are a dictionary."""

    def __init__(self, digest: str, model: PythonSpec) -> None:
        self.digest, self.model = digest, model

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.digest == other.digest


@lru_cache(maxsize=4)
def _cut(key: _Key, sample: Shape) -> Cut:
    network = build(key.model, 0)
    builds_alike(network, build(key.model, 0))
    return cut_network(network, sample, key.model.segments)


def cut_network(network: nn.Module, sample: Shape, segments: Segments, *, by_sample: bool = False) -> Cut:
    """Cut a network and try it on samples of this shape. Refused for what cannot be trained so. The outline's classes
    are the network's scores.

    by_sample: a network of a library, which is followed with a sample; see `following`.
    """
    with seeded(0):
        x = torch.rand(_SAMPLES, *sample)
    network.eval()
    _try(network, x)
    followed = follow(network, x if by_sample else None)
    parts = _parts(network, followed, segments, x)
    _own_states(network, parts)
    scores = runs_alike(network, list(parts.values()), x)
    if scores.ndim != 2 or len(scores) != _SAMPLES:
        raise refuse(
            f"gives {tuple(scores.shape)} for {_SAMPLES} samples; the head must give one row of scores for each, "
            f"({_SAMPLES}, classes)"
        )
    if by_sample:
        # What was decided by sizes must not have been decided by the number of samples.
        for others in (x[:1], torch.cat([x, x[:1]])):
            runs_alike(network, list(parts.values()), others)
    return Cut(parts, _outline(parts, x, by_sample=by_sample))


def _parts(network: nn.Module, followed: Followed, segments: Segments, x: Tensor) -> dict[str, nn.Module]:
    grouped = units(network, followed)
    names: list[str] = []
    if isinstance(network, Chain):
        names += network.blocks
    else:
        grouped = _merged(followed, grouped, segments, x)
        for joints in grouped[:-1]:
            names.append(name_of(followed, joints, set(names)))
    names.append("head")
    return {
        name: part_of(followed, joints, head=name == "head").eval() for name, joints in zip(names, grouped, strict=True)
    }


def _try(network: nn.Module, x: Tensor) -> None:
    """Run the network as it is, so that what fails is told as the user knows it."""
    try:
        with torch.no_grad():
            network(x.clone())
    except Exception as error:  # whatever it raises is the user's own
        raise refuse(
            f"the network cannot take samples of shape {tuple(x.shape[1:])}: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def _own_states(network: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    """Every tensor of the network must be in one part, and in one alone."""
    owner: dict[int, tuple[str, str]] = {}
    names: dict[str, str] = {}
    for part, module in parts.items():
        for name, tensor in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
            first = owner.setdefault(id(tensor), (part, name))
            if first[0] != part:
                raise refuse(
                    f"{first[0]} and {part} share {first[1]}: blocks that share weights cannot be trained one after "
                    "the other",
                    "put what shares into one block of a segprop.Chain",
                )
            names[name] = part
    unused = [name for name in network.state_dict() if name not in names]
    if unused:
        more = f" and {len(unused) - 4} more" if len(unused) > 4 else ""
        raise refuse(f"{', '.join(unused[:4])}{more}: in the network, but its forward does not use it")


def _merged(followed: Followed, grouped: list[list[Joint]], segments: Segments, x: Tensor) -> list[list[Joint]]:
    """Put units before the head together into `segments` blocks of about equal cost."""
    blocks = len(grouped) - 1
    if isinstance(segments, str):
        return grouped
    if segments > blocks:
        raise ConfigError(
            f"model.segments: {segments}: the network has {blocks} places to cut at before its head",
            where="model.segments",
            value=segments,
        )
    costs = []
    value: Any = (x,)
    for joints in grouped[:-1]:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            value = part_of(followed, joints, head=False).eval()(value)
        costs.append(counter.get_total_flops() + 1)
    return [*([joint for unit in run for joint in unit] for run in _runs(grouped[:-1], costs, segments)), grouped[-1]]


def _runs(items: Sequence[list[Joint]], costs: Sequence[int], count: int) -> list[list[list[Joint]]]:
    """Consecutive items as `count` runs, none empty, each ending where its share of the cost is reached."""
    runs: list[list[list[Joint]]] = []
    total, done, start = sum(costs), 0, 0
    for index, cost in enumerate(costs):
        done += cost
        left, runs_left = len(items) - index - 1, count - len(runs) - 1
        if runs_left and (done * count >= total * (len(runs) + 1) or left == runs_left):
            runs.append(list(items[start : index + 1]))
            start = index + 1
    return [*runs, list(items[start:])]


def _outline(parts: Mapping[str, nn.Module], x: Tensor, *, by_sample: bool) -> PythonOutline:
    layouts: list[bool] = []
    pieces: list[PartOutline] = []
    boundaries: list[tuple[Shape, ...]] = []
    value = x
    for name, part in parts.items():
        shape = tuple(value.shape[1:])
        boundaries.append((shape,))
        layouts.append(by_sample and channels_last(part, value))
        cost, value = _cost(part, value)
        if not value.is_floating_point() or len(value) != _SAMPLES:
            kind = str(value.dtype).removeprefix("torch.")
            raise refuse(f"{name} gives {kind} {tuple(value.shape)}; blocks give floats with the samples first")
        pieces.append(join(name, [Piece(name, (shape,), (tuple(value.shape[1:]),), cost)]))
    *blocks, head = pieces
    return PythonOutline(
        blocks=tuple(blocks),
        head=head,
        boundaries=tuple(boundaries),
        head_input=boundaries[-1],
        classes=value.shape[-1],
        aux_channels=boundaries[-1][0][0],
        last=tuple(layouts),
    )


def _cost(part: nn.Module, given: Tensor) -> tuple[Cost, Tensor]:
    """What a part costs for one sample, and what it gives in evaluation."""
    copied = copy.deepcopy(part).train()
    own = {t.untyped_storage().data_ptr() for t in (*copied.parameters(), *copied.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # Held, so that no other tensor takes its place.
            kept[storage.data_ptr()] = (storage.nbytes() // tensor.element_size(), tensor)
        return tensor

    with (
        seeded(0),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        FlopCounterMode(display=False) as counter,
    ):
        output = copied((given.clone(),))
    last = output[0] if isinstance(output, tuple) else output
    saved = sum(count for count, _ in kept.values())
    saved -= last.numel() if last.untyped_storage().data_ptr() in kept else 0
    with torch.no_grad():
        value = part((given.clone(),))
    return Cost(
        parameters=sum(p.numel() for p in part.parameters()),
        buffer_elements=sum(b.numel() for b in part.buffers()),
        flops=counter.get_total_flops() // _SAMPLES,
        saved_elements=max(0, saved) // _SAMPLES,
    ), value[0] if isinstance(value, tuple) else value
