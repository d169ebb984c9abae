"""Follow a module's forward with a sample at hand: what depends on shapes and types is decided as it runs.

torch.fx alone gives up where a forward asks for a tensor's type or compares sizes. Here every recorded value is
computed beside it. Sizes but the first (samples) are numbers, as they are for samples of this shape; the first stays
recorded, so that parts take any number of samples. Control flow on sizes goes the way it goes for this sample; control
flow on data is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.fx.proxy import TraceError

#: Steps that take one thing out of several.
_PICKS = (getattr, operator.getitem)
#: What a tensor says of itself without its elements.
_FACTS = frozenset({"dtype", "device", "ndim", "is_cuda", "layout", "requires_grad", "is_sparse", "is_quantized"})


class _Valued(fx.Proxy):
    """A recorded value that knows what it is for the sample."""

    tracer: ValueTracer

    @property
    def value(self) -> Any:
        return self.tracer.values[self.node]

    def __getattr__(self, name: str) -> Any:
        value = self.value
        if isinstance(value, Tensor):
            if name in _FACTS:
                return getattr(value, name)
            if name == "shape":
                return self._sizes()
            if name == "size":
                return lambda dim=None: self._sizes() if dim is None else self._sizes()[dim]
            if name in ("dim", "is_floating_point", "get_device"):
                return getattr(value, name)
        if callable(getattr(value, name)):
            return super().__getattr__(name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def _sizes(self) -> tuple[Any, ...]:
        recorded = self.tracer.create_proxy("call_function", getattr, (self, "shape"), {})
        return (recorded[0], *self.value.shape[1:]) if self.value.ndim else ()

    def __iter__(self) -> Iterator[Any]:
        return self.tracer.iter(self)

    def __len__(self) -> int:
        return len(self.value)

    def __index__(self) -> int:
        return int(self._number())

    def __int__(self) -> int:
        return int(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def _number(self) -> Any:
        if isinstance(self.value, Tensor):
            raise TraceError("a number is taken from a tensor's elements")
        return self.value


class ValueTracer(fx.Tracer):
    """Records the forward of one module, and what every step of it gives for a sample."""

    #: Buffers are recorded where they are used, as parameters are.
    proxy_buffer_attributes = True

    def __init__(self, sample: Tensor, inside: frozenset[str]) -> None:
        """`sample`: (B, ...), which no module may change; `inside`: names of modules that are looked into."""
        super().__init__()
        self._sample, self._inside = sample, inside
        #: Step -> what it gives.
        self.values: dict[fx.Node, Any] = {}
        #: The modules that are being looked into, the innermost last.
        self.open: list[str] = []
        #: A module computes: its own steps are not recorded.
        self._running = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._inside

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._running:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        leaf = self.is_leaf_module(m, name)
        if not leaf:
            self.open.append(name)
        given = super().call_module(m, forward, args, kwargs)
        if not leaf:
            # Where it fails, the name stays: `open` says which module could not be followed.
            self.open.pop()
        return given

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Valued(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **named)
        node = proxy.node
        value = self.values[node] = self._run(node)
        if node.target in _PICKS and _plain(value) and self._beside_tensors(node):
            # What a module says beside its tensors: the height and width of its tokens.
            return value
        return proxy

    def to_bool(self, obj: fx.Proxy) -> bool:
        value = self.values[obj.node]
        if isinstance(value, Tensor):
            raise TraceError("control flow depends on the elements of a tensor")
        return bool(value)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = self.values[obj.node]
        if not isinstance(value, Tensor | tuple | list):
            raise TraceError(f"a {type(value).__name__} is iterated over")
        given: Any = obj
        return iter([given[index] for index in range(len(value))])

    def _beside_tensors(self, node: fx.Node) -> bool:
        """Tell whether a step picks from what a module gave, and not from one of its tensors."""
        source: Any = node.args[0]
        while isinstance(source, fx.Node) and not isinstance(self.values[source], Tensor):
            if source.op == "call_module":
                return True
            if source.target not in _PICKS:
                return False
            source = source.args[0]
        return False

    def _run(self, node: fx.Node) -> Any:
        args: Any = map_arg(node.args, self._value)
        kwargs: Any = map_arg(node.kwargs, self._value)
        with torch.no_grad():
            if node.op == "placeholder":
                return self._sample.clone()
            if node.op == "get_attr":
                return self._value(node)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            if node.op == "call_module":
                return self._run_module(self.root.get_submodule(str(node.target)), args, kwargs)
            return cast("FunctionType", node.target)(*args, **kwargs)

    def _value(self, node: fx.Node) -> Any:
        if node.op == "get_attr" and node not in self.values:
            holder, _, name = str(node.target).rpartition(".")
            module = self.root.get_submodule(holder)
            self.values[node] = {**module._parameters, **module._buffers}[name]
        return self.values[node]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not any(a is own for own in self._tensors()):
            raise TraceError("a tensor is made that depends on no input")
        return super().create_arg(a)

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.root.parameters()
        yield from self.root.buffers()

    def _run_module(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        training, self._running = module.training, True
        try:
            # Nothing is drawn, and running statistics stay, while a module is only looked at.
            return module.eval()(*args, **kwargs)
        finally:
            module.train(training)
            self._running = False


def drop_unused_sizes(graph: fx.Graph) -> None:
    """Remove steps that only ask for a size that nothing uses."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target in _PICKS and not node.users:
            graph.erase_node(node)


def sizes_in(values: Mapping[fx.Node, Any], samples: int) -> dict[fx.Node, int]:
    """Steps that give a number which goes with the samples, and how many each sample counts for."""
    return {
        node: value // samples
        for node, value in values.items()
        if isinstance(value, int) and not isinstance(value, bool) and value and value % samples == 0
    }


def single_input(network: nn.Module, forward: Any) -> nn.Module:
    """Make `forward(self, x)` the module's forward, `forward` a function that calls the library's own. Everything else
    of it, names in its state among that, stays."""
    kind = type(network)
    network.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return network


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_plain, value))
    return value is None or isinstance(value, int | float | str)
