"""Frozen decoder layers in 8 or 4 bits on the device (bitsandbytes).

Only what a stage holds is rounded: commits, snapshots and a recomputed prefix keep the weights as they are.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from workers.models.causal_lm.locate import require
from workers.models.causal_lm.parts import Layer

#: Weights that share a scale in nf4.
_BLOCK = 64
#: Inputs beyond this stay in 16 bits (LLM.int8()): hidden states have outliers that would take all of a row's steps.
_OUTLIERS = 6.0


@torch.no_grad()
def quantize(part: nn.Module, mode: Literal["int8", "nf4"], dtype: torch.dtype) -> nn.Module:
    """Replace a decoder layer's linear layers by bitsandbytes' of `mode`; changes and returns the part.

    Products are computed in `dtype` (nf4) or in integers (int8), results have the type of what came in. Gradients
    flow to inputs, never to weights. Norms keep their type, and so do experts that are no linear layers; embeddings
    and heads are left as they are; on a CPU, nf4 also leaves matrices whose rows are no multiple of 64. Matrices are
    replaced one by one, so no more than one is held twice. ConfigError when bitsandbytes is missing.
    """
    if not isinstance(part, Layer):
        return part
    require("bitsandbytes", mode, "training.frozen_weights")
    # It warns at every product that inputs are cast, which is what it was asked for.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for name, module in list(part.named_modules()):
        matrix = _matrix(module)
        if matrix is not None and not (mode == "nf4" and _misread(matrix)):
            packed: Any = _int8(matrix) if mode == "int8" else _nf4(matrix, dtype)
            bias = cast("Tensor | None", module.bias)
            packed.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
            part.set_submodule(name, packed.train(module.training))
    return part


def _matrix(module: nn.Module) -> Tensor | None:
    """The weight of a plain linear layer as (out, in); subclasses may compute something else."""
    if type(module) is nn.Linear:
        return module.weight.detach()
    if type(module).__name__ == "Conv1D":  # GPT-2: the other way round
        return module.weight.detach().t().contiguous()  # type: ignore[operator]
    return None


def _misread(matrix: Tensor) -> bool:
    """bitsandbytes' CPU kernels silently give wrong numbers where a block of nf4 spans two rows (seen in 0.50.2)."""
    return matrix.device.type == "cpu" and matrix.shape[1] % _BLOCK != 0


def _int8(matrix: Tensor) -> nn.Module:
    bnb = _bitsandbytes()
    rows, columns = matrix.shape
    layer = bnb.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=_OUTLIERS, device="meta")
    # Rounded on the way to the device, which only happens to matrices that come from the host.
    layer.weight = bnb.Int8Params(matrix.cpu(), requires_grad=False).to(matrix.device)
    _count(layer, layer.weight.SCB)
    return layer  # type: ignore[no-any-return]


def _nf4(matrix: Tensor, dtype: torch.dtype) -> nn.Module:
    bnb = _bitsandbytes()
    rows, columns = matrix.shape
    settings: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
    blocks: Any = {"blocksize": _BLOCK}
    layer = bnb.Linear4bit(columns, rows, bias=False, compute_dtype=dtype, device="meta", **settings)
    layer.weight = bnb.Params4bit(matrix, requires_grad=False, module=layer, **blocks, **settings).to(matrix.device)
    # On some CPUs the first pass without gradients would repack the matrix into a form that has no backward pass.
    layer.support_avx512bf16_for_cpu = False
    _count(layer, layer.weight.quant_state.absmax)
    return layer  # type: ignore[no-any-return]


def _bitsandbytes() -> Any:
    """Its layers, untyped: it is an extra, and half annotated."""
    return importlib.import_module("bitsandbytes.nn")


def _count(layer: nn.Module, scales: Tensor) -> None:
    """Let the scales be seen by whoever adds up a module's bytes; bitsandbytes hides them."""
    layer.register_buffer("scales", scales, persistent=False)
