"""Peak memory of every stage of every regime, by the published protocol, on made-up images.

ResNet-50, 224x224, batch 256, mixed precision: end-to-end, end-to-end with activation checkpointing, layer-wise
stages, SegProp stages: each reading its boundary as if it were stored, and (`+recompute`) with the frozen prefix on the
device, computed for every batch. Beside each the plan's own figure, where pydantic is installed. Every case runs in a
process of its own: some steps to settle, then the peak is reset and read after an epoch's worth of steps
(`torch.cuda.max_memory_allocated`; reserved beside it). Without a CUDA device it runs at a reduced size and reports by
how much the process grew.

Needs torch, torchvision and this repository: neither Ray nor pydantic. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Json, Report, Table

GIB = 2.0**30
RECOMPUTE = "+recompute"
#: GiB as published (bytes divided by 1024^3), by case. The publication ran the frozen prefix on the device.
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
        *(f"segprop/{block}{RECOMPUTE}" for block in blocks[1:]),
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
    path, prefix, shapes = _path(settings)
    for module in (path, prefix):
        module.to(device)
        if settings.channels_last:
            module.to(memory_format=torch.channels_last)
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
        if prefix.parts:  # as a stage does that computes its boundary again
            with autocast(precision, device):
                inputs = as_input(prefix(inputs), precision)
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
        **_counted(path, prefix, optimizer),
        "input_bytes": sum(t.numel() * t.element_size() for t in host),
        "modules": sorted((*path.parts, *prefix.parts)),
    }


def _path(settings: Settings) -> tuple[Any, Any, tuple[tuple[int, ...], ...]]:
    """The trained path of a case, as its stage would build it; the frozen blocks that run before it on the device (none
    where its input is ready); and the shapes of one sample that enter the first of them."""
    from workers.models.chain import ModulePath
    from workers.models.resnet import parts as resnet
    from workers.models.resnet.outline import resnet_outline

    spec, size = _spec(vars(settings)), settings.size
    chain = resnet_outline(spec, size, CLASSES)
    blocks = [block.name for block in chain.blocks]
    regime, _, stage = settings.case.removesuffix(RECOMPUTE).partition("/")

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
    path = ModulePath(parts, trained=list(parts), activations="recompute" if checkpointing else "keep")
    before = blocks[:index] if settings.case.endswith(RECOMPUTE) else []
    prefix = ModulePath({name: part(name) for name in before}, trained=())
    return path, prefix, chain.boundaries[0 if before else index]


def _warm_up(settings: Settings) -> None:
    import torch

    conv = torch.nn.Conv2d(3, 8, 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
        out = conv(torch.randn(2, 3, 16, 16))
    out.float().sum().backward()
    torch.optim.AdamW(conv.parameters(), fused=True).step()


def _counted(path: Any, prefix: Any, optimizer: Any) -> Json:
    """Bytes of tensors the stage holds besides activations: weights and buffers, those of frozen blocks among them,
    gradients, optimizer state."""
    from workers.models.chain import module_bytes

    trained = sum(p.numel() * p.element_size() for p in path.parameters() if p.requires_grad)
    state = sum(
        value.numel() * value.element_size()
        for values in optimizer.state.values()
        for value in values.values()
        if hasattr(value, "numel")
    )
    return {
        "weights_bytes": module_bytes(path) + module_bytes(prefix),
        "gradient_bytes": trained,
        "optimizer_bytes": state,
    }


# --- what the plan says ------------------------------------------------------------------------------------


def planned_bytes(settings: Json) -> dict[str, int]:
    """Peak device memory that a plan predicts, by case; {} where what planning needs is not installed."""
    try:
        import yaml

        from orchestrator.config.load import load
        from orchestrator.plan.builder import build_plan
        from workers.data.images.outline import DataOutline
        from workers.models.resnet.outline import resnet_outline
        from workers.specs.experiment import ResNetSpec
        from workers.specs.model import expect
    except ImportError:
        return {}
    training = {key: settings[key] for key in ("precision", "channels_last")}
    training |= {"batch_size": settings["batch"], "epochs": 1}
    described = {
        "model": {"name": settings["model"], "head_convs": settings["head_convs"]},
        "data": {"name": "digits", "image_size": settings["size"]},
        "training": training,
        "regimes": {
            "e2e": {},
            "e2e-checkpointing": {"kind": "e2e", "training": {"activation_checkpointing": True}},
            "segprop": {},
            "lw": {"variant": settings["lw_variant"]},
        },
        "resources": {"device": "cuda"},
    }
    nothing = (0.5, 0.5, 0.5)
    names = tuple(str(number) for number in range(CLASSES))
    data = DataOutline(CLASSES, names, (3, 32, 32), 50_000, 10_000, fingerprint="", mean=nothing, std=nothing)
    found: dict[str, int] = {}
    for mode, suffix in (("always", ""), ("never", RECOMPUTE)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "memory.yaml")
            path.write_text(yaml.safe_dump({**described, "snapshots": {"mode": mode, "budget": None}}))
            config = load(path)
        outlines = {
            name: resnet_outline(expect(ResNetSpec, config.regime(name).model), settings["size"], CLASSES)
            for name in config.regimes
        }
        plan = build_plan(config, outlines, data)
        for name, regime in plan.regimes.items():
            for node in map(plan.node, regime.stages):
                block = next((part for part in node.task["trained"] if part != "head"), "head")
                case = name.replace("-", "+") if regime.kind == "e2e" else f"{name}/{block}"
                case += suffix if node.task["source"] == "recompute" else ""
                found.setdefault(case, node.estimate.peak_bytes)
    return found


# --- the report --------------------------------------------------------------------------------------------


def _report(found: dict[str, Json], settings: Json, *, quick: bool) -> Report:
    cuda = settings["device"] == "cuda"
    key = "peak_allocated_bytes" if cuda else "host_growth_bytes"
    whole: Any = found.get("e2e", {}).get(key)
    shares = {name: result[key] / whole for name, result in found.items()} if whole else {}
    planned = planned_bytes(settings)
    published_case = cuda and (settings["model"], settings["size"], settings["batch"]) == ("resnet50", 224, 256)
    # What was not measured has the plan's figure alone.
    unmeasured = [name for name in planned if name.startswith("segprop/") and name.endswith(RECOMPUTE)]
    measured_bytes = {name: result[key] for name, result in found.items()}
    reserved = {name: result["peak_reserved_bytes"] for name, result in found.items() if cuda}
    rows = [
        (
            name,
            _gib(measured_bytes.get(name)),
            _percent(shares.get(name)),
            _gib(planned.get(name)),
            _published(name) if settings["model"] == "resnet50" else None,
            _percent(PUBLISHED[name] / PUBLISHED["e2e"]) if name in PUBLISHED else None,
            _gib(reserved.get(name)),
        )
        for name in dict.fromkeys((*found, *unmeasured))
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
        measured = f"{_gib(whole)} GiB"
        targets.append(
            (
                f"E2E at most {PUBLISHED['e2e']} GiB",
                measured,
                whole / GIB <= PUBLISHED["e2e"] if published_case else None,
            )
        )
    for name, share in SHARES.items():
        if name in shares:
            text = f"{100 * shares[name]:.0f}%, {_gib(found[name][key])} GiB"
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
                f"Peak, GiB (2^30 bytes): {what}",
                ("case", "peak", "of E2E", "plan", "published", "published share", "reserved"),
                rows,
            ),
            Table(
                "Tensors a stage holds besides activations, MB (counted)",
                ("case", "weights and buffers", "gradients", "optimizer state", "input batch", "parts"),
                held,
            ),
        ],
        targets=targets,
        notes=_notes(found, cuda=cuda, published_case=published_case),
    )


def _notes(found: dict[str, Json], *, cuda: bool, published_case: bool) -> list[str]:
    notes = [
        "SegProp stages read ready boundaries, as from snapshots; those with +recompute hold the frozen blocks before "
        "them on the device and compute their boundary for every batch, as published and as configurations do whose "
        "views are not stored. The plan's figure is for a GPU's allocator."
    ]
    if cuda and not any(name.endswith(RECOMPUTE) for name in found):
        notes.append("The stages with +recompute were not measured on this GPU.")
    if not published_case:
        notes.append(
            "The published figures are for CUDA, ResNet-50, 224x224, batch 256, mixed precision; beside other "
            "settings they show only the order."
        )
    return notes


def _published(name: str) -> str | None:
    """The published figure of a case; of stages with a prefix that of the stage."""
    value = PUBLISHED.get(name.removesuffix(RECOMPUTE))
    return None if value is None else f"{value:.2f}"


def _gib(count: float | None) -> str | None:
    return None if count is None else f"{count / GIB:.2f}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f}%"


if __name__ == "__main__":
    print(json.dumps(measure(Settings(**json.loads(sys.argv[1])))))
