"""A checkpoint that is written while the stage trains on holds the state of one moment, in bounded memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from running import wait_for
from safetensors.torch import save

from cache_store.errors import StorageFull, StorageUnavailable
from cache_store.records.nodes import NodeStore
from cache_store.storage.base import Stream
from cache_store.storage.local import LocalStorage
from workers import tensor_files
from workers.training.checkpoint import FILE
from workers.training.checkpoints.live import LiveTensors
from workers.training.checkpoints.writer import CheckpointWriter

if TYPE_CHECKING:
    from cache_store.storage.base import Content

PIECE = 1000
NODE = "abc123"


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", PIECE)


def state() -> dict[str, torch.Tensor]:
    """Live tensors of several layouts and types, in files of many pieces; `best` is not live."""
    torch.manual_seed(0)
    return {
        "best/a": torch.randn(2000),
        "model/a": torch.randn(2000),
        "model/conv": torch.randn(40, 8, 3, 3).to(memory_format=torch.channels_last),
        "model/low": torch.randn(3000).bfloat16(),
        "optimizer/a//step": torch.tensor(3.0),
        "optimizer/a//exp_avg": torch.randn(40, 50).t(),
    }


def live_names(tensors: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in tensors if not name.startswith("best/")}


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    """What an update does, to all that is live."""
    for name in live_names(tensors):
        tensors[name].fill_(float("nan"))


def taken(pieces: Iterator[memoryview], count: int) -> bytes:
    return b"".join(bytes(piece) for _, piece in zip(range(count), pieces, strict=False))


def pieces_in_all() -> int:
    return len(list(tensor_files.TensorStream(state()).pieces()))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5, 0.9, 1.0])
def test_what_is_not_written_when_an_update_comes_is_copied_first(share: float) -> None:
    tensors = state()
    expected = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    stream = LiveTensors(tensors, live_names(tensors), allowed=1 << 30)
    pieces = stream.pieces()
    begun = taken(pieces, int(share * pieces_in_all()))
    stream.before_update()
    spoil(tensors)
    stream.before_update()
    spoil(tensors)
    assert begun + b"".join(bytes(piece) for piece in pieces) == expected


@pytest.mark.parametrize("allowed", [0, 9000, 30000])
def test_an_update_waits_until_what_is_left_may_be_copied(allowed: int) -> None:
    tensors = state()
    expected = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    stream = LiveTensors(tensors, live_names(tensors), allowed)
    written, most = [], 0
    update = threading.Thread(target=lambda: (stream.before_update(), spoil(tensors)))
    update.start()
    for piece in stream.pieces():
        written.append(bytes(piece))
        if stream._left_bytes() <= allowed:
            wait_for(lambda: stream._copies.keys() == stream._left.keys(), 20)
        most = max(most, sum(tensor.nbytes for tensor in stream._copies.values()))
    update.join(timeout=10)
    assert not update.is_alive()
    assert b"".join(written) == expected
    assert most <= allowed
    assert bool(most) == bool(allowed)


def test_nothing_is_written_again_of_what_has_changed() -> None:
    tensors = state()
    stream = LiveTensors(tensors, live_names(tensors), allowed=1 << 30)
    first = b"".join(bytes(piece) for piece in stream.pieces())
    assert b"".join(bytes(piece) for piece in stream.pieces()) == first, "a write that is repeated in time"
    stream.before_update()
    with pytest.raises(StorageUnavailable, match="training went on"):
        next(stream.pieces())


class Slow(LocalStorage):
    """A folder into which every piece takes a while; `broken`: until it breaks."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.pause_s = 0.002
        self.broken = False

    def _write(self, path: str, contents: tuple[Content, ...]) -> int:
        if self.broken:
            raise OSError(28, "No space left on device")
        return super()._write(path, tuple(_Paced(content, self.pause_s) for content in contents))


class _Paced(Stream):
    def __init__(self, stream: Content, pause_s: float) -> None:
        assert isinstance(stream, Stream)
        self.nbytes, self._stream, self._pause_s = stream.nbytes, stream, pause_s

    def pieces(self) -> Iterator[memoryview]:
        for piece in self._stream.pieces():
            time.sleep(self._pause_s)
            yield piece


@pytest.fixture
def slow(tmp_path: Path) -> Slow:
    storage = Slow(tmp_path / "store")
    storage.probe()
    return storage


@dataclass
class Lab:
    """A node of a slow store, whose checkpoints are written beside updates."""

    nodes: NodeStore
    writer: CheckpointWriter = field(default_factory=CheckpointWriter)
    tensors: dict[str, torch.Tensor] = field(default_factory=state)

    def begin(self, step: int, allowed: int = 1 << 30) -> None:
        stream = LiveTensors(self.tensors, live_names(self.tensors), allowed)

        def publish() -> None:
            self.nodes.save_checkpoint(NODE, "a1", files={FILE: stream}, position=[step])
            self.nodes.prune_checkpoints(NODE, keep=2)

        self.writer.begin(stream, publish)

    def positions(self) -> list[tuple[int, ...]]:
        return [checkpoint.position for checkpoint in self.nodes.checkpoints(NODE)]


def test_checkpoints_written_beside_updates_are_those_of_their_moments(slow: Slow) -> None:
    lab, expected = Lab(NodeStore(slow)), {}
    for step in range(6):
        expected[step] = save({name: tensor.contiguous() for name, tensor in lab.tensors.items()})
        lab.begin(step, allowed=(0, 9000, 1 << 30)[step % 3])
        for _ in range(3):
            lab.writer.before_update()
            for name in live_names(lab.tensors):
                lab.tensors[name].add_(1.0)
    lab.writer.finish()
    assert lab.positions() == [(5,), (4,)]
    for checkpoint in lab.nodes.checkpoints(NODE):
        assert lab.nodes.read_file(checkpoint.files[FILE]) == expected[checkpoint.position[0]]
    assert lab.writer.timing is not None
    assert lab.writer.timing.waited > 0


def test_a_failure_is_told_when_asked_and_the_next_checkpoint_is_a_new_one(slow: Slow) -> None:
    lab = Lab(NodeStore(slow))
    slow.broken = True
    lab.begin(1, allowed=0)
    lab.writer.before_update()  # does not wait for a writer that is gone
    lab.writer.wait()
    assert lab.writer.failed
    with pytest.raises(StorageFull, match="No space left"):
        lab.writer.finish()
    slow.broken = False
    lab.begin(2)
    lab.writer.finish()
    assert not lab.writer.failed
    assert lab.positions() == [(2,)]


def test_a_checkpoint_is_given_up_in_the_middle(slow: Slow) -> None:
    lab = Lab(NodeStore(slow))
    slow.pause_s = 0.05
    lab.begin(1)
    before = time.monotonic()
    lab.writer.give_up()
    assert time.monotonic() - before < 0.05 * pieces_in_all() / 2
    assert not lab.writer.failed
    assert lab.positions() == []
