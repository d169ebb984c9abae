"""Cross-entropy of a linear layer's output without its logits: in pieces of rows, gradients along the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workers.device import has_values, kind_of, pieces
from workers.models.causal_lm.network.link import Link
from workers.models.causal_lm.network.pieces import block_rows, chunk_rows, in_one_piece, loss_rows

_TRACKER = "torch.distributed._tools.mem_tracker"


def nll_sum(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Summed cross-entropy of logits (N, V), any type, as float32."""
    return F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=smoothing)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, link: Link, smoothing: float
) -> Tensor:
    """Mean cross-entropy (float32 scalar) of the logits of hidden (N, D), weight (V, D), bias (V,) or None.

    Products are computed in the autocast type where autocast is on, else in the type of the weight; logits,
    softmax, losses and the sums over pieces in float32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if _torchs_own(hidden, weight, dtype, link, smoothing):
        return _by_torch(hidden, weight, bias, targets, link)
    with torch.autocast(device, enabled=False):
        return cast("Tensor", _Chunked.apply(hidden, weight, bias, targets, link, smoothing, dtype))


def _torchs_own(hidden: Tensor, weight: Tensor, dtype: torch.dtype, link: Link, smoothing: float) -> bool:
    """Whether torch's kernel does as well: in float32 throughout. With narrower types its loss is as narrow (10.5 for
    10.93 in bfloat16), autocast does not reach it, smoothing makes it hold all logits, and it knows neither scaled nor
    capped ones."""
    if smoothing:
        return False
    whole = hidden.dtype == weight.dtype == dtype == torch.float32
    return whole and link.scale == 1.0 and link.cap is None and hasattr(F, "linear_cross_entropy")


def _by_torch(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, link: Link) -> Tensor:
    # Its own choice of pieces is far too small for a CPU: half the speed.
    rows = chunk_rows(weight.shape[0])
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    given = hidden if link.before == 1.0 else hidden * link.before
    loss = F.linear_cross_entropy(given, weight, targets, linear_bias=bias, options=options)
    if not has_values(hidden):
        # A trace sees what an operation gives, not what it takes meanwhile: a piece of logits and its gradient.
        inside = [given.new_empty(min(rows, len(given)), weight.shape[0]) for _ in range(2)]
        del inside
    return loss


class _Chunked(torch.autograd.Function):
    """Gradients are made in the forward pass, unscaled (in [-1, 1] before the products, so float16 holds them);
    the backward pass only scales them. Where the gradient of all logits takes no more than that of a bfloat16 matrix,
    it is kept instead, and the matrix's is made of it in the backward pass: one product, rounded once, without a sum
    in float32 beside it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        link: Link,
        smoothing: float,
        dtype: torch.dtype,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        matrix = weight.to(dtype)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight: Tensor | None = None
        ctx.product = None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        whole = wants_weight and _kept_whole(hidden, weight, dtype)
        step = loss_rows(weight.shape[0], dtype.itemsize, 4 * weight.numel() if wants_weight else 0)
        step = max(1, hidden.shape[0]) if whole else step
        for rows in pieces(hidden.shape[0], step):
            x = hidden[rows].to(dtype)
            if link.before != 1.0:
                x = x * link.before
            logits = F.linear(x, matrix, None if bias is None else bias.to(dtype))
            if not (wants_hidden or wants_weight or wants_bias):
                total += _loss(logits, targets[rows], link, smoothing)
                continue
            total += _to_gradient(logits, targets[rows], link, smoothing, d_bias)
            if d_hidden is not None:
                d_hidden[rows] = (logits @ matrix) * link.before
            if whole:
                ctx.product = (weight, logits, x)
            elif wants_weight:
                d_weight = _added(d_weight, logits, x)
        ctx.grads = (d_hidden, d_weight, d_bias)
        ctx.types = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.count = targets.numel()
        return total / targets.numel()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the gradients of this loss were used already; compute the loss again")
        factor = scale.float() / ctx.count
        made: list[Tensor | None] = []
        for grad, dtype in zip(ctx.grads, ctx.types, strict=True):
            made.append(None if grad is None else grad.mul_(factor.to(grad.dtype)).to(dtype))
        ctx.grads = None
        if ctx.product is not None:
            (weight, grad, x), ctx.product = ctx.product, None
            made[1] = _product(weight, grad, x, factor)
        return (*made, None, None, None, None)


def _kept_whole(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    narrow = dtype == weight.dtype == torch.bfloat16
    return narrow and in_one_piece(hidden.shape[0], weight.shape[0], weight.shape[1], dtype.itemsize)


def _product(weight: Tensor, grad: Tensor, x: Tensor, factor: Tensor) -> Tensor | None:
    """Gradient (V, D) of the weight from that of all logits, grad (N, V), times `factor`; x (N, D). None where it was
    added to what earlier micro-batches left: in the product itself, where nobody waits for gradients to arrive."""
    x = x * factor.to(x.dtype)
    left = weight.grad
    if left is None or left.dtype != x.dtype or not weight.is_leaf or _watched(weight):
        return grad.T @ x
    with torch.no_grad():
        left.addmm_(grad.T, x)
    return None


def _watched(parameter: Tensor) -> bool:
    """Whether hooks of a parameter wait for its gradient: of gangs, or of gradients that leave the device. torch's
    memory tracker only looks on: a trace takes the steps that training takes."""
    kinds = (getattr(parameter, "_post_accumulate_grad_hooks", None), parameter._backward_hooks)
    return any(hook.__module__ != _TRACKER for hooks in kinds if hooks for hook in hooks.values())


def _added(total: Tensor | None, grad: Tensor, x: Tensor) -> Tensor:
    """`total` (V, D) float32 and the weight's gradient of one piece: grad (N, V), x (N, D)."""
    if total is None:
        return (grad.T @ x).float()
    if grad.dtype == torch.float32:
        return total.addmm_(grad.T, x)
    return total.add_(grad.T @ x)


def _loss(logits: Tensor, targets: Tensor, link: Link, smoothing: float) -> Tensor:
    """Summed loss of logits (N, V), block by block."""
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for rows in _blocks(logits):
        log_p, _ = _log_softmax(logits[rows], link)
        total += _smoothed(log_p, targets[rows, None], smoothing)
    return total


def _to_gradient(logits: Tensor, targets: Tensor, link: Link, smoothing: float, d_bias: Tensor | None) -> Tensor:
    """Summed loss of logits (N, V), which become its gradient; `d_bias` (V,) float32 is added to.

    Made in float32 in blocks that stay in cache, and rounded once: no second matrix of this size is ever held.
    """
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for rows in _blocks(logits):
        log_p, slope = _log_softmax(logits[rows], link)
        column = targets[rows, None]
        total += _smoothed(log_p, column, smoothing)
        grad = log_p.exp_()
        if smoothing:
            grad -= smoothing / grad.shape[-1]
        grad.scatter_add_(1, column, grad.new_full(column.shape, smoothing - 1.0))
        if slope is not None:
            grad *= slope
        if link.scale != 1.0:
            grad *= link.scale
        if d_bias is not None:
            d_bias += grad.sum(dim=0)
        logits[rows] = grad
        # Before the next block is made, not after it.
        del log_p, grad, slope
    return total


def _blocks(logits: Tensor) -> Iterator[slice]:
    return pieces(logits.shape[0], block_rows(logits.shape[1], kind_of(logits.device)))


def _log_softmax(logits: Tensor, link: Link) -> tuple[Tensor, Tensor | None]:
    """Of a block's logits, scaled and capped, in float32; and the derivative of the cap, where there is one."""
    if link == Link(link.before):
        return torch.log_softmax(logits, dim=-1, dtype=torch.float32), None
    bent = logits.float() * link.scale
    slope = None
    if link.cap is not None:
        bent.div_(link.cap).tanh_()
        slope = 1.0 - bent * bent
        bent.mul_(link.cap)
    return torch.log_softmax(bent, dim=-1), slope


def _smoothed(log_p: Tensor, column: Tensor, smoothing: float) -> Tensor:
    """Summed loss of log-probabilities (N, V) for targets (N, 1)."""
    total = -log_p.gather(1, column).sum()
    if not smoothing:
        return total
    return total * (1.0 - smoothing) - log_p.mean(dim=-1).sum() * smoothing
