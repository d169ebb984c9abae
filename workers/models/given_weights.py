"""Start from somebody's weights: read a torchvision state dict and fit it to the network that is wanted."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from cache_store.errors import ConfigError, first_line

_SHOWN = 8


def read_state(path: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth/.pt file of tensors only. Nothing else is unpickled.

    ConfigError when the file is missing, of another kind, damaged or holds anything but a state dict.
    """
    file = Path(path)
    if not file.is_file():
        raise weights_error(f"{path} does not exist or is not a file", path)
    if file.suffix not in (".safetensors", ".pth", ".pt"):
        raise weights_error(f"{path} is neither .safetensors nor .pth/.pt", path)
    try:
        content = _read(file)
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        pickle.UnpicklingError,
        safetensors.SafetensorError,
    ) as e:
        raise weights_error(f"{path} cannot be read: {first_line(e)}", path) from e
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise weights_error(f"{path} is not a state dict (names to tensors)", path)
    return dict(content)


def _read(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return load_file(file, device="cpu")
    return torch.serialization.load(file, map_location="cpu", weights_only=True)


def merge(
    state: dict[str, Tensor], given: Mapping[str, Tensor], path: str, as_it_is: Sequence[str]
) -> dict[str, Tensor]:
    """`state` with the tensors of `given`, in `state`'s dtypes; what begins with one of `as_it_is` is not taken.

    `num_batches_tracked` may be absent (torchvision's older files). ConfigError names every other difference.
    """

    def wanted(name: str) -> bool:
        return not name.startswith(tuple(as_it_is))

    problems = [
        *(f"unexpected {name}" for name in given if wanted(name) and name not in state),
        *(_difference(name, tensor, given) for name, tensor in state.items() if wanted(name)),
    ]
    problems = [problem for problem in problems if problem]
    if problems:
        more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise weights_error(f"{path} does not fit the model: {', '.join(problems[:_SHOWN])}{more}", path)
    return {
        name: given[name].to(tensor.dtype).clone() if name in given and wanted(name) else tensor
        for name, tensor in state.items()
    }


def other_shapes(state: Mapping[str, Tensor], given: Mapping[str, Tensor], prefix: str) -> bool:
    """Tell whether the tensors whose names begin so are others, or of other shapes."""

    def shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in tensors.items() if name.startswith(prefix)}

    return shapes(state) != shapes(given)


def weights_error(message: str, path: str) -> ConfigError:
    """Return a ConfigError about the file that `model.weights` names."""
    return ConfigError(f"model.weights: {message}", where="model.weights", value=path)


def _difference(name: str, tensor: Tensor, given: Mapping[str, Tensor]) -> str:
    if name not in given:
        return "" if name.endswith("num_batches_tracked") else f"missing {name}"
    if given[name].shape != tensor.shape:
        return f"{name} is {tuple(given[name].shape)}, not {tuple(tensor.shape)}"
    return ""
