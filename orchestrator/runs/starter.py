"""Write a first configuration for a model, data and a card, with words to its settings: `segprop init`.

It is checked as a run would be, by planning, before it is written.
"""

from __future__ import annotations

import json
import shlex
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cache_store.errors import UserError
from cache_store.storage.durable import write_atomically
from cache_store.suggest import did_you_mean
from workers.domains.registry import planning_of_family
from workers.models.registry import DEFAULT, FAMILIES

#: Data that are named rather than found under a path, and the kind of model that they are for.
NAMED = {
    "digits": "images",
    "cifar10": "images",
    "cifar100": "images",
    "stdlib": "text",
    "mmlu": "text",
    "winogrande": "text",
}
#: Columns of rows that are conversations.
_CHAT_COLUMNS = ({"messages"}, {"conversations"}, {"instruction", "output"}, {"prompt", "completion"})
_ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")


@dataclass(frozen=True)
class Wanted:
    """What a configuration is asked for. `device`: a card by name; None: what is found."""

    model: str
    data: str
    regimes: tuple[str, ...] = ("e2e", "segprop")
    device: str | None = None


def configuration(wanted: Wanted) -> str:
    """Return a configuration as YAML with comments. UserError where the model does not suit the data."""
    family = family_called(wanted.model)
    name, kind = data_called(wanted.data)
    reads = planning_of_family(family).raw
    if reads != kind:
        raise UserError(
            f"--model {wanted.model}: {'a language model' if reads == 'text' else 'a network for images'}, and "
            f"--data {wanted.data} is {'text' if kind == 'text' else 'images'}; allowed: both of one kind"
        )
    lines = ["# Written by `segprop init`; docs/configuration.md has every key.", "#"]
    data = _text_data(name, wanted.data) if kind == "text" else _image_data(name, wanted.data)
    lines += [*_text(wanted, data)] if kind == "text" else [*_images(wanted, family, data)]
    return "\n".join(lines) + "\n"


def family_called(model: str) -> str:
    """Return the family of a model: by torchvision's name, else a language model by folder or the hub's id."""
    for family, row in FAMILIES.items():
        if model in _names(row.spec):
            return family
    if Path(model).exists() or "/" in model:
        return "causal_lm"
    known = [name for row in FAMILIES.values() for name in _names(row.spec)]
    raise UserError(
        f"--model: {model} is neither torchvision's name of a network nor a folder or id of a language model such as "
        f"HuggingFaceTB/SmolLM2-135M-Instruct{did_you_mean(model, known)}; names: {', '.join(known)}"
    )


def _names(spec: Any) -> tuple[str, ...]:
    """Return the names that a family's `model.name` allows; none where models have none."""
    hint = typing.get_type_hints(spec).get("name")
    options = typing.get_args(hint)
    return tuple(str(name) for name in options if isinstance(name, str))


def data_called(data: str) -> tuple[str, str]:
    """Return `data.name` and whether it is images or text, by name or by what lies there. UserError for neither."""
    if data in NAMED:
        return data, NAMED[data]
    path = Path(data)
    if not path.exists():
        raise UserError(
            f"--data: {data}: no such file or folder{did_you_mean(data, NAMED)}; allowed: one, or {', '.join(NAMED)}"
        )
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*"))[:2000] if file.is_file()]
    if any(file.suffix.lower() in _IMAGES for file in files):
        return "folder", "images"
    rows = next((file for file in files if file.suffix.lower() in _ROWS), None)
    return ("chat" if rows is not None and _columns(rows) else "text"), "text"


def _columns(path: Path) -> bool:
    """Tell whether rows look like conversations."""
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            with path.open(encoding="utf-8-sig") as file:
                names = {name.strip().strip('"') for name in file.readline().split("\t" if suffix == ".tsv" else ",")}
        elif suffix in (".jsonl", ".ndjson"):
            with path.open(encoding="utf-8-sig") as file:
                names = set(json.loads(file.readline()))
        elif suffix == ".parquet":
            import pyarrow.parquet as parquet

            names = set(parquet.read_schema(path).names)
        else:
            return False
    except (OSError, ValueError, TypeError):
        return False  # whoever reads it says what is wrong
    return any(needed <= names for needed in _CHAT_COLUMNS)


def _image_data(name: str, data: str) -> dict[str, Any]:
    if name == "digits":
        return {"name": name, "image_size": 16, "augment": "light", "flip": False}
    if name == "folder":
        return {"name": name, "path": data, "image_size": 224, "augment": "paper"}
    return {"name": name, "path": f"data/{name}", "download": True, "image_size": 32, "augment": "light"}


def _text_data(name: str, data: str) -> dict[str, Any]:
    where = {} if name in NAMED and name == "stdlib" else {"path": data if name not in NAMED else f"data/{name}"}
    return {"name": name, **where, "sequence_length": 512}


def _images(wanted: Wanted, family: str, data: Mapping[str, Any]) -> list[str]:
    small = int(data["image_size"]) <= 64
    model: dict[str, Any] = {**({} if family == DEFAULT else {"family": family}), "name": wanted.model}
    if small and "stem" in typing.get_type_hints(FAMILIES[family].spec):
        model["stem"] = "small"
    return [
        "# What is trained. `weights` continues from a file; `stem: small` is for images of 64 pixels or less.",
        *_block("model", model),
        "# What it is trained on. `segprop plan` says how many images there are, and how they are split.",
        *_block("data", data),
        "# Every stage of every regime trains like this; a regime or stage may say otherwise below `regimes`.",
        *_block(
            "training",
            {
                "epochs": 10,
                "batch_size": 64,
                "optimizer": {"lr": 1e-3},
                "schedule": {"name": "cosine", "warmup": 0.1},
                "precision": "auto",
            },
        ),
        *_rest(wanted),
    ]


def _text(wanted: Wanted, data: Mapping[str, Any]) -> list[str]:
    training = {
        "epochs": 1,
        "batch_size": 16,
        "micro_batch": 1 if wanted.device is None else "auto",
        "optimizer": {"lr": 2e-5},
        "schedule": {"name": "linear", "warmup": 0.03},
        "clip": 1.0,
        "precision": "auto",
        "commit": "last",
    }
    return [
        "# A folder or id of any decoder of the Hugging Face hub; pin an id with `revision`.",
        *_block("model", {"family": "causal_lm", "path": wanted.model}),
        "# What it learns. `segprop data show` prints the first samples as training sees them.",
        *_block("data", data),
        "# Every stage trains like this. `micro_batch`: samples at one time, the batch being the same.",
        *_block("training", training),
        *_rest(wanted),
    ]


def _rest(wanted: Wanted) -> list[str]:
    resources = {} if wanted.device is None else {"device": "cuda"}
    return [
        "# What is compared: end-to-end (e2e), segment by segment (segprop), with local classifiers (lw).",
        f"regimes: [{', '.join(wanted.regimes)}]",
        *(_block("resources", resources) if resources else []),
    ]


def _block(name: str, settings: Mapping[str, Any]) -> list[str]:
    return (
        yaml.safe_dump({name: dict(settings)}, sort_keys=False, default_flow_style=None, width=110)
        .rstrip()
        .splitlines()
    )


def write(path: Path, text: str, schema: bytes) -> None:
    """Write the configuration and, beside it, the schema by which editors complete it. UserError where there is such a
    file already."""
    if path.exists():
        raise UserError(f"{path}: is there already; name another file, or remove it")
    beside = path.parent / SCHEMA_FILE
    write_atomically(beside, schema)
    write_atomically(path, f"# yaml-language-server: $schema={SCHEMA_FILE}\n{text}".encode())


#: Beside a configuration, for editors.
SCHEMA_FILE = "segprop.schema.json"


def next_steps(path: Path) -> list[str]:
    """Say what to do with a configuration that was written."""
    name = shlex.quote(str(path))
    return [f"segprop plan {name}", f"segprop run {name}"]
