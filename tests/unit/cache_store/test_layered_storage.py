"""A storage above another: whatever happens to it, the one below stays as it is."""

from __future__ import annotations

import uuid

from cache_store.storage.base import Storage
from cache_store.storage.layered import LayeredStorage
from cache_store.storage.open import open_storage


def contents(storage: Storage) -> dict[str, bytes]:
    return {info.path: storage.read(info.path) for info in storage.files("")}


def test_what_happens_above_leaves_the_store_below_as_it_is() -> None:
    below, above = (open_storage(f"memory://{uuid.uuid4().hex}") for _ in range(2))
    for path in ("a/kept", "a/replaced", "a/moved", "b/deleted", "c/x", "c/d/y"):
        below.write(path, path.encode())
    before = contents(below)
    both = LayeredStorage(above, below)
    assert both.is_store()
    both.write("a/replaced", b"new")
    both.write("fresh", b"fresh")
    both.move("a/moved", "a/target")
    both.delete("b/deleted")
    both.delete_tree("c")
    assert not both.create("a/kept", b"mine")
    assert both.create("b/deleted", b"again")
    assert both.create("c/d/y", b"again")
    assert contents(below) == before
    seen = {
        "a/kept": b"a/kept",
        "a/replaced": b"new",
        "a/target": b"a/moved",
        "fresh": b"fresh",
        "b/deleted": b"again",
        "c/d/y": b"again",
    }
    assert {path: data for path, data in contents(both).items() if path != "store.json"} == seen
    assert both.list("c") == ["d"]
    assert both.list("a") == ["kept", "replaced", "target"]
    assert not both.exists("c/x")
