"""Copy tensors between a device and the host's memory while the device computes.

Each direction has a stream of its own. A copy's target is memory of the computing stream's pool, and its source is kept
until the copy is used or let go, so neither needs `record_stream`, which would hold memory until the host looks again.
On a CPU the same calls copy at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from workers.device import host_beside


class Copy:
    """One copy that is under way, of several tensors at once."""

    def __init__(self, sources: Iterable[Tensor], target: torch.device, lane: _Lane) -> None:
        self._lane = lane
        self._sources: tuple[Tensor, ...] | None = tuple(sources)
        pinned = lane.pins and target.type == "cpu"
        self._made = tuple(torch.empty_like(source, device=target, pin_memory=pinned) for source in self._sources)
        with lane.copying():
            for made, source in zip(self._made, self._sources, strict=True):
                made.copy_(source, non_blocking=True)
        self._done = lane.mark()

    def result(self) -> tuple[Tensor, ...]:
        """Return the copies: what is enqueued from now on finds them whole."""
        self.settle()
        return self._made

    def settle(self) -> None:
        """Let go of the sources: what is enqueued from now on may take their memory."""
        if self._sources is not None:
            self._lane.wait_for(self._done)
            self._sources = None

    def __del__(self) -> None:
        # Memory that is still written to must not be taken for something else.
        if getattr(self, "_done", None) is not None:
            self.settle()


class Transfers:
    """Makes copies between one device and the host's memory (pinned, where the device can read it directly)."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._host = device, host_beside(device)
        self._in, self._out = _Lane(device), _Lane(device)

    def to_host(self, tensors: Iterable[Tensor]) -> Copy:
        """Begin to copy tensors to the host; layouts stay."""
        return Copy(tensors, self._host, self._out)

    def to_device(self, tensors: Iterable[Tensor]) -> Copy:
        """Begin to copy tensors to the device; layouts stay."""
        return Copy(tensors, self._device, self._in)


class _Lane:
    """The copies of one direction, in order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        #: Whether copies need pinned memory to pass beside computing.
        self.pins = device.type == "cuda"
        cuda: Any = torch.cuda
        self._stream: Any = cuda.Stream(device) if self.pins else None

    def copying(self) -> AbstractContextManager[Any]:
        """Enqueue copies behind everything that computes their sources, or used the memory that they go to."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)

    def mark(self) -> Any:
        """Mark the end of what has been enqueued; None where copies are done at once."""
        return None if self._stream is None else self._stream.record_event()

    def wait_for(self, mark: Any) -> None:
        """Let what is computed from now on wait for a mark."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)
