"""Files mapped for reading, whose truncation is noticed afterwards and does not end the process.

A file that somebody truncates while it is mapped raises SIGBUS at the next access behind its new end, and inside the
page of that end it reads as zeros without a signal. Positioned reads into own memory have neither problem, but a system
call a run of rows takes longer than most runs take to copy. So copies stay plain memory accesses, and:

- a SIGBUS inside a file mapped here puts pages of zeros in place of the rest of that mapping, and the access goes on;
- whoever has copied something looks at the mapping's last byte. Shard files do not end with a zero byte, so a zero
  there means that the file got shorter before the look, and that the copy may hold zeros.

The handler is a Python function. It runs in the thread that met the signal, in the middle of a memory access of numpy
or Arrow, where calling Python is allowed as in any callback. Signals of other addresses go to the handler before it, or
end the process as ever. Only 64-bit Linux has the handler; elsewhere the last byte is looked at all the same.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import sys
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cache_store.formats.codec import Array

_PAGE = mmap.PAGESIZE
_SUPPORTED = sys.platform == "linux" and sys.maxsize > 2**32
_SA_SIGINFO = 4
_MAP_FIXED = 0x10
#: Where a siginfo_t of 64-bit Linux holds the address.
_ADDRESS_OFFSET = 16
#: How often what is torn is read again: the second read finds the damage, so more is somebody who goes on truncating.
ATTEMPTS = 3

_INTACT = b"1"
_TORN = b"\0"


class _SigAction(ctypes.Structure):
    """struct sigaction as glibc and musl have it on 64-bit Linux."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


#: First byte -> end of every mapping that is alive. No lock: the handler may not wait, and single operations on a
#: dictionary are whole.
_ranges: dict[int, int] = {}
_previous = _SigAction()
_installing = threading.Lock()


class ShardArrays(tuple[Array, ...]):
    """The arrays of one shard. Those of a mapped file may turn to zeros when it is truncated: look at `intact` after
    copying out of them."""

    #: The last byte of the mapped file.
    tail: memoryview | bytes

    def __new__(cls, arrays: Iterable[Array], tail: memoryview | bytes = _INTACT) -> ShardArrays:
        made = super().__new__(cls, arrays)
        made.tail = tail
        return made

    @property
    def intact(self) -> bool:
        """Whether what was copied until now is what the file held when it was checked."""
        return self.tail[0] != 0


def map_file(path: Path, size: int) -> tuple[pa.Buffer, memoryview | bytes]:
    """(the bytes of a file, its last byte to be looked at after every copy); the byte is zero where the file has not
    `size` bytes. OSErrors as those of opening it."""
    # Not the mmap module: it holds a file descriptor for every mapping.
    with pa.memory_map(str(path)) as mapped:
        buffer = mapped.read_buffer()
    if buffer.size != size or not size:
        return buffer, _TORN
    whole: Array = np.frombuffer(buffer, np.uint8)
    if _SUPPORTED:
        _watch(whole)
    # Arrays made of this buffer keep `whole` alive, and with it the mapping's entry.
    return pa.py_buffer(whole), whole[-1:].data


def _watch(whole: Array) -> None:
    start = whole.ctypes.data
    _install()
    _ranges[start] = start + len(whole)
    # Called before the memory goes: later another file may lie there.
    weakref.finalize(whole, _ranges.pop, start, None).atexit = False


def _install() -> None:
    """Put the handler in place; again, where somebody has put another one there since."""
    with _installing:
        present = _SigAction()
        _check(_libc.sigaction(signal.SIGBUS, None, ctypes.byref(present)))
        if present.handler == _HANDLER_ADDRESS:
            return
        ctypes.pointer(_previous)[0] = present
        ours = _SigAction(handler=_HANDLER_ADDRESS, flags=_SA_SIGINFO)
        _check(_libc.sigaction(signal.SIGBUS, ctypes.byref(ours), None))


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), "cannot set a handler of SIGBUS")


def _on_bus_error(_signal: int, info: int, _context: int) -> None:
    """Let the access that raised the signal go on with zeros, if it is one to a file mapped here."""
    address = ctypes.c_void_p.from_address(info + _ADDRESS_OFFSET).value or 0
    for start, end in list(_ranges.items()):
        if start <= address < end:
            first = address - address % _PAGE
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
            if _libc.mmap(first, end - first, mmap.PROT_READ, flags, -1, 0) == first:
                return
            break
    # The access is repeated and raises the signal once more, for whoever was here before; who may hand it back to us.
    _libc.sigaction(signal.SIGBUS, ctypes.byref(_previous), None)
    ctypes.memset(ctypes.byref(_previous), 0, ctypes.sizeof(_previous))  # the default action: the process ends


if _SUPPORTED:
    _libc: Any = ctypes.CDLL(None, use_errno=True)
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    _HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(_on_bus_error)
    _HANDLER_ADDRESS = ctypes.cast(_HANDLER, ctypes.c_void_p).value
