"""Peak memory of every stage of every regime, by the published protocol, on made-up images.

ResNet-50, 224x224, batch 256, mixed precision: end-to-end, end-to-end with activation checkpointing, layer-wise
stages, SegProp stages. Every case runs in a process of its own: some steps to settle, then the peak is reset and
read after an epoch's worth of steps (`torch.cuda.max_memory_allocated`; reserved beside it). Without a CUDA device
it runs at a reduced size and reports by how much the process grew.

Needs torch, torchvision and this repository: neither Ray nor pydantic. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks import harness
from benchmarks.harness import Json, Report, Table

#: GB (10^9 bytes) as published, by case.
PUBLISHED = {"e2e": 11.29, "segprop/seg1": 7.09, "segprop/seg2": 4.48, "segprop/seg3": 3.47, "segprop/seg4": 2.45}
#: Share of end-to-end to beat.
SHARES = {"segprop/seg1": 0.63, "segprop/seg2": 0.40, "segprop/seg3": 0.31, "segprop/seg4": 0.22}
CLASSES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--model", default="resnet50", help="(%(default)s)")
    parser.add_argument("--head-convs", type=int, help="of SegProp, E2E and mapped LW (3; basic blocks: 1)")
    parser.add_argument("--lw-variant", choices=("published", "mapped"), default="published", help="(%(default)s)")
    parser.add_argument("--batch", type=int, help="(cuda: 256; cpu: 32, quick 8)")
    parser.add_argument("--size", type=int, help="side of the images (cuda: 224; cpu: 160, quick 96)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="(cuda: fp16; cpu: bf16)")
    parser.add_argument("--contiguous", action="store_true", help="not channels_last")
    parser.add_argument("--nondeterministic", action="store_true", help="whatever kernels are fastest")
    parser.add_argument("--steps", type=int, help="steps of the measured epoch (20; cpu 2)")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time; each has a process (%(default)s)")
    parser.add_argument("--cases", nargs="+", help="only these, such as e2e segprop/seg2")


def result_name(options: argparse.Namespace) -> str:
    return "memory-cuda" if _device(options) == "cuda" else "memory"


def _device(options: argparse.Namespace) -> str:
    if options.device != "auto":
        return str(options.device)
    return "cpu" if harness.device_name() == "no GPU" else "cuda"


@dataclass(frozen=True)
class Settings:
    """What a case is told, as JSON on its command line."""

    case: str
    device: str
    model: str
    head_convs: int
    lw_variant: str
    batch: int
    size: int
    precision: str
    channels_last: bool
    deterministic: bool
    steps: int


def run(options: argparse.Namespace) -> Report:
    device = _device(options)
    cuda = device == "cuda"
    basic = options.model in ("resnet18", "resnet34")
    common = {
        "device": device,
        "model": options.model,
        "head_convs": options.head_convs or (1 if basic else 3),
        "lw_variant": options.lw_variant,
        "batch": options.batch or (256 if cuda else 8 if options.quick else 32),
        "size": options.size or (224 if cuda else 96 if options.quick else 160),
        "precision": options.precision or ("fp16" if cuda else "bf16"),
        "channels_last": not options.contiguous,
        "deterministic": not options.nondeterministic,
        "steps": options.steps or (20 if cuda else 2),
    }
    names = options.cases or [*_cases(common)]

    def one(name: str) -> Json:
        harness.say(name)
        return harness.child("-m", "benchmarks.training.memory", json.dumps({"case": name, **common}))

    with ThreadPoolExecutor(options.jobs) as pool:
        found = dict(zip(names, pool.map(one, names), strict=True))
    return _report(found, common, quick=options.quick)


def _spec(settings: Json) -> Any:
    from workers.models.resnet.family import RESNET
    from workers.specs.experiment import ResNetSpec

    model = ResNetSpec(name=settings["model"], head_convs=settings["head_convs"])
    bare = settings["case"].startswith("lw/") and settings["lw_variant"] == "published"
    return RESNET.with_bare_head(model) if bare else model


def _cases(settings: Json) -> list[str]:
    from workers.models.resnet.outline import resnet_outline as outline

    blocks = [block.name for block in outline(_spec({"case": "", **settings}), settings["size"], CLASSES).blocks]
    return [
        "e2e",
        "e2e+checkpointing",
        *(f"segprop/{block}" for block in blocks),
        *(f"lw/{block}" for block in blocks),
        "lw/head",
    ]


# --- one case, in a process of its own ---------------------------------------------------------------------


def measure(settings: Settings) -> Json:
    """Train one stage on made-up inputs and read its peak."""
    import torch
    from torch.nn import functional as F

    from workers.device import as_input, autocast
    from workers.specs.experiment import OptimizerSpec
    from workers.training.memory import PeakMeter, settled_private_bytes
    from workers.training.optimizer import build_optimizer

    device = torch.device(settings.device)
    # Stages are deterministic by default.
    torch.use_deterministic_algorithms(settings.deterministic)
    torch.backends.cudnn.benchmark = not settings.deterministic
    torch.manual_seed(0)
    if device.type == "cpu":
        torch.set_num_threads(harness.cores())
        _warm_up(settings)  # what libraries allocate once is not the stage's
    baseline = settled_private_bytes()
    path, shapes = _path(settings)
    path.to(device)
    if settings.channels_last:
        path.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(OptimizerSpec(), [p for p in path.parameters() if p.requires_grad])
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
    precision: Any = settings.precision
    generator = torch.Generator().manual_seed(0)
    # Images come as float32; snapshots in the type the training precision computes in.
    stored = (
        torch.float32
        if shapes[0][0] == 3
        else {"fp32": torch.float32, "bf16": torch.bfloat16}.get(settings.precision, torch.float16)
    )
    host = [torch.randn((settings.batch, *shape), generator=generator).to(stored) for shape in shapes]
    labels = torch.randint(CLASSES, (settings.batch,), generator=generator)
    layout = torch.channels_last if settings.channels_last else torch.preserve_format

    def step() -> None:
        inputs = as_input(tuple(t.to(device, non_blocking=True, memory_format=layout) for t in host), precision)
        targets = labels.to(device, non_blocking=True)
        with autocast(precision, device):
            logits = path(inputs)
        torch.autograd.backward(scaler.scale(F.cross_entropy(logits.float(), targets)))
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([p for p in path.parameters() if p.requires_grad], 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    path.train(True)
    for _ in range(3 if device.type == "cuda" else 2):  # optimizer state, cuDNN's choices, the allocator
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    meter = PeakMeter(device)
    for _ in range(settings.steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    peak = meter.stop()
    assert peak.host is not None
    return {
        "peak_allocated_bytes": peak.device,
        "peak_reserved_bytes": peak.device_reserved,
        "host_peak_bytes": peak.host,
        "host_growth_bytes": peak.host - baseline,
        **_counted(path, optimizer),
        "input_bytes": sum(t.numel() * t.element_size() for t in host),
        "modules": sorted(path.parts),
    }


def _path(settings: Settings) -> tuple[Any, tuple[tuple[int, ...], ...]]:
    """The trained path of a case, as its stage would build it, and the shapes of one sample that enter it."""
    from workers.models.chain import ModulePath
    from workers.models.resnet import parts as resnet
    from workers.models.resnet.outline import resnet_outline

    spec, size = _spec(vars(settings)), settings.size
    chain = resnet_outline(spec, size, CLASSES)
    blocks = [block.name for block in chain.blocks]
    regime, _, stage = settings.case.partition("/")

    def part(name: str) -> Any:
        module = resnet.build_part(spec, size, CLASSES, name)
        # Any weights do; the memory of a stage never depends on the parts it does not hold.
        for layer in module.modules():
            reset: Any = getattr(layer, "reset_parameters", None)
            if reset is not None:
                reset()
        return module

    index = blocks.index(stage) if stage in blocks else len(blocks)
    parts: dict[str, Any] = {}
    if regime.startswith("e2e"):
        index = 0
        parts = {name: part(name) for name in (*blocks, "head")}
    elif stage == "head":
        parts["head"] = part("head")
    else:
        parts[stage] = part(stage)
        if regime == "lw":
            parts["aux"] = resnet.build_aux(spec, size, CLASSES, index + 1, seed=0)
        else:
            if index + 1 < len(blocks):
                parts["adapter"] = resnet.build_adapter(spec, size, CLASSES, index + 1, len(blocks), seed=0)
            parts["head"] = part("head")
    checkpointing = settings.case == "e2e+checkpointing"
    return ModulePath(parts, trained=list(parts), activation_checkpointing=checkpointing), chain.boundaries[index]


def _warm_up(settings: Settings) -> None:
    import torch

    conv = torch.nn.Conv2d(3, 8, 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
        out = conv(torch.randn(2, 3, 16, 16))
    out.float().sum().backward()
    torch.optim.AdamW(conv.parameters(), fused=True).step()


def _counted(path: Any, optimizer: Any) -> Json:
    """Bytes of tensors the stage holds besides activations: weights and buffers, gradients, optimizer state."""
    from workers.models.chain import module_bytes

    trained = sum(p.numel() * p.element_size() for p in path.parameters() if p.requires_grad)
    state = sum(
        value.numel() * value.element_size()
        for values in optimizer.state.values()
        for value in values.values()
        if hasattr(value, "numel")
    )
    return {"weights_bytes": module_bytes(path), "gradient_bytes": trained, "optimizer_bytes": state}


# --- the report --------------------------------------------------------------------------------------------


def _report(found: dict[str, Json], settings: Json, *, quick: bool) -> Report:
    cuda = settings["device"] == "cuda"
    key = "peak_allocated_bytes" if cuda else "host_growth_bytes"
    whole: Any = found.get("e2e", {}).get(key)
    shares = {name: result[key] / whole for name, result in found.items()} if whole else {}
    published_case = cuda and (settings["model"], settings["size"], settings["batch"]) == ("resnet50", 224, 256)
    rows = [
        (
            name,
            result[key] / 1e9,
            _percent(shares.get(name)),
            PUBLISHED.get(name) if settings["model"] == "resnet50" else None,
            _percent(PUBLISHED[name] / PUBLISHED["e2e"]) if name in PUBLISHED else None,
            result["peak_reserved_bytes"] / 1e9 if cuda else None,
        )
        for name, result in found.items()
    ]
    held = [
        (
            name,
            result["weights_bytes"] / 1e6,
            result["gradient_bytes"] / 1e6,
            result["optimizer_bytes"] / 1e6,
            result["input_bytes"] / 1e6,
            ", ".join(result["modules"]),
        )
        for name, result in found.items()
    ]
    targets: list[tuple[str, str, bool | None]] = []
    if "e2e" in found:
        measured = f"{whole / 1e9:.2f} GB"
        targets.append(
            (
                f"E2E at most {PUBLISHED['e2e']} GB",
                measured,
                whole / 1e9 <= PUBLISHED["e2e"] if published_case else None,
            )
        )
    for name, share in SHARES.items():
        if name in shares:
            text = f"{100 * shares[name]:.0f}%, {found[name][key] / 1e9:.2f} GB"
            holds = shares[name] <= share + 0.005 if published_case else None
            targets.append((f"{name} at most {share:.0%} of E2E", text, holds))
    order = [shares[name] for name in SHARES if name in shares]
    if len(order) > 1:
        falling = order[0] < 1 and all(later < earlier for earlier, later in pairwise(order))
        measured = " > ".join(f"{100 * share:.0f}%" for share in (1, *order))
        # With few and small images weights outweigh activations, and the later blocks have the most weights.
        targets.append(("each SegProp stage needs less than the one before", measured, None if quick else falling))
    what = "max_memory_allocated" if cuda else "growth of the process"
    return Report(
        title=f"peak memory of {settings['model']} by stage",
        settings=settings,
        results=found,
        tables=[
            Table(
                f"Peak, GB (10^9 bytes): {what}",
                ("case", "peak", "of E2E", "published", "published share", "reserved"),
                rows,
            ),
            Table(
                "Tensors a stage holds besides activations, MB (counted)",
                ("case", "weights and buffers", "gradients", "optimizer state", "input batch", "parts"),
                held,
            ),
        ],
        targets=targets,
        notes=[
            "The published figures are for CUDA, ResNet-50, 224x224, batch 256, mixed precision; beside other "
            "settings they show only the order."
        ]
        if not published_case
        else [],
    )


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f}%"


if __name__ == "__main__":
    print(json.dumps(measure(Settings(**json.loads(sys.argv[1])))))
