"""Follow the forward of a module and cut it where one tensor alone goes on.

torch.fx records what the module does between calls of its modules, which stay whole: nothing inside them is looked at.
`nn.Sequential`, and a module with more than half of the weights, is looked into.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from workers.models.python.building import refuse
from workers.models.python.chain_module import Chain, is_taken

#: Modules that only change the shape of what they are given: in front of the head's layer they belong to the head.
_SHAPING = (nn.Flatten, nn.Unflatten, nn.Dropout, nn.Identity, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
#: Crossing tensors that a message names.
_SHOWN = 4


@dataclass(frozen=True)
class Joint:
    """What runs between two places at which one tensor alone goes on."""

    nodes: tuple[fx.Node, ...]
    #: Modules that it calls, by name.
    calls: tuple[str, ...]


@dataclass(frozen=True)
class Followed:
    """A module's forward as joints in order. `crossing`: where several tensors go on, in words."""

    network: nn.Module
    traced: fx.GraphModule
    joints: tuple[Joint, ...]
    crossing: tuple[str, ...]


class _Tracer(fx.Tracer):
    """Looks into `nn.Sequential` and into what `inside` names; into nothing where that is None."""

    def __init__(self, inside: frozenset[str] | None) -> None:
        super().__init__()
        self._inside = inside

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._inside is None or not (type(m) is nn.Sequential or module_qualified_name in self._inside)


def follow(network: nn.Module) -> Followed:
    """Follow a module's forward. ConfigError when it depends on data, or on whether the module trains."""
    inside = None if isinstance(network, Chain) else _largest(network)
    try:
        traced = _trace(network, inside)
    except _NotFollowedError as error:
        if not inside:
            raise refuse(str(error)) from error
        # What is in them cannot be followed: they stay whole.
        try:
            traced = _trace(network, frozenset())
        except _NotFollowedError as again:
            raise refuse(str(again)) from again
    joints, crossing = _joints(traced)
    return Followed(network, traced, tuple(joints), tuple(crossing))


class _NotFollowedError(Exception):
    pass


def _trace(network: nn.Module, inside: frozenset[str] | None) -> fx.GraphModule:
    was = network.training
    graphs: list[fx.Graph] = []
    try:
        for mode in (True, False):
            network.train(mode)
            graphs.append(_Tracer(inside).trace(network))
    except Exception as error:  # tracing fails with whatever the module does to what it is given
        raise _NotFollowedError(
            f"the forward of {type(network).__name__} cannot be followed ({str(error).splitlines()[0]}); return a "
            "segprop.Chain of its blocks and its head"
        ) from error
    finally:
        network.train(was)
    training, evaluating = ([node.format_node() for node in graph.nodes] for graph in graphs)
    if training != evaluating:
        raise _NotFollowedError(
            f"the forward of {type(network).__name__} does other things in training than in evaluation "
            "(self.training); put what differs into a module of its own, or return a segprop.Chain"
        )
    inputs = [node for node in graphs[0].nodes if node.op == "placeholder"]
    used = [node for node in inputs if node.users]
    if len(used) != 1 or used[0] is not inputs[0]:
        raise _NotFollowedError(f"the forward of {type(network).__name__} must take one tensor, it takes {len(used)}")
    return fx.GraphModule(network, graphs[0])


def _largest(network: nn.Module) -> frozenset[str]:
    """Names of the modules, torch's own aside, that hold others and more than half of all weights."""
    total = sum(p.numel() for p in network.parameters())
    holders = (
        (name, module)
        for name, module in network.named_modules()
        if name and any(True for _ in module.children()) and not type(module).__module__.startswith("torch.nn.")
    )
    return frozenset(name for name, module in holders if 2 * sum(p.numel() for p in module.parameters()) > total)


def _joints(traced: fx.GraphModule) -> tuple[list[Joint], list[str]]:
    """The joints, and the places between calls of modules at which several tensors go on, in words."""
    nodes = [node for node in traced.graph.nodes if node.op not in ("get_attr", "placeholder", "output")]
    if not nodes:
        raise refuse("its forward does nothing")
    places = {node: index for index, node in enumerate(nodes)}
    found: list[Joint] = []
    crossing: list[str] = []
    start = 0
    for index, node in enumerate(nodes):
        going_on = _going_on(traced, places, index)
        if going_on == [node]:
            members = tuple(nodes[start : index + 1])
            found.append(Joint(members, tuple(str(n.target) for n in members if n.op == "call_module")))
            start = index + 1
        elif node.op == "call_module" and len(going_on) > 1:
            names = [_called(other) for other in going_on[:_SHOWN]]
            more = f" and {len(going_on) - _SHOWN} more" if len(going_on) > _SHOWN else ""
            crossing.append(f"behind {_called(node)}: {', '.join(names)}{more}")
    if start < len(nodes):
        raise refuse("its forward must return one tensor, which it computes last")
    return found, crossing


def _going_on(traced: fx.GraphModule, places: dict[fx.Node, int], index: int) -> list[fx.Node]:
    """What was computed up to node `index` (or given) and is used behind it."""
    return [
        node
        for node in traced.graph.nodes
        if node.op not in ("get_attr", "output")
        and places.get(node, -1) <= index
        and any(places.get(user, len(places)) > index for user in node.users)
    ]


def _called(node: fx.Node) -> str:
    return "the input" if node.op == "placeholder" else str(node.target) if node.op == "call_module" else node.name


def units(network: nn.Module, followed: Followed) -> list[list[Joint]]:
    """Group the joints into the units of a chain, the head last: of a `Chain` its own blocks, else a unit begins at
    every joint with weights of two dimensions or more. ConfigError where nothing is left before the head."""
    if isinstance(network, Chain):
        return _of_chain(network, followed)
    grouped: list[list[Joint]] = [[]]
    for joint in followed.joints:
        if _has_weights(followed.traced, joint) and any(_has_weights(followed.traced, j) for j in grouped[-1]):
            grouped.append([])
        grouped[-1].append(joint)
    if len(grouped) < 2:
        raise refuse(_no_chain(network, followed))
    while len(grouped[-2]) > 1 and _shapes_only(followed.traced, grouped[-2][-1]):
        grouped[-1].insert(0, grouped[-2].pop())
    return grouped


def _no_chain(network: nn.Module, followed: Followed) -> str:
    name = type(network).__name__
    if not followed.crossing:
        return f"{name} has one layer with weights: there is nothing to cut"
    places = "; ".join(followed.crossing[:_SHOWN])
    return (
        f"{name} is no chain: there is no place between two layers where one tensor alone goes on. {places}. Return a "
        "segprop.Chain whose blocks hold what belongs together"
    )


def _of_chain(network: Chain, followed: Followed) -> list[list[Joint]]:
    names = [*(f"blocks.{name}" for name in network.blocks), "head"]
    grouped: dict[str, list[Joint]] = {name: [] for name in names}
    for joint in followed.joints:
        owners = {name for call in joint.calls for name in names if f"{call}.".startswith(f"{name}.")}
        if len(owners) == 1:
            grouped[owners.pop()].append(joint)
    empty = [name for name, members in grouped.items() if not members]
    if empty:
        raise refuse(f"{empty[0]} is called more than once, or not at all: each block is a module of its own")
    return list(grouped.values())


def _has_weights(traced: fx.GraphModule, joint: Joint) -> bool:
    return any(p.ndim > 1 for name in joint.calls for p in traced.get_submodule(name).parameters())


def _shapes_only(traced: fx.GraphModule, joint: Joint) -> bool:
    """Tell whether a joint only pools to a fixed size or changes the shape."""
    for node in joint.nodes:
        if node.op == "call_module" and not isinstance(traced.get_submodule(str(node.target)), _SHAPING):
            return False
        if node.op == "call_function" and node.target not in (torch.flatten, torch.reshape):
            return False
        if node.op == "call_method" and node.target not in ("flatten", "view", "reshape", "mean", "squeeze"):
            return False
    return True


def name_of(followed: Followed, joints: Sequence[Joint], taken: set[str]) -> str:
    """Name a block after the module that holds all of it, else after its first module with weights."""
    calls = [call for joint in joints for call in joint.calls]
    holder = _holder(calls)
    if holder and type(followed.network.get_submodule(holder)) is not nn.Sequential:
        calls = [holder]
    weighted = [call for call in calls if any(True for _ in followed.network.get_submodule(call).parameters())]
    name = next(iter([*weighted, *calls]), "block").removeprefix("blocks.").replace(".", "_")
    if not name[0].isalpha():
        name = f"block{name}"
    while name in taken or is_taken(name):
        name += "_"
    return name


def _holder(names: Sequence[str]) -> str:
    """The longest dotted name that all of these begin with; empty where there is none."""
    holder: list[str] = []
    for same in zip(*(name.split(".") for name in names), strict=False):
        if len(set(same)) > 1:
            break
        holder.append(same[0])
    return ".".join(holder)


def part_of(followed: Followed, joints: Sequence[Joint], *, head: bool) -> fx.GraphModule:
    """A part that takes a boundary, a tuple of one tensor, and gives one; the head gives its output. It holds the
    module's own modules, under their own names."""
    nodes = [node for joint in joints for node in joint.nodes]
    graph = fx.Graph()
    boundary = graph.placeholder("boundary")
    given = graph.call_function(operator.getitem, (boundary, 0))
    inside = set(nodes)
    new: dict[fx.Node, fx.Node] = {}

    def there(node: fx.Node) -> fx.Node:
        if node.op == "get_attr" and node not in new:
            new[node] = graph.node_copy(node)
        return new[node] if node in inside or node.op == "get_attr" else given

    for node in nodes:
        for used in node.all_input_nodes:
            there(used)
        new[node] = graph.node_copy(node, there)
    last: Any = new[nodes[-1]]
    graph.output(last if head else (last,))
    graph.lint()
    return fx.GraphModule(followed.traced, graph, class_name="Part")


def runs_alike(whole: nn.Module, parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Run the module and its parts on `x`. ConfigError unless outputs are equal, to the bit, every time."""
    with torch.no_grad():
        # Copies: a first layer may work in place.
        want, again = whole(x.clone()), whole(x.clone())
        value: Any = (x.clone(),)
        for part in parts:
            value = part(value)
    if not isinstance(want, Tensor):
        raise refuse(f"its forward must return a tensor, it returns a {type(want).__name__}")
    if not torch.equal(want, again):
        raise refuse(
            "gives other outputs for the same input in evaluation: it keeps a state outside parameters and buffers, or "
            "draws at random"
        )
    if not torch.equal(want, value):
        raise refuse(
            "does something else as a chain than as a whole; return a segprop.Chain of its blocks and its head"
        )
    return want
