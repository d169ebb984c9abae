"""What the project has one of: its table of dtypes, its way to replace a local file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from cache_store.formats.dtypes import ITEM_BYTES, STORED
from cache_store.formats.torch_dtypes import BITS, TORCH
from workers.device import DTYPES as COMPUTED_DTYPES
from workers.specs.experiment import COMPUTED

ROOT = Path(__file__).parents[3]
NAMES = {"float32", "bfloat16", "float16"}


def sources() -> Iterator[tuple[str, ast.AST]]:
    for package in ("cache_store", "workers", "orchestrator"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def test_dtypes_are_in_one_table() -> None:
    found = {
        file
        for file, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        and len(NAMES & {part.value for part in (*node.keys, *node.values) if isinstance(part, ast.Constant)}) > 1
    }
    assert found == {"cache_store/formats/dtypes.py", "workers/specs/experiment.py"}


def test_dtypes_are_those_of_torch_and_as_wide() -> None:
    assert {name: kind.itemsize for name, kind in TORCH.items()} == ITEM_BYTES
    assert all(stand_in.itemsize == kind.itemsize for kind, stand_in in BITS.items())
    for name, kept in STORED.items():
        stored = BITS.get(TORCH[name], TORCH[name])
        assert torch.zeros(1, dtype=stored).numpy().dtype == np.dtype(kept)
    assert {precision: TORCH[name] for precision, name in COMPUTED.items()} == COMPUTED_DTYPES


def test_local_files_are_replaced_in_one_place() -> None:
    """Beside the store's own: what it does under a lock or to whole folders is not a file that is replaced."""
    found = {
        file
        for file, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "os.replace"
    }
    folders = {"orchestrator/trackers/tensorboard.py", "workers/models/causal_lm/pretrained/export.py"}
    assert found - folders == {"cache_store/storage/durable.py", "cache_store/storage/local.py"}
