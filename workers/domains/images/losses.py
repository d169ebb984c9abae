"""Losses of images and of data of one's own: the functions by their names, and a function that a user wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cache_store.errors import ConfigError
from workers import user_code
from workers.specs.experiment import LossSpec

WHERE = "training.loss.build"
#: Mean loss of (B, outputs) in float32 and the targets of B samples.
Loss = Callable[[Tensor, Tensor], Tensor]

CROSS_ENTROPY = LossSpec()


def _own(spec: LossSpec) -> Loss:
    code = user_code.find(str(spec.build), spec.path, WHERE)
    if spec.code not in (None, code.digest):
        raise user_code.other_source(WHERE, str(spec.code), code)
    function, args = user_code.load(code, WHERE), spec.args or {}

    def own(output: Tensor, targets: Tensor) -> Tensor:
        try:
            loss = function(output, targets, **args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever it raises is the user's own
            raise _refused(spec, f"failed: {user_code.words_of(error)}") from error
        if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
            found = f"{loss.dtype} {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise _refused(spec, f"returned {found}; allowed: one number, the mean loss of the samples, as a tensor")
        if output.requires_grad and not loss.requires_grad:
            raise _refused(spec, "gives no gradient: what it returned does not depend on the head's outputs")
        return loss

    return own


def _refused(spec: LossSpec, problem: str) -> ConfigError:
    return ConfigError(f"{WHERE}: {spec.build} {problem}", where=WHERE)


_MADE: Mapping[str, Callable[[LossSpec], Loss]] = {
    "cross_entropy": lambda spec: F.cross_entropy,
    "multi_label": lambda spec: F.binary_cross_entropy_with_logits,
    "mse": lambda spec: F.mse_loss,
    "huber": lambda spec: partial(F.huber_loss, delta=1.0 if spec.delta is None else spec.delta),
    "python": _own,
}


def loss_of(spec: LossSpec | None) -> Loss:
    """Return the function of a loss. ConfigError where a user's own cannot be loaded, or is not that of the plan."""
    spec = spec or CROSS_ENTROPY
    return _MADE[spec.name](spec)


def try_loss(spec: LossSpec, outputs: int, targets: Any, dtype: str) -> None:
    """Call a loss once, as training will, with outputs that are drawn and the targets given (JSON values of a batch).

    ConfigError where it fails, gives no single number, or no finite gradient."""
    generator = torch.Generator().manual_seed(0)
    given = torch.tensor(targets, dtype=getattr(torch, dtype))
    output = torch.randn((len(given), outputs), generator=generator, requires_grad=True)
    loss = loss_of(spec)(output, given)
    (gradient,) = torch.autograd.grad(loss, output, allow_unused=True)
    if gradient is None or not gradient.any():
        raise _refused(spec, "gives no gradient: a small change of the head's outputs does not change it")
