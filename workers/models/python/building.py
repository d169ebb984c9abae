"""Build a user's network: the same weights from the same seed, and nothing in it that training could not keep."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cache_store.errors import ConfigError
from workers import user_code
from workers.specs.experiment import PythonSpec

WHERE = "model.build"


def build(model: PythonSpec, seed: int) -> nn.Module:
    """Call the function that `model.build` names, under this seed; the global generators are left as they were.

    ConfigError when it fails, gives something else than a module, or its source is not that of the plan.
    """
    code = user_code.find(model.build, model.path, WHERE)
    if model.code is not None and model.code != code.digest:
        raise user_code.other_source(WHERE, model.code, code)
    with seeded(seed):
        network = user_code.call(code, model.args, WHERE)
    if not isinstance(network, nn.Module):
        raise refuse(
            f"{model.build} returned a {type(network).__name__}; allowed: a segprop.Chain, or any torch.nn.Module"
        )
    _check(network)
    return network


class Refused(ConfigError):  # noqa: N818  named as the other errors are
    """A network that cannot be trained in segments. `problem`: why."""

    @property
    def problem(self) -> str:
        return str(self.details["problem"])


def refuse(problem: str, advice: str = "") -> Refused:
    """Return an error about what `model.build` gives. `advice`: what the author of a network of their own can do."""
    message = f"{problem}; {advice}" if advice else problem
    return Refused(f"{WHERE}: {message}", where=WHERE, problem=problem)


def builds_alike(network: nn.Module, again: nn.Module) -> None:
    """Check that two builds under one seed gave the same network. ConfigError naming the first difference."""
    first, second = _tensors(network), _tensors(again)
    for name in sorted(first.keys() ^ second.keys()):
        raise refuse(f"gives another network each time it is called: {name} is in one of two")
    kept = network.state_dict().keys()
    for name, tensor in first.items():
        if tensor.shape != second[name].shape:
            shapes = f"{tuple(tensor.shape)} and {tuple(second[name].shape)}"
            raise refuse(f"gives another network each time it is called: {name} is once {shapes}")
        if not torch.equal(tensor.nan_to_num(), second[name].nan_to_num()):
            what = "draws it" if name in kept else "draws it, and it is not stored (persistent=False)"
            raise refuse(
                f"{name} differs between two calls under one seed: something else than torch, numpy or random {what}"
            )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch (CPU), numpy and random, and leave them as they were afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % (1 << 32))
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _check(network: nn.Module) -> None:
    problems = list(_problems(network))
    if problems:
        raise refuse("; ".join(problems))


def _problems(network: nn.Module) -> Iterator[str]:
    """Name what training could not update, store or load."""
    for name, tensor in _tensors(network).items():
        if is_lazy(tensor):
            yield f"{name} has no shape yet (a lazy module); give its size"
        elif tensor.device.type != "cpu":
            yield f"{name} is on {tensor.device}; build it on the CPU, it is moved when it trains"
        elif tensor.is_floating_point() and tensor.dtype != torch.float32 and isinstance(tensor, nn.Parameter):
            yield f"{name} is {str(tensor.dtype).removeprefix('torch.')}; allowed: float32 (see training.precision)"
    for name, module in network.named_modules():
        for attribute in _hidden(module):
            place = f"{name}.{attribute}".lstrip(".")
            yield f"{place} is a tensor outside parameters and buffers: use register_buffer, or it is not stored"


def _hidden(module: nn.Module) -> Iterator[str]:
    """Names of plain attributes that hold tensors."""
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        held: tuple[Any, ...] = (value,)
        if isinstance(value, list | tuple):
            held = tuple(value)
        elif isinstance(value, dict):
            held = tuple(value.values())
        if any(isinstance(item, Tensor) for item in held):
            yield name


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}
