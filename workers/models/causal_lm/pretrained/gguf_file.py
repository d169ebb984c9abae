"""GGUF files, read tensor by tensor with transformers' own tables of names and layouts."""

from __future__ import annotations

import importlib
import json
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from cache_store.errors import first_line
from workers.data.text.gguf_reading import quicken
from workers.models.causal_lm.errors import refuse, require

# gguf decodes; accelerate is what transformers asks for when a user loads such a file with it.
_PACKAGES = ("gguf", "accelerate")
#: What the libraries raise at files that are none, or that are cut short.
_UNREADABLE = (ValueError, OSError, KeyError, IndexError, TypeError, NotImplementedError, struct.error)


def gguf_config(path: Path) -> dict[str, Any]:
    """The architecture a GGUF file describes, as in a config.json. ConfigError when it cannot be read."""
    _prepare()
    return cast("dict[str, Any]", json.loads(_config(str(path), path.stat().st_mtime_ns)))


def _prepare() -> None:
    for package in _PACKAGES:
        require(package, "loading GGUF files", "model.gguf")
    quicken()


@lru_cache(maxsize=4)
def _config(path: str, _changed: int) -> str:
    # Cached: parsing the vocabulary inside takes seconds.
    try:
        config = AutoConfig.from_pretrained(str(Path(path).parent), gguf_file=Path(path).name)
    except (*_UNREADABLE, ImportError) as e:
        raise refuse(f"{path} is no GGUF file that transformers can read: {first_line(e)}", "model.gguf") from e
    values = json.loads(config.to_json_string(use_diff=False))
    values.pop("quantization_config", None)
    return json.dumps(values)


class _Flat:
    """A model without children: transformers' name map would build its whole table again for every module."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config
        self.state_dict = model.state_dict

    def named_children(self) -> list[Any]:
        return []


class GGUFTensors:
    """The tensors of a GGUF file under transformers' names, dequantized one at a time to float32."""

    def __init__(self, path: Path, model: PreTrainedModel) -> None:
        """`model`: the skeleton the names are those of."""
        _prepare()
        from gguf import GGUFReader

        # Without annotations.
        library: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")

        self._path = path
        try:
            reader = GGUFReader(path)
            architecture = library.read_field(reader, "general.architecture")[0]
            processor = library.TENSOR_PROCESSORS.get(architecture, library.TensorProcessor)
            self._processor: Any = processor(config=model.config.to_dict())
            mapping = library.get_gguf_hf_weights_map(_Flat(model), self._processor)
        except _UNREADABLE as e:
            raise refuse(f"{path} is no readable GGUF file: {first_line(e)}", "model.gguf") from e
        # The reader maps the file: nothing is read before it is asked for.
        self._tensors = {mapping[t.name]: t for t in reader.tensors if t.name in mapping}

    def names(self) -> list[str]:
        return list(self._tensors)

    def file(self, name: str) -> Path:
        return self._path

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str) -> Tensor:
        from gguf import dequantize

        tensor = self._tensors[name]
        weights = self._processor.process(
            weights=dequantize(tensor.data, tensor.tensor_type), name=tensor.name, parsed_parameters={}
        ).weights
        return torch.from_numpy(weights.copy())
