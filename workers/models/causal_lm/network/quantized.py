"""Frozen matrices of decoder layers in 8 or 4 bits on the device (bitsandbytes).

Only what a stage holds is rounded: commits, snapshots and a recomputed prefix keep the weights as they are. The one
exception is QLoRA: a layer that trains low-rank adapters over rounded matrices is committed as it was trained, so
what `dequantized` gives is what the adapters are added to.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from workers.models.causal_lm.errors import require
from workers.models.causal_lm.network.parts import Layer

#: Weights that share a scale in nf4.
_BLOCK = 64
#: Inputs beyond this stay in 16 bits (LLM.int8()): hidden states have outliers that would take all of a row's steps.
_OUTLIERS = 6.0


@torch.no_grad()
def quantize(part: nn.Module, mode: Literal["int8", "nf4"], dtype: torch.dtype) -> nn.Module:
    """Replace a decoder layer's linear layers by bitsandbytes' of `mode`; changes and returns the part.

    Low-rank adapters, where there are to be any, are put on afterwards (`lora.add_lora`).

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
            packed.stored = _Stored(module.weight.dtype, transposed=type(module) is not nn.Linear)
            part.set_submodule(name, packed.train(module.training))
    return part


@dataclass(frozen=True)
class _Stored:
    """How a rounded matrix was held before, and is committed: (out, in), or the other way round."""

    dtype: torch.dtype
    transposed: bool


def is_quantized(module: nn.Module) -> bool:
    """Whether this is a linear layer that `quantize` made."""
    return isinstance(getattr(module, "stored", None), _Stored)


def is_transposed(module: nn.Module) -> bool:
    """Whether `quantize` made this layer of one that held its matrix the other way round."""
    stored = getattr(module, "stored", None)
    return isinstance(stored, _Stored) and stored.transposed


@torch.no_grad()
def dequantized(module: nn.Module) -> Tensor:
    """The matrix that a layer of `quantize` multiplies with, in the type and layout it had before."""
    stored = cast("_Stored", module.stored)
    packed: Any = module.weight
    if hasattr(packed, "quant_state"):
        functional: Any = importlib.import_module("bitsandbytes.functional")
        matrix = functional.dequantize_4bit(packed.data, packed.quant_state)
    else:
        matrix = packed.data.float() * (cast("Tensor", module.scales) / 127)[:, None]
    matrix = matrix.t() if stored.transposed else matrix
    return cast("Tensor", matrix.to(stored.dtype).contiguous())


def _matrix(module: nn.Module) -> Tensor | None:
    """The weight of a plain linear layer as (out, in); subclasses may compute something else."""
    if type(module) is nn.Linear:
        return module.weight.detach()
    if type(module).__name__ == "Conv1D":  # GPT-2: the other way round
        return cast("Tensor", module.weight).detach().t().contiguous()
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
    return cast("nn.Module", layer)


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
    return cast("nn.Module", layer)


def _bitsandbytes() -> Any:
    """Its layers, untyped: it is an extra, and half annotated."""
    return importlib.import_module("bitsandbytes.nn")


def _count(layer: nn.Module, scales: Tensor) -> None:
    """Let the scales be seen by whoever adds up a module's bytes; bitsandbytes hides them."""
    layer.register_buffer("scales", scales, persistent=False)
