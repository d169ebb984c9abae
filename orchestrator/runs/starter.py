"""Write a first configuration for a model, data and a card, with words to its settings: `segprop init`.

It is checked as a run would be, by planning, before it is written.
"""

from __future__ import annotations

import importlib
import json
import shlex
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cache_store.errors import CorruptRecord, DataError, UserError
from cache_store.records.record_io import read_local
from cache_store.storage.durable import write_atomically
from cache_store.suggest import did_you_mean
from workers.data.text.labelled.rows import labelled_columns
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
#: Family -> the module of its library that knows networks for images by their names.
LIBRARIES = {"torchvision": "torchvision.models", "timm": "timm"}
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
    name, kind = data_called(wanted.data)
    family = family_called(wanted.model, name, kind)
    name = _AS.get((name, family), name)
    reads = planning_of_family(family).raw
    if reads != kind:
        raise UserError(
            f"--model {wanted.model}: {'a language model' if reads == 'text' else 'a network for images'}, and "
            f"--data {wanted.data} is {'text' if kind == 'text' else 'images'}; allowed: both of one kind"
        )
    lines = ["# Written by `segprop init`; docs/configuration.md has every key.", "#"]
    data = _text_data(name, wanted.data) if kind == "text" else _image_data(name, wanted.data)
    lines += _WRITERS.get(family, _images)(wanted, family, data)
    return "\n".join(lines) + "\n"


def family_called(model: str, data: str = "", kind: str = "text") -> str:
    """Return the family of a model: by the name that torchvision or timm has for it, else by the folder or the hub's id
    and what it is to learn (`data.name`, and whether that is images or text)."""
    for family, row in FAMILIES.items():
        if model in _names(row.spec):
            return family
    if Path(model).exists() or "/" in model:
        return _FOLDERS[kind](Path(model), data)
    known = [name for row in FAMILIES.values() for name in _names(row.spec)]
    for library, module in LIBRARIES.items():
        found = _listed(module)
        if model in found:
            return library
        known += found
    raise UserError(
        f"--model: {model} is neither a name that torchvision or timm has for a network nor a folder or id of a model "
        f"such as HuggingFaceTB/SmolLM2-135M-Instruct{did_you_mean(model, known)}; names: resnet18, vgg11, vit_b_16, "
        "swin_t, convnext_tiny, … (docs/libraries.md)"
    )


def _reader(folder: Path, data: str) -> str:
    """Return the family of a text model: what its config.json says that it was, else what the data are for."""
    try:
        config = read_local(folder / "config.json")
    except CorruptRecord:
        config = None  # whoever loads it says what is wrong
    stated = config.get("architectures") if isinstance(config, dict) else None
    if isinstance(stated, list) and stated and all(isinstance(name, str) for name in stated):
        return "causal_lm" if any("CausalLM" in name or "LMHead" in name for name in stated) else "hf_text"
    return "hf_text" if data == "labelled" else "causal_lm"


#: Kind of data -> the family of a model that is given by its folder.
_FOLDERS: Mapping[str, Callable[[Path, str], str]] = {"images": lambda folder, data: "hf_image", "text": _reader}
#: What else a kind of data is to a family: labelled rows are prose to a language model.
_AS = {("labelled", "causal_lm"): "text"}


def _listed(module: str) -> list[str]:
    """Return all names a library has for networks; none where it is not installed."""
    try:
        found = importlib.import_module(module)
    except ImportError:
        return []
    return [str(name) for name in found.list_models()]


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
    names = set() if rows is None else _columns(rows)
    if any(needed <= names for needed in _CHAT_COLUMNS):
        return "chat", "text"
    return ("labelled" if _is_labelled(sorted(names)) else "text"), "text"


def _is_labelled(names: Sequence[str]) -> bool:
    try:
        labelled_columns("", names, {})
    except DataError:
        return False
    return True


def _columns(path: Path) -> set[str]:
    """Return the names of the columns of rows, as far as they can be told."""
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            with path.open(encoding="utf-8-sig") as file:
                head = file.readline().split("\t" if suffix == ".tsv" else ",")
            return {name.strip().strip('"') for name in head}
        if suffix in (".jsonl", ".ndjson"):
            with path.open(encoding="utf-8-sig") as file:
                return set(json.loads(file.readline()))
        if suffix == ".parquet":
            import pyarrow.parquet as parquet

            return set(parquet.read_schema(path).names)
    except (OSError, ValueError, TypeError):
        pass  # whoever reads it says what is wrong
    return set()


def _image_data(name: str, data: str) -> dict[str, Any]:
    if name == "digits":
        return {"name": name, "image_size": 16, "augment": "light", "flip": False}
    if name == "folder":
        return {"name": name, "path": data, "image_size": 224, "augment": "paper"}
    return {"name": name, "path": f"data/{name}", "download": True, "image_size": 32, "augment": "light"}


def _text_data(name: str, data: str) -> dict[str, Any]:
    where = {} if name in NAMED and name == "stdlib" else {"path": data if name not in NAMED else f"data/{name}"}
    return {"name": name, **where, "sequence_length": 128 if name == "labelled" else 512}


def _images(wanted: Wanted, family: str, data: Mapping[str, Any]) -> list[str]:
    small = int(data["image_size"]) <= 64
    called = "name" if "name" in typing.get_type_hints(FAMILIES[family].spec) else "path"
    model: dict[str, Any] = {**({} if family == DEFAULT else {"family": family}), called: wanted.model}
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


def _text(wanted: Wanted, family: str, data: Mapping[str, Any]) -> list[str]:
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
        *_block("model", {"family": family, "path": wanted.model}),
        "# What it learns. `segprop data show` prints the first samples as training sees them.",
        *_block("data", data),
        "# Every stage trains like this. `micro_batch`: samples at one time, the batch being the same.",
        *_block("training", training),
        *_rest(wanted),
    ]


def _labelled(wanted: Wanted, family: str, data: Mapping[str, Any]) -> list[str]:
    training = {
        "epochs": 3,
        "batch_size": 32,
        "optimizer": {"lr": 2e-5, "weight_decay": 0.01},
        "schedule": {"name": "linear", "warmup": 0.1},
        "clip": 1.0,
        "precision": "auto",
    }
    return [
        "# A folder or id of an encoder of the Hugging Face hub; its classifier starts anew where classes are others.",
        *_block("model", {"family": family, "path": wanted.model}),
        "# What it learns; `columns: {text: …, pair: …, label: …}` where they have other names than the usual.",
        *_block("data", data),
        "# What lies between a segment and the head of a pretrained network stays in the path, untrained.",
        *_block("split", {"base": 1, "head": 0, "intermediate": "frozen"}),
        "# Every stage trains like this; a regime or stage may say otherwise below `regimes`.",
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


#: Family -> what writes its configuration; all others are for images.
_WRITERS = {"causal_lm": _text, "hf_text": _labelled}
#: Beside a configuration, for editors.
SCHEMA_FILE = "segprop.schema.json"


def next_steps(path: Path) -> list[str]:
    """Say what to do with a configuration that was written."""
    name = shlex.quote(str(path))
    return [f"segprop plan {name}", f"segprop run {name}"]
