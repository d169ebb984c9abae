"""Write a trained image network as an ordinary folder: weights, a file that rebuilds it with torchvision, facts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_store.storage.durable import write_atomically
from workers import tensor_files
from workers.models.base import Export

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def write_folder(export: Export, model: DataclassInstance, name: str, loading: str, target: Path) -> None:
    """Write `model.safetensors`, `load_model.py` and, last, `model.json` into `target`. Equal weights of the same nodes
    give the same bytes. `loading`: Python source with a function `load()` that returns the network."""
    state = {name: tensor for _, part in export.states for name, tensor in part.items()}
    facts: dict[str, Any] = {
        "model": asdict(model),
        "classes": export.classes,
        "class_names": list(export.data.get("class_names", ())),
        "preprocessing": dict(export.data.get("preprocessing", {})),
        "sources": dict(export.sources),
    }
    tensor_files.write(target / "model.safetensors", state, {"format": "pt", "model": name})
    write_atomically(target / "load_model.py", loading.encode())
    write_atomically(target / "model.json", (json.dumps(facts, indent=2) + "\n").encode())
