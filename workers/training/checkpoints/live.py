"""The tensors of a stage as they are at one moment, written while the stage trains on and changes them.

Forward and backward passes read parameters and optimizer states, updates alone change them. So a tensor is written
straight from where training has it, in the order of the file; what is not written when the next update comes is copied
first, as far as the memory for it goes, and the update waits for the rest.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from cache_store.crashpoints import reach
from cache_store.errors import StorageUnavailable
from cache_store.storage.base import PIECE_BYTES
from workers.models.chain import State
from workers.tensor_files import TensorStream, cut, cuts, pieces_of


class LiveTensors(TensorStream):
    """A file of tensors of which updates change those named `live`; nobody changes the others before the file is
    written. `before_update` belongs to the thread that trains, `pieces` to the one that writes, `end` to either."""

    def __init__(self, tensors: State, live: Collection[str], allowed: int) -> None:
        """`allowed`: bytes of tensors that may be copied for an update at one time."""
        super().__init__(tensors)
        self._live = {name: tensor for name, tensor in self._tensors.items() if name in live}
        self._allowed = allowed
        self._turn = threading.Condition()
        #: Live tensors that are not wholly written, and the copies of them.
        self._left = dict(self._live)
        self._copies: dict[str, Tensor] = {}
        self._begun = self._changed = self._over = False
        devices = {tensor.device for tensor in self._live.values() if tensor.device.type == "cuda"}
        self._staging = {device: Staging(device) for device in devices}

    def before_update(self) -> None:
        """Return as soon as live tensors may be changed. Call it before each update."""
        with self._turn:
            self._changed = True
            if self._left.keys() == self._copies.keys():
                return
            self._turn.wait_for(lambda: self._over or self._left_bytes() <= self._allowed)
            for name, tensor in self._left.items():
                self._copies[name] = torch.empty_like(tensor, device="cpu").copy_(tensor)
        reach("checkpoint.copied")

    def _left_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._left.values())

    def pieces(self) -> Iterator[memoryview]:
        """As `Stream.pieces`. StorageUnavailable after `end`, and the second time once training went on."""
        with self._turn:
            if self._begun and self._changed:
                raise StorageUnavailable("the checkpoint cannot be written again: training went on")
            self._begun = True
            if not self._over:
                self._left = dict(self._live)
        yield memoryview(self._head)
        for name, tensor in self._tensors.items():
            yield from self._pieces(name, tensor) if name in self._live else pieces_of(tensor)

    def _pieces(self, name: str, tensor: Tensor) -> Iterator[memoryview]:
        for start, stop in cuts(tensor):
            with self._turn:
                if self._over:
                    raise StorageUnavailable("the checkpoint was given up")
                piece = self._copied(self._copies.get(name, tensor), start, stop)
            reach("checkpoint.piece")
            yield piece
        with self._turn:
            self._left.pop(name, None)
            self._copies.pop(name, None)
            self._turn.notify_all()

    def _copied(self, tensor: Tensor, start: int, stop: int) -> memoryview:
        """A copy of a piece: what is written and hashed must not change meanwhile."""
        if tensor.device in self._staging:
            return self._staging[tensor.device].copied(tensor, start, stop)
        # By numpy, in this thread: torch would start threads of its own for it, beside those that train.
        return cut(tensor, start, stop).numpy().copy().data

    def end(self) -> None:
        """Let go of everything: the file is written, or will not be. Updates no longer wait."""
        with self._turn:
            self._over = True
            self._left.clear()
            self._copies.clear()
            self._turn.notify_all()


class Staging:
    """Takes pieces of tensors from a CUDA device beside its other work: over a stream of its own, through one pinned
    buffer of a piece."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = cast("Any", torch.cuda.Stream)(device)
        # What training has asked of the device so far comes first; later updates wait for the copies (`before_update`).
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._pinned = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)

    def copied(self, tensor: Tensor, start: int, stop: int) -> memoryview:
        """Copy a piece to the host."""
        with torch.cuda.stream(self._stream):
            piece = cut(tensor, start, stop)
            room = self._pinned if len(piece) <= PIECE_BYTES else torch.empty(len(piece), dtype=torch.uint8)
            room[: len(piece)].copy_(piece, non_blocking=True)
        self._stream.synchronize()
        return room[: len(piece)].numpy().copy().data
