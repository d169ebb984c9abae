"""Liger's fused linear cross-entropy (Triton), where CUDA is at hand and the package is installed."""

from __future__ import annotations

import inspect
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor

from workers.models.causal_lm.link import Link


def applies(hidden: Tensor, link: Link) -> bool:
    """Whether Liger can compute this loss: on CUDA, no scaled logits, and hidden states that want a gradient (without
    one it gives the weight none either)."""
    if not (hidden.is_cuda and hidden.requires_grad and torch.is_grad_enabled()) or link.scale != 1.0:
        return False
    return bool(_arguments()) and (link.cap is None or "softcap" in _arguments())


@lru_cache(maxsize=1)
def _arguments() -> frozenset[str]:
    """What the installed version can be told; empty without the package."""
    if find_spec("liger_kernel") is None:
        return frozenset()
    return frozenset(inspect.signature(_loss_class()).parameters)


def _loss_class() -> Any:
    from importlib import import_module

    return import_module("liger_kernel.transformers.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyLoss


def liger_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, link: Link, smoothing: float
) -> Tensor:
    """As `linear_cross_entropy`, by Liger's kernel; the weight's gradient is summed in float32 where it can be told."""
    wanted = {"label_smoothing": smoothing, "softcap": link.cap, "accum_dtype": torch.float32, "reduction": "mean"}
    loss = _loss_class()(**{key: value for key, value in wanted.items() if key in _arguments()})
    given = hidden if link.before == 1.0 else hidden * link.before
    return cast("Tensor", loss(weight, given, targets, bias)).float()
