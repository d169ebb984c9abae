"""Follow the forward of a module and cut it where one tensor alone goes on.

torch.fx records what the module does between calls of its modules, which stay whole: nothing inside them is looked at.
`nn.Sequential`, and a module with more than half of the weights, is looked into. With a sample at hand (networks of
libraries) so is every module that holds several of one kind, and sizes are numbers; see `tracing`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from workers.models.python.building import refuse
from workers.models.python.chain_module import Chain, is_taken
from workers.models.python.tracing import ValueTracer, drop_unused_sizes, sizes_in

#: Modules that only change the shape of what they are given: in front of the head's layer they belong to the head.
_SHAPING = (nn.Flatten, nn.Unflatten, nn.Dropout, nn.Identity, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
_SHAPING_FUNCTIONS = frozenset({torch.flatten, torch.reshape})
_SHAPING_METHODS = frozenset({"flatten", "view", "reshape", "mean", "squeeze"})
_PICKING = frozenset({operator.getitem, getattr, torch.mean, torch.permute, torch.transpose})
_TURNING = frozenset({"permute", "transpose", "contiguous"})
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
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
    #: Steps that give a number which goes with the samples, and how many each sample counts for.
    sizes: Mapping[fx.Node, int] = field(default_factory=dict)
    #: A network of a library, followed with a sample.
    by_sample: bool = False


class _Tracer(fx.Tracer):
    """Looks into `nn.Sequential` and into what `inside` names; into nothing where that is None."""

    def __init__(self, inside: frozenset[str] | None) -> None:
        super().__init__()
        self._inside = inside

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._inside is None or not (type(m) is nn.Sequential or module_qualified_name in self._inside)


def follow(network: nn.Module, sample: Tensor | None = None) -> Followed:
    """Follow a module's forward. ConfigError when it depends on data, or on whether the module trains.

    sample: (B, ...), for a network of a library, which takes one tensor (`tracing.single_input`).
    """
    if sample is not None:
        return _follow_sample(network, sample)
    inside = None if isinstance(network, Chain) else _largest(network)
    try:
        traced = _trace(network, inside)
    except _NotFollowedError as error:
        if not inside:
            raise refuse(*error.words) from error
        # What is in them cannot be followed: they stay whole.
        try:
            traced = _trace(network, frozenset())
        except _NotFollowedError as again:
            raise refuse(*again.words) from again
    joints, crossing = _joints(traced)
    return Followed(network, traced, tuple(joints), tuple(crossing))


def _follow_sample(network: nn.Module, sample: Tensor) -> Followed:
    """Follow a module with a sample. A module that cannot be looked into stays whole, and those of its class."""
    inside = _holders(network)
    while True:
        tracers: list[ValueTracer] = []
        try:
            traced = _traced(network, partial(_noted, tracers, sample, inside))
        except _NotFollowedError as error:
            failed = tracers[-1].open
            if not failed:
                raise refuse(*error.words) from error
            kind = type(network.get_submodule(failed[-1]))
            inside = frozenset(name for name in inside if type(network.get_submodule(name)) is not kind)
            continue
        drop_unused_sizes(traced.graph)
        values = tracers[0].values
        sizes = sizes_in(values, len(sample))
        several = {node for node, value in values.items() if not isinstance(value, Tensor)}
        joints, crossing = _joints(traced, sizes, several)
        return Followed(network, traced, tuple(joints), tuple(crossing), sizes, by_sample=True)


def _noted(tracers: list[ValueTracer], sample: Tensor, inside: frozenset[str]) -> ValueTracer:
    tracers.append(ValueTracer(sample, inside))
    return tracers[-1]


class _NotFollowedError(Exception):
    """What is wrong, and what the author of a network of their own can do."""

    @property
    def words(self) -> tuple[str, str]:
        problem, advice = self.args
        return problem, advice


def _trace(network: nn.Module, inside: frozenset[str] | None) -> fx.GraphModule:
    return _traced(network, lambda: _Tracer(inside))


def _traced(network: nn.Module, tracer: Callable[[], fx.Tracer]) -> fx.GraphModule:
    """Trace a module, each time with a new tracer, as it trains and as it is evaluated: both must be the same."""
    was = network.training
    graphs: list[fx.Graph] = []
    try:
        for mode in (True, False):
            network.train(mode)
            graphs.append(tracer().trace(network))
    except Exception as error:  # tracing fails with whatever the module does to what it is given
        said = (str(error) or repr(error)).splitlines()[0]
        raise _NotFollowedError(
            f"the forward of {type(network).__name__} cannot be followed ({said})",
            "return a segprop.Chain of its blocks and its head",
        ) from error
    finally:
        network.train(was)
    training, evaluating = ([node.format_node() for node in graph.nodes] for graph in graphs)
    if training != evaluating:
        raise _NotFollowedError(
            f"the forward of {type(network).__name__} does other things in training than in evaluation (self.training)",
            "put what differs into a module of its own, or return a segprop.Chain",
        )
    inputs = [node for node in graphs[0].nodes if node.op == "placeholder"]
    used = [node for node in inputs if node.users]
    if len(used) != 1 or used[0] is not inputs[0]:
        words = f"the forward of {type(network).__name__} must take one tensor, it takes {len(used)}"
        raise _NotFollowedError(words, "")
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


def _holders(network: nn.Module) -> frozenset[str]:
    """Names of the modules that are looked into with a sample: sequences, and what holds several modules of one kind
    that are made of others (the blocks of a stage), or holds such a module."""
    names = {name for name, module in network.named_modules() if type(module) is nn.Sequential}
    for name, module in network.named_modules():
        lists = [child for child in module.children() if isinstance(child, _LISTS)]
        whole = not isinstance(module, nn.ModuleList | nn.ModuleDict)
        if whole and (_stage(module) or any(_alike(child.children()) for child in lists)):
            parts = name.split(".")
            names |= {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    names |= _largest(network)
    return frozenset(name for name in names if name)


def _alike(modules: Iterable[nn.Module]) -> bool:
    """Tell whether two of these modules are of one class and have several layers with weights each."""
    kinds = [type(module) for module in modules if sum(p.ndim > 1 for p in module.parameters()) > 1]
    return len(kinds) > len(set(kinds))


def _stage(module: nn.Module) -> bool:
    """Tell whether all that a module holds is of one class, and several of it."""
    children = list(module.children())
    return len(children) > 1 and len({type(child) for child in children}) == 1 and _alike(children)


def _joints(
    traced: fx.GraphModule, sizes: Collection[fx.Node] = (), several: Collection[fx.Node] = ()
) -> tuple[list[Joint], list[str]]:
    """The joints, and the places between calls of modules at which several tensors go on, in words. `sizes`: steps
    that only give numbers; `several`: steps that are known to give something else than one tensor."""
    nodes = [node for node in traced.graph.nodes if node.op not in ("get_attr", "placeholder", "output")]
    if not nodes:
        raise refuse("its forward does nothing")
    places = {node: index for index, node in enumerate(nodes)}
    found: list[Joint] = []
    crossing: list[str] = []
    start = 0
    for index, node in enumerate(nodes):
        going_on = [other for other in _going_on(traced, places, index) if other not in sizes]
        if going_on == [node] and node not in several:
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
        raise refuse(*_no_chain(network, followed))
    while len(grouped[-2]) > 1 and _before_scores(followed, grouped[-2][-1]):
        grouped[-1].insert(0, grouped[-2].pop())
    return grouped


def _no_chain(network: nn.Module, followed: Followed) -> tuple[str, str]:
    name = type(network).__name__
    if not followed.crossing:
        return f"{name} has one layer with weights: there is nothing to cut", ""
    places = "; ".join(followed.crossing[:_SHOWN])
    return (
        f"{name} is no chain: there is no place between two layers where one tensor alone goes on. {places}",
        "return a segprop.Chain whose blocks hold what belongs together",
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


def _before_scores(followed: Followed, joint: Joint) -> bool:
    """Tell whether a joint only pools to a fixed size or changes the shape; of libraries' networks also whether it
    only normalizes tokens, pools or picks one."""
    modules: tuple[type[nn.Module], ...] = _SHAPING
    functions, methods = _SHAPING_FUNCTIONS, _SHAPING_METHODS
    if followed.by_sample:
        modules, functions, methods = (*modules, nn.LayerNorm), functions | _PICKING, methods | _TURNING
    for node in joint.nodes:
        if node.op == "call_module":
            module = followed.traced.get_submodule(str(node.target))
            named = followed.by_sample and any(word in type(module).__name__ for word in ("Pool", "Permute"))
            if not (named or isinstance(module, modules)):
                return False
        if node.op == "call_function" and node.target not in functions:
            return False
        if node.op == "call_method" and node.target not in methods:
            return False
    return True


def name_of(followed: Followed, joints: Sequence[Joint], taken: set[str]) -> str:
    """Name a block after the module that holds all of it, else after its first module with weights."""
    calls = [call for joint in joints for call in joint.calls]
    holder = _holder(calls)
    if followed.by_sample and sum(f"{call}.".startswith(f"{holder}.") for call in _calls(followed)) > len(calls):
        # It holds more than this block.
        holder = ""
    if holder and type(followed.network.get_submodule(holder)) is not nn.Sequential:
        calls = [holder]
    weighted = [call for call in calls if any(True for _ in followed.network.get_submodule(call).parameters())]
    name = next(iter([*weighted, *calls]), "block").removeprefix("blocks.").replace(".", "_")
    if not name[0].isalpha():
        name = f"block{name}"
    while name in taken or is_taken(name):
        name += "_"
    return name


def _calls(followed: Followed) -> list[str]:
    return [call for joint in followed.joints for call in joint.calls]


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
        if node in followed.sizes and node not in inside and node not in new:
            new[node] = _of_samples(graph, given, followed.sizes[node])
            return new[node]
        if node in new:
            return new[node]
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


def _of_samples(graph: fx.Graph, given: fx.Node, each: int) -> fx.Node:
    """Steps that count the samples of what a part is given, times `each`."""
    shape = graph.call_function(getattr, (given, "shape"))
    samples = graph.call_function(operator.getitem, (shape, 0))
    return samples if each == 1 else graph.call_function(operator.mul, (samples, each))


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
            "does something else as a chain than as a whole", "return a segprop.Chain of its blocks and its head"
        )
    return want
