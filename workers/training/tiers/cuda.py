"""Copies between a CUDA device and pinned memory of the host, over streams of their own, beside what is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor

from workers.specs.tier_bytes import BUFFER_BYTES, LEAVING_BYTES


class CudaCarrier:
    """Brings gradients to the host during the backward pass. What is added to earlier micro-batches goes through two
    buffers, out of which a thread of its own adds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream(device)
        self._buffers = _Buffers()
        self._adder = ThreadPoolExecutor(1, thread_name_prefix="segprop-gradients")
        #: Gradients that are still read, oldest first, and what waits for it.
        self._leaving: deque[tuple[Tensor, Callable[[], Any]]] = deque()

    def take(self, gradient: Tensor, total: Tensor, *, add: bool) -> None:
        """As `Carrier.take`. `total` is pinned."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        if add or gradient.dtype != total.dtype:
            waited = self._through_buffers(gradient, total, add=add)
        else:
            with torch.cuda.stream(self._stream):
                total.copy_(gradient, non_blocking=True)
            waited = _recorded(self._stream).synchronize
        self._leaving.append((gradient, waited))
        # The pass makes gradients faster than the link takes them: it waits, so that they do not pile up.
        while sum(each.nbytes for each, _ in self._leaving) > LEAVING_BYTES and len(self._leaving) > 1:
            self._leaving.popleft()[1]()

    def _through_buffers(self, gradient: Tensor, total: Tensor, *, add: bool) -> Callable[[], Any]:
        last: Future[None] | None = None
        for part in _cuts(gradient):
            buffer = self._buffers.next(gradient.dtype)[: part.stop - part.start]
            with torch.cuda.stream(self._stream):
                buffer.copy_(gradient[part], non_blocking=True)
            last = self._adder.submit(_arrive, _recorded(self._stream), buffer, total[part], add)
            self._buffers.taken(last.result)
        return last.result if last is not None else _at_once

    def finish(self) -> None:
        """As `Carrier.finish`."""
        while self._leaving:
            self._leaving.popleft()[1]()

    def close(self) -> None:
        """As `Carrier.close`."""
        self._adder.shutdown()


class CudaUploads:
    """Brings weights to the device while the next ones are updated."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream(device)
        self._buffers = _Buffers()

    def begin(self) -> None:
        """As `Uploads.begin`."""
        self._stream.synchronize()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def send(self, source: Tensor, target: Tensor) -> None:
        """As `Uploads.send`."""
        if source.dtype == target.dtype and source.is_pinned():
            with torch.cuda.stream(self._stream):
                target.copy_(source, non_blocking=True)
            return
        for part in _cuts(target):
            buffer = self._buffers.next(target.dtype)[: part.stop - part.start]
            buffer.copy_(source[part])
            with torch.cuda.stream(self._stream):
                target[part].copy_(buffer, non_blocking=True)
            self._buffers.taken(_recorded(self._stream).synchronize)

    def finish(self) -> None:
        """As `Uploads.finish`."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class _Buffers:
    """Two pinned buffers: one is filled while the other is emptied. Each is given out again when what it was taken for
    is over."""

    def __init__(self) -> None:
        self._memory = [torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._waits: list[Callable[[], Any]] = [_at_once, _at_once]
        self._turn = 0

    def next(self, dtype: torch.dtype) -> Tensor:
        """Return the buffer that was taken longest ago, as numbers of a type, when it may be filled."""
        self._turn = 1 - self._turn
        self._waits[self._turn]()
        return self._memory[self._turn].view(dtype)

    def taken(self, wait: Callable[[], Any]) -> None:
        """Note what returns when the buffer given out last may be filled again."""
        self._waits[self._turn] = wait


def _arrive(event: Any, buffer: Tensor, total: Tensor, add: bool) -> None:
    event.synchronize()
    if add:
        total.add_(buffer)
    else:
        total.copy_(buffer)


def _cuts(tensor: Tensor) -> list[slice]:
    numbers = BUFFER_BYTES // tensor.element_size()
    return [slice(begin, min(begin + numbers, len(tensor))) for begin in range(0, len(tensor), numbers)]


def _stream(device: torch.device) -> Any:
    return cast("Any", torch.cuda.Stream)(device)


def _recorded(stream: Any) -> Any:
    event = cast("Any", torch.cuda.Event)()
    event.record(stream)
    return event


def _at_once() -> None:
    """Nothing to wait for."""
