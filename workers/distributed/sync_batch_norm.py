"""Normalize over the whole micro-batch of a gang, of which each rank has only a part.

torch's own SyncBatchNorm runs on CUDA alone and averages over what each process calls its batch; this one runs
wherever collectives do, and sums over ranks in rank order, so that all have the same statistics, bit for bit.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from workers.distributed.gang import Gang

_KINDS = nn.modules.batchnorm._BatchNorm


class GangBatchNorm(_KINDS):
    """Normalize by the micro-batch of all ranks while training; the same as BatchNorm in eval mode and in its state."""

    gang: Gang

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        self._check_input_dim(input)
        output, mean, variance, count = cast("Any", _Normalize).apply(
            input, self.weight, self.bias, self.eps, self.gang
        )
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean, self._share())
                self.running_var.lerp_(variance * (count / (count - 1.0).clamp(min=1.0)), self._share())
        return cast("Tensor", output)

    def _share(self) -> float:
        """Return the weight of a batch in the running statistics."""
        if self.momentum is None:
            raise ValueError("a BatchNorm with momentum None averages over all batches: no gang supports that")
        return self.momentum


def synchronize(module: nn.Module, gang: Gang) -> None:
    """Make every BatchNorm in `module` one of the gang's, in place; parameters, buffers and names stay."""
    if gang.size == 1:
        return
    for norm in module.modules():
        if isinstance(norm, _KINDS) and not isinstance(norm, GangBatchNorm):
            norm.__class__ = GangBatchNorm
            cast("GangBatchNorm", norm).gang = gang


def holds_norms(module: nn.Module) -> bool:
    """Return whether what a sample becomes depends on the others in its micro-batch."""
    return any(isinstance(each, _KINDS) for each in module.modules())


class _Normalize(torch.autograd.Function):
    """Compute statistics in float32 by Chan's way of joining parts, which takes no difference of large sums."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, gang: Gang
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        over = [dim for dim in range(x.dim()) if dim != 1]
        shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
        wide = x.float()
        local_mean = wide.mean(over)
        local_square = (wide - local_mean.view(shape)).square().sum(over)
        local_count = local_mean.new_full((1,), x.numel() // x.shape[1])
        own = torch.cat([local_mean, local_square, local_count])
        parts = [torch.empty_like(own) for _ in range(gang.size)]
        dist.all_gather(parts, own)
        channels = x.shape[1]
        table = torch.stack(parts)
        means, squares, counts = table[:, :channels], table[:, channels:-1], table[:, -1:]
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        variance = (squares + counts * (means - mean).square()).sum(0) / count
        inverse = torch.rsqrt(variance + eps)
        normal = (wide - mean.view(shape)) * inverse.view(shape)
        output = normal if weight is None else normal * weight.view(shape)
        output = output if bias is None else output + bias.view(shape)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.count, ctx.over, ctx.shape, ctx.has_bias = count, over, shape, bias is not None
        ctx.mark_non_differentiable(mean, variance, count)
        return output.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        over, shape = ctx.over, ctx.shape
        wide = grad.float()
        normal = (x.float() - mean.view(shape)) * inverse.view(shape)
        # Sums of this rank alone: like every gradient, those of weight and bias are added up over ranks later.
        d_bias = wide.sum(over)
        d_weight = (wide * normal).sum(over)
        d_x = None
        if ctx.needs_input_grad[0]:
            sums = torch.stack([d_bias, d_weight])
            dist.all_reduce(sums)
            centre, slope = sums / ctx.count
            d_x = wide - centre.view(shape) - normal * slope.view(shape)
            d_x = d_x * (inverse if weight is None else inverse * weight).view(shape)
            d_x = d_x.to(x.dtype)
        return (
            d_x,
            d_weight if weight is not None and ctx.needs_input_grad[1] else None,
            d_bias if ctx.has_bias and ctx.needs_input_grad[2] else None,
            None,
            None,
        )
