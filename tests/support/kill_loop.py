"""Run as a program: kills a writer at its first, second, … storage operation until it gets through, and after each
kill checks that a reader sees whole things or none, and that a rerun completes.

    python kill_loop.py folder|s3 before|after PLACE

Every writer and every check is a fork of this process, which itself never touches the storage, so that nothing is
imported more than once. Prints the number of kills.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from cache_store.errors import CorruptShard, MissingShard
from cache_store.formats.codec import Field
from cache_store.records.nodes import NodeStore
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.object_client import load_obstore
from cache_store.storage.open import open_storage

SPEC = SetSpec({"what": "killed"}, 16, (Field("x", "int64", (3,)),), 4, 8)
FILE = b"weights" * 100
KILLED, WRONG = 9, 3
CALLS = {
    "folder": (os, ("open", "write", "fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir")),
    "s3": (None, ("put", "get", "head", "delete", "copy", "list", "list_with_delimiter")),
}


def values(i: int) -> list[np.ndarray]:
    return [np.arange(24 * i, 24 * (i + 1), dtype=np.int64).reshape(8, 3)]


def work(place: str) -> None:
    """Publishes two shards, a checkpoint and a node; finds a shard damaged, moves it aside and makes it again."""
    storage = open_storage(place)
    snapshots = SnapshotStore(storage).open(SPEC)
    for i in range(2):
        snapshots.put(i, values(i))
    nodes = NodeStore(storage)
    attempt = nodes.attempt("node")
    attempt.write("f", FILE)
    attempt.checkpoint({"f": FILE}, (1,))
    attempt.commit({"ok": True})
    name = storage.list(f"sets/{SPEC.id}/shards")[0]
    path = f"sets/{SPEC.id}/shards/{name}"
    damaged = bytearray(storage.read(path))
    damaged[-1] ^= 1
    storage.write(path, damaged)
    try:
        SnapshotStore(storage).load(SPEC.id).shard(0)
    except (CorruptShard, MissingShard):
        snapshots.put(0, values(0))
    nodes.prune_attempts("node")
    nodes.drop_checkpoints("node")


def check(place: str) -> None:
    """Whole or not there: shards (or found damaged), the node, the checkpoint. Then all of it after a rerun."""
    storage = open_storage(place)
    snapshots = SnapshotStore(storage).open(SPEC)
    for i in range(2):
        try:
            assert (snapshots.shard(i)[0] == values(i)[0]).all(), "wrong data"
        except (CorruptShard, MissingShard):
            assert i in snapshots.missing()
    nodes = NodeStore(storage)
    commit = nodes.commit_of("node")
    if commit is not None:
        assert nodes.read_file(commit.files["f"]) == FILE
    checkpoint = nodes.latest_checkpoint("node")
    if checkpoint is not None:
        assert nodes.read_file(checkpoint.files["f"]) == FILE
    for i in range(2):
        snapshots.put(i, values(i))
        assert (snapshots.shard(i)[0] == values(i)[0]).all(), "wrong data after a rerun"
    if commit is None:
        attempt = nodes.attempt("node")
        attempt.write("f", FILE)
        attempt.commit({"ok": True})
    assert nodes.commit_of("node") is not None
    assert snapshots.missing() == []
    assert SnapshotStore(storage).load(SPEC.id).digest() == snapshots.digest()


def arm(kind: str, when: str, number: int) -> None:
    """Let this process die at its `number`-th call, before or after carrying it out."""
    module, names = CALLS[kind]
    module = module or load_obstore()
    seen = 0

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == number and when == "before":
                os._exit(KILLED)
            mine = seen == number
            try:
                return real(*arguments, **options)
            finally:
                if mine:
                    os._exit(KILLED)

        return call

    for name in names:
        setattr(module, name, wrap(getattr(module, name)))


def forked(job: Callable[[], None]) -> int:
    """The exit code of `job` run in a fork."""
    child = os.fork()
    if child == 0:
        code = WRONG
        try:
            job()
            code = 0
        except BaseException as error:  # noqa: BLE001  reported by the exit code
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(kind: str, when: str, place: str) -> int:
    kills = 0
    while True:
        here = f"{place}/{kills + 1}"

        def attack(here: str = here, number: int = kills + 1) -> None:
            arm(kind, when, number)
            work(here)

        code = forked(attack)
        if code not in (0, KILLED) or forked(lambda here=here: check(here)) != 0:
            print(f"after {kills} kills: the next ended with {code}", file=sys.stderr)
            return 1
        if code == 0:
            print(kills)
            return 0
        kills += 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
