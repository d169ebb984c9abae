"""Files that DeepSpeed's ZeRO-3 keeps parameters and states in: a folder of this process's own, and how they are read
and written.

DeepSpeed reads and writes by a kernel of its own (`async_io`), which is compiled against libaio on every machine where
it is first used: fifteen sources that each take torch's headers, minutes of a core. What its swappers ask of that
kernel is little, so `AsyncFiles` stands in its place: threads that read and write at offsets, without a compiler and
without libaio. Files have the names and the bytes that the kernel gives them.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from cache_store.errors import StorageFull, UserError
from cache_store.records.own_folder import OwnFolder

#: Bytes that one thread reads or writes at a time.
PIECE = 32 << 20
#: Requests of a handle that are at work at one time.
THREADS = 4
#: Name of a folder of ours inside the one that the configuration names.
PREFIX = "segprop-zero3-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class AsyncFiles:
    """Read and write files beside the caller. The methods are those of DeepSpeed's `aio_handle`."""

    #: All that live: a buffer of one may be asked about by another.
    _all: ClassVar[weakref.WeakSet[AsyncFiles]] = weakref.WeakSet()

    def __init__(self, **settings: Any) -> None:
        """`settings`: of libaio, which is not there."""
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="segprop-zero3-files")
        self._requests: list[list[Future[None]]] = []
        self._buffers: dict[int, Tensor] = {}
        self._all.add(self)

    def async_pread(self, buffer: Tensor, path: str, offset: int) -> int:
        """Begin to fill a host tensor from a file; returns 0."""
        return self._begin(_read, buffer, path, offset)

    def async_pwrite(self, buffer: Tensor, path: str, offset: int) -> int:
        """Begin to write a host tensor to a file; returns 0."""
        return self._begin(_write, buffer, path, offset)

    def _begin(self, work: Callable[[memoryview, str, int], None], buffer: Tensor, path: str, offset: int) -> int:
        view = _bytes_of(buffer)
        pieces = [slice(begin, begin + PIECE) for begin in range(0, len(view), PIECE)]
        self._requests.append([self._threads.submit(work, view[piece], path, offset + piece.start) for piece in pieces])
        return 0

    def wait(self) -> int:
        """Wait for all that was begun; returns how many requests that were. StorageFull where the disk was, UserError
        for other troubles of it."""
        requests, self._requests = self._requests, []
        for piece in (piece for request in requests for piece in request):
            piece.result()
        return len(requests)

    def new_cpu_locked_tensor(self, numel: int, like: Tensor) -> Tensor:
        """Make a host tensor (numel,) of the type of `like`; pinned beside a GPU."""
        pinned = torch.cuda.is_available()
        buffer = torch.empty(numel, dtype=like.dtype, pin_memory=pinned)
        self._buffers[buffer.data_ptr()] = buffer
        return buffer

    def free_cpu_locked_tensor(self, buffer: Tensor) -> bool:
        """Forget a tensor of `new_cpu_locked_tensor`; returns whether it was one."""
        return self._buffers.pop(buffer.data_ptr(), None) is not None

    def is_pinned(self, tensor: Tensor) -> bool:
        """Return whether a tensor lies in one that any handle made."""
        if tensor.device.type != "cpu" or not tensor.numel():
            return False
        address = tensor.data_ptr()
        held = (buffer for files in self._all for buffer in files._buffers.values())
        return any(buffer.data_ptr() <= address < buffer.data_ptr() + buffer.nbytes for buffer in held)


def stand_in() -> None:
    """Let DeepSpeed use `AsyncFiles` wherever this process would load its kernel."""
    builder = importlib.import_module("deepspeed.ops.op_builder.builder")
    builder.OpBuilder._loaded_ops["async_io"] = SimpleNamespace(aio_handle=AsyncFiles)
    # The kernel's memory is loaded before the kernel, whether that is there or not.
    loading = importlib.import_module("deepspeed.ops.op_builder.pin_memory_load")
    if not hasattr(sys, loading._SYS_CACHE_ATTR):
        setattr(sys, loading._SYS_CACHE_ATTR, SimpleNamespace())


def read_numbers(path: str, start: int, numbers: int) -> Tensor:
    """Copy float32 (numbers,) out of a file, from number `start`. UserError where the file is shorter."""
    values = torch.empty(numbers, dtype=torch.float32)
    _read(_bytes_of(values), path, 4 * start)
    return values


def write_numbers(path: str, start: int, values: Tensor) -> None:
    """Put float32 values (N,) into a file, from number `start`. Errors as of `AsyncFiles.wait`."""
    _write(_bytes_of(values.detach().to("cpu", torch.float32).contiguous()), path, 4 * start)


def _bytes_of(tensor: Tensor) -> memoryview:
    values: Any = tensor.detach().view(torch.uint8).numpy()
    return memoryview(values)


def _read(view: memoryview, path: str, offset: int) -> None:
    with _told(path), open(path, "rb", buffering=0) as file:
        while view:
            count = os.preadv(file.fileno(), [view], offset)
            if not count:
                raise OSError(errno.EIO, "ends before what was written to it")
            view, offset = view[count:], offset + count


def _write(view: memoryview, path: str, offset: int) -> None:
    with _told(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while view:
                count = os.pwritev(file, [view], offset)
                view, offset = view[count:], offset + count
        finally:
            os.close(file)


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = f"resources.gang.zero3.disk: {path}"
        if error.errno in _FULL:
            raise StorageFull(f"{place}: the disk is full; the last good checkpoint is kept. Free some space") from None
        raise UserError(f"{place}: {error.strerror}; the last good checkpoint is kept") from None


class SwapFolder(OwnFolder):
    """A folder of this process inside a given one, for the time of a stage. What processes that were killed left there
    goes when the next one comes."""

    def __init__(self, parent: Path) -> None:
        """UserError where nothing can be written there."""
        try:
            super().__init__(parent, PREFIX)
        except OSError as error:
            raise UserError(
                f"resources.gang.zero3.disk: {parent}: cannot be written ({error.strerror}); allowed: a folder on a "
                "local disk"
            ) from None


def check_room(folder: Path, needed: int, sharing: int) -> None:
    """Raise StorageFull where a disk has no room for `needed` bytes of each of `sharing` ranks of this machine."""
    free = shutil.disk_usage(folder).free
    if needed * sharing > free:
        raise StorageFull(
            f"resources.gang.zero3.disk: {folder}: {sharing} ranks of this machine need {needed * sharing / 1e9:.1f} "
            f"GB, {free / 1e9:.1f} GB are free; nothing was trained. Free some space, or name a folder on another disk",
            needed=needed * sharing,
            free=free,
        )
