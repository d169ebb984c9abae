"""Cross-entropy of an LM head with its gradients: in pieces (ours), over the whole logits (plain), Liger's kernel.

Liger's is measured on CUDA where `liger_kernel` is installed. Narrow types are taken as training takes them: bfloat16
hidden states and weights, float32 where that is asked for. Cases are taken in turns.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

from benchmarks import harness
from benchmarks.harness import Json, Report, Table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="(%(default)s)")
    parser.add_argument("--tokens", type=int, help="(cuda: 4096; cpu: 512)")
    parser.add_argument("--width", type=int, help="of the hidden states (cuda: 4096; cpu: 576)")
    parser.add_argument("--vocabulary", type=int, help="(cuda: 128256; cpu: 49152)")
    parser.add_argument("--repeats", type=int, help="(20; cpu 5)")


def _device(options: argparse.Namespace) -> str:
    if options.device != "auto":
        return str(options.device)
    return "cpu" if harness.device_name() == "no GPU" else "cuda"


def result_name(options: argparse.Namespace) -> str:
    return "lm_loss-cuda" if _device(options) == "cuda" else "lm_loss"


def run(options: argparse.Namespace) -> Report:
    device = _device(options)
    cuda = device == "cuda"
    settings = {
        "device": device,
        "precision": options.precision,
        "tokens": options.tokens or (4096 if cuda else 512),
        "width": options.width or (4096 if cuda else 576),
        "vocabulary": options.vocabulary or (128256 if cuda else 49152),
        "threads": harness.cores(),
    }
    repeats = options.repeats or (3 if options.quick else 20 if cuda else 5)
    cases = _cases(settings)
    for case in cases.values():
        case()
        case()
    runs = harness.interleave(cases, repeats)
    seconds = {name: harness.summary(run["s"] for run in taken) for name, taken in runs.items()}
    peaks = {name: max((run["peak"] or 0) for run in taken) or None for name, taken in runs.items()}

    def against(other: str) -> Json:
        return harness.summary(a["s"] / b["s"] for a, b in zip(runs["pieces"], runs[other], strict=True))

    ratios = {name: against(name) for name in runs if name != "pieces"}
    rows = [
        (name, harness.spread(harness.summary(1000 * value for value in taken["values"])), peak and peak / 1e6)
        for (name, taken), peak in zip(seconds.items(), peaks.values(), strict=True)
    ]
    return Report(
        title="the loss of a language model, with its gradients",
        settings=settings,
        results={"seconds": seconds, "peak_bytes": peaks, "pieces_against": ratios},
        tables=[Table("Forward and backward", ("case", "ms", "peak beside inputs, MB"), rows)],
        targets=[
            (
                "in pieces no slower than over the whole logits",
                harness.spread(ratios["whole logits"]),
                ratios["whole logits"]["median"] <= 1.0,
            )
        ],
        notes=["Peak: torch.cuda.max_memory_allocated less what the inputs take; on a CPU it is not measured."]
        + ([] if "liger" in ratios else ["liger_kernel is not installed, or there is no CUDA device: not measured."]),
    )


def _cases(settings: Json) -> dict[str, Callable[[], Json]]:
    import torch
    from torch.nn import functional as F

    from workers.models.causal_lm.network import linear_loss
    from workers.models.causal_lm.network.link import Link

    device, cuda = torch.device(settings["device"]), settings["device"] == "cuda"
    dtype = torch.bfloat16 if settings["precision"] == "bf16" else torch.float32
    torch.manual_seed(0)
    shape = settings["tokens"], settings["width"]
    hidden = torch.randn(shape, device=device, dtype=dtype).requires_grad_(True)
    weight = (torch.randn(settings["vocabulary"], shape[1], device=device) / 50).to(dtype).requires_grad_(True)
    targets = torch.randint(settings["vocabulary"], shape[:1], device=device)

    def pieces() -> torch.Tensor:
        with torch.autocast(device.type, enabled=False):
            value: Any = linear_loss._Chunked.apply(hidden, weight, None, targets, Link(), 0.0, dtype)
        return cast("torch.Tensor", value)

    def whole() -> torch.Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), targets)

    def ligers() -> torch.Tensor:
        module = import_module("liger_kernel.transformers.fused_linear_cross_entropy")
        loss = module.LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
        value: Any = loss(weight, hidden, targets, None)
        return cast("torch.Tensor", value.float())

    def one(loss: Callable[[], torch.Tensor]) -> Json:
        hidden.grad = weight.grad = None
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        started = time.perf_counter()
        torch.autograd.backward(loss())
        if cuda:
            torch.cuda.synchronize()
        taken = time.perf_counter() - started
        return {"s": taken, "peak": torch.cuda.max_memory_allocated() - before if cuda else None}

    found: dict[str, Callable[[], torch.Tensor]] = {"pieces": pieces, "whole logits": whole}
    if cuda and find_spec("liger_kernel") is not None:
        found["liger"] = ligers
    return {name: functools.partial(one, loss) for name, loss in found.items()}
