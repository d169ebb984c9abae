"""Read a pickle of plain containers, text, numbers and numpy arrays of whole numbers, without Python's unpickler.

A pickle is a program for a small stack machine. Python's own runs what the program names and takes its word for sizes:
nine bytes ask for 64 GB, nested keys overflow the C stack. This one calls nothing, makes nothing larger than the file,
and never recurses. What it does not know is refused.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class _Name:
    """What a pickle would have called."""

    module: str
    name: str


@dataclass
class _Dtype:
    kind: str
    order: str = "|"


@dataclass
class PickledArray:
    """A numpy array as its pickle describes it."""

    shape: tuple[int, ...] = ()
    dtype: _Dtype | None = None
    fortran: bool = False
    raw: bytes = b""

    def array(self) -> np.ndarray:
        """The array. ValueError when it is not of whole numbers, or its bytes are not as many as its shape says."""
        if self.dtype is None or self.dtype.kind.lstrip("|<>=") not in _WHOLE:
            raise ValueError("an array is not of whole numbers")
        order = self.dtype.order if self.dtype.order in ("<", ">") else "="
        dtype = np.dtype(order + self.dtype.kind.lstrip("|<>="))
        if len(self.raw) != math.prod(self.shape) * dtype.itemsize:
            raise ValueError(f"an array of shape {self.shape} has {len(self.raw)} bytes")
        return np.frombuffer(self.raw, dtype).reshape(self.shape, order="F" if self.fortran else "C")


_WHOLE = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8")
_MOST_AXES = 4
_RECONSTRUCT = (_Name("numpy.core.multiarray", "_reconstruct"), _Name("numpy._core.multiarray", "_reconstruct"))
_DTYPE = _Name("numpy", "dtype")
_ENCODE = _Name("_codecs", "encode")
#: All that may be named; the class of an array is only an argument.
_NAMED = (*_RECONSTRUCT, _DTYPE, _ENCODE, _Name("numpy", "ndarray"))


def read_plain_pickle(content: bytes) -> Any:
    """The value of a pickle: containers, text, numbers, bytes and `PickledArray`. ValueError when it is none of these,
    names anything else, or is damaged."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(content):
            machine.step(opcode.name, argument)
        return machine.stack.pop()
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("a damaged pickle") from error


@dataclass
class _Machine:
    stack: list[Any] = field(default_factory=list)
    #: Lengths of the stack where marks stand.
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def step(self, name: str, argument: Any) -> None:
        if name in _PUSHED:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _STEPS:
            _STEPS[name](self, argument)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"{name} is not allowed in a data file")

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def last(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) < count:
            raise ValueError("a damaged pickle")
        del self.stack[-count:]
        return items

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def remember(self, index: Any) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def recall(self, index: Any) -> None:
        self.stack.append(self.memo[index])

    def append(self, items: list[Any]) -> None:
        self._top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise ValueError("a key is not text")
            target[key] = value

    def make_dict(self, _: Any) -> None:
        items = self.since_mark()
        self.stack.append({})
        self.set_items(items)

    def name(self, text: Any) -> None:
        module, name = self.last(2) if text is None else text.split(" ", 1)
        named = _Name(module, name)
        if named not in _NAMED:
            raise ValueError(f"{module}.{name} is not allowed in a data file")
        self.stack.append(named)

    def reduce(self, _: Any) -> None:
        called, arguments = self.last(2)
        if called in _RECONSTRUCT:
            self.stack.append(PickledArray())
        elif called == _DTYPE and isinstance(arguments[0], str):
            self.stack.append(_Dtype(arguments[0]))
        elif called == _ENCODE and arguments[1:] == ("latin1",):
            self.stack.append(arguments[0].encode("latin1"))
        else:
            raise ValueError("calls what is not allowed in a data file")

    def build(self, _: Any) -> None:
        (state,) = self.last(1)
        made = self.stack[-1]
        if isinstance(made, _Dtype):
            made.order = str(state[1])
        elif isinstance(made, PickledArray):
            _, shape, dtype, fortran, raw = state
            whole = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
            if not whole or len(shape) > _MOST_AXES or not isinstance(dtype, _Dtype):
                raise ValueError("an array is not of whole numbers")
            made.shape, made.dtype, made.fortran = shape, dtype, bool(fortran)
            made.raw = raw if isinstance(raw, bytes) else raw.encode("latin1")
        else:
            raise ValueError("sets the state of what is not allowed in a data file")

    def _top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError("a damaged pickle")
        return self.stack[-1]


#: Opcodes whose argument is a value. Python 2's strings, which may be bytes, come as text of latin1: it loses nothing.
_PUSHED = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    )
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.recall),
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL"), _Machine.name),
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "APPEND": lambda machine, _: machine.append(machine.last(1)),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.last(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "DICT": _Machine.make_dict,
    "LIST": lambda machine, _: machine.stack.append(machine.since_mark()),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.stack.append(tuple(machine.last(1))),
    "TUPLE2": lambda machine, _: machine.stack.append(tuple(machine.last(2))),
    "TUPLE3": lambda machine, _: machine.stack.append(tuple(machine.last(3))),
}
