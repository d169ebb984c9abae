"""AdamW with moments in 8 bits (bitsandbytes), with its step on a CPU done here.

bitsandbytes' quantizer for CPUs finds codes by a coarse table and stores a zero as 2e-5 of the largest value of its
block of 256. Where rows are no whole number of blocks, a row without gradient shares a block with one that has some, so
its moments are no longer zero and its weights move. On a GPU bitsandbytes searches all codes, and its own kernel runs.
"""

from __future__ import annotations

import importlib
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from workers.device import pieces, with_values
from workers.specs.experiment import OptimizerSpec

#: Elements that one absolute maximum scales; bitsandbytes' own.
BLOCK = 256
#: Elements whose moments are made whole at once: 4 MiB each in float32.
_AT_ONCE = 4096 * BLOCK


def adamw8bit(spec: OptimizerSpec, parameters: Any) -> torch.optim.Optimizer:
    """Make bitsandbytes' AdamW8bit over these parameters, which steps as said above those that lie on a CPU."""
    optimizer: torch.optim.Optimizer = optimizer_class()(
        parameters, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay
    )
    return optimizer


@cache
def optimizer_class() -> Any:
    """Define bitsandbytes' AdamW8bit with its step on a CPU done here."""
    # An extra, and half annotated; its absence is found early.
    bitsandbytes: Any = importlib.import_module("bitsandbytes.optim")

    class AdamW8bit(bitsandbytes.AdamW8bit):  # type: ignore[misc]  # an extra without types
        def fill_qmap(self) -> None:
            # The tables of codes are made from real numbers, also where a stage is traced without any.
            with with_values():
                super().fill_qmap()

        @torch.no_grad()
        def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
            state = self.state[p]
            if p.device.type != "cpu" or state["state1"].dtype != torch.uint8:
                super().update_step(group, p, gindex, pindex)
                return
            # Blocks are taken in the order of contiguous memory, as bitsandbytes does.
            p.data = p.data.contiguous()
            state["state1"], state["state2"] = state["state1"].contiguous(), state["state2"].contiguous()
            state["step"] += 1
            step_on_cpu(p.data, p.grad, state, self.get_config(gindex, pindex, group))

    return AdamW8bit


def step_on_cpu(weight: Tensor, grad: Tensor | None, state: dict[str, Any], config: dict[str, Any]) -> None:
    """Take one AdamW step in place, over blocks of 256 elements; moments are decoded, moved and rounded again.

    The first moment is rounded to the nearest code. The second never becomes zero by rounding: a first moment over a
    zero would be divided by `eps` alone.
    """
    if grad is None:
        return
    beta1, beta2 = config["betas"][:2]
    size = -config["lr"] / (1.0 - beta1 ** state["step"])
    correction = math.sqrt(1.0 - beta2 ** state["step"])
    decay = 1.0 - config["lr"] * config["weight_decay"]
    flat, slope = weight.view(-1), grad.contiguous().view(-1)
    codes1, codes2 = state["state1"].view(-1), state["state2"].view(-1)
    for some in pieces(flat.numel(), _AT_ONCE):
        blocks = slice(some.start // BLOCK, -(-some.stop // BLOCK))
        g = slope[some].float()
        first = _decode(codes1[some], state["qmap1"], state["absmax1"][blocks])
        second = _decode(codes2[some], state["qmap2"], state["absmax2"][blocks])
        first.mul_(beta1).add_(g, alpha=1.0 - beta1)
        second.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        moved = flat[some].float().mul_(decay)
        flat[some] = moved.addcdiv_(first, (second.sqrt() / correction).add_(config["eps"]), value=size)
        codes1[some] = _encode(first, state["qmap1"], state["absmax1"][blocks])
        rounded = _encode(second, state["qmap2"], state["absmax2"][blocks])
        codes2[some] = torch.where(second > 0, rounded.clamp(min=1), rounded)


def _decode(codes: Tensor, table: Tensor, largest: Tensor) -> Tensor:
    return table[codes.int()] * _each(largest, codes.numel())


def _encode(values: Tensor, table: Tensor, largest: Tensor) -> Tensor:
    """Codes (uint8) of the nearest entries of a sorted table, by which blocks of values are scaled; sets `largest`."""
    padded = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    largest.copy_(padded.abs().amax(dim=1))
    # Blocks of zeros are divided by 1.
    scaled = values / _each(torch.where(largest > 0, largest, 1.0), values.numel())
    return torch.bucketize(scaled, (table[1:] + table[:-1]) / 2).to(torch.uint8)


def _each(largest: Tensor, elements: int) -> Tensor:
    return largest.repeat_interleave(BLOCK)[:elements]
