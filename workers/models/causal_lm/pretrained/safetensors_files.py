"""The safetensors files of a checkpoint, single or sharded, read tensor by tensor. Nothing is ever unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cache_store.errors import first_line
from cache_store.storage.durable import read_json
from workers.models.causal_lm.errors import refuse
from workers.models.causal_lm.pretrained.locate import INDEX, PICKLES

SINGLE = "model.safetensors"
#: An index has a line of some 100 bytes for each tensor.
_MOST_INDEX_BYTES = 256 << 20


class SafetensorsFiles:
    """Names to tensors over all files. Files are mapped, not read, until a tensor is asked for."""

    def __init__(self, folder: Path) -> None:
        """Open every file's header. ConfigError when there are none, one is missing, truncated or damaged."""
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path in _files(folder):
            for name in self._handle(path).keys():  # noqa: SIM118  no mapping
                self._files[name] = path
        self._promised(folder)

    def _promised(self, folder: Path) -> None:
        """What the index promises must be where it says."""
        for name, file in _index(folder).items():
            if self._files.get(name) != folder / file:
                raise refuse(f"{folder / file} lacks the tensor {name!r}, which {INDEX} places there", "model.path")

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as e:
                raise refuse(
                    f"{path} is missing, truncated or no safetensors file: {first_line(e)}", "model.path"
                ) from e
        return self._open[path]

    def names(self) -> list[str]:
        return list(self._files)

    def file(self, name: str) -> Path:
        return self._files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle(self._files[name]).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """One tensor. It may be a view of the mapped file: copy before writing."""
        path = self._files[name]
        try:
            tensor: Tensor = self._handle(path).get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise refuse(f"{path} is damaged: {first_line(e)}", "model.path") from e
        return tensor


def weight_files(folder: Path) -> list[Path]:
    """All weight files of a folder that could be loaded, in order; empty when there are none.

    Of a single file and an index beside it the single file counts, as in transformers: the index is left of an older,
    sharded save.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    return [folder / name for name in sorted(set(_index(folder).values()))]


def index_file(folder: Path) -> Path | None:
    """The index of the folder's shards; None where a single file counts, or there are none."""
    path = folder / INDEX
    return path if path.is_file() and not (folder / SINGLE).is_file() else None


def _files(folder: Path) -> list[Path]:
    found = weight_files(folder)
    for path in found:
        if not path.is_file():
            raise refuse(f"{path} is missing, although {INDEX} names it", "model.path", value=str(path))
    if found:
        return found
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise refuse(
            f"{folder} has weights only as {pickles[0]}, which is pickle and is never loaded here; convert it, e.g. "
            "with transformers' save_pretrained, which writes safetensors",
            "model.path",
            value=pickles[0],
        )
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    hint = f"; for {ggufs[0]} set model.gguf" if ggufs else ""
    raise refuse(f"{folder} has neither model.safetensors nor {INDEX}{hint}", "model.path", value=str(folder))


def _index(folder: Path) -> dict[str, str]:
    path = index_file(folder)
    if path is None:
        return {}
    try:
        content = read_json(path, _MOST_INDEX_BYTES)["weight_map"]
        names = {str(name): str(file) for name, file in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise refuse(f"{path} is no index of safetensors: {first_line(e)}", "model.path") from e
    for file in set(names.values()):
        if Path(file).name != file:
            raise refuse(f"{path} names a file outside its folder: {file!r}", "model.path", value=file)
    return names
