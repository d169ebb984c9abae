"""What a stage of a language model holds, and what the large ones cost on a device.

Without a CUDA device: a sharded random Llama of at least 2 GB is imported and trained from the boundary after its
base; the stage runs in a worker process of its own, whose growth (private memory over that of a process that has
only loaded the libraries) is set beside the bytes of its own tensors. It must not hold the embedding, the prefix or
other blocks: target its own tensors (weights, gradients, optimizer state, activations as predicted) + 300 MB.

With `--device cuda`: Llama-3.1-8B's shape with random weights. Stage 1 (base 1 and 18), a stage after the first, end to
end with activation checkpointing, LoRA and QLoRA: peak allocated memory and tokens a second by the training code's own
path, loss and optimizer. No weights, no data set and no Ray. `--tiny` runs the same code at a toy size, on any device.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Json, Report, Table

#: Bytes a worker may hold beside its own tensors.
ALLOWANCE = 300e6
#: GiB for an 8B model, torchtune.
TO_BEAT = {"full fine-tuning": 18.9, "LoRA": 16.2, "QLoRA": 7.4}
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
#: What becomes of that shape with `--tiny`; matrices whose rows are multiples of 64, as nf4 wants them on a CPU.
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
#: Case -> (base, what trains, LoRA rank or None, bits of frozen matrices).
CASES = {
    "stage1/base1": (1, "stage1", None, "full"),
    "stage1/base18": (18, "stage1", None, "full"),
    "stage2": (18, "stage2", None, "full"),
    "stage2+lora": (18, "stage2", 16, "full"),
    "e2e+checkpointing": (0, "e2e", None, "full"),
    "e2e+lora": (0, "e2e", 16, "full"),
    "e2e+qlora": (0, "e2e", 16, "nf4"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--length", type=int, default=1024, help="cuda: tokens of a sample (%(default)s)")
    parser.add_argument("--micro", type=int, default=1, help="cuda: samples of a micro-batch (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="cuda: measured steps (%(default)s)")
    parser.add_argument("--layers", type=int, help="cpu: layers of the random model (28: 2.0 GB; quick 4)")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="cuda: only these")
    parser.add_argument("--tiny", action="store_true", help="the device's cases at a toy size, on any device")
    parser.add_argument("--optimizer", choices=("adamw", "adamw8bit", "sgd"), default="adamw", help="cuda")
    parser.add_argument("--lm-head", choices=("train", "frozen"), default="train", help="cuda")


def result_name(options: argparse.Namespace) -> str:
    if not (options.tiny or _cuda(options)):
        return "lm_memory"
    chosen = [
        *([f"micro{options.micro}"] if options.micro != 1 else []),
        *([options.optimizer] if options.optimizer != "adamw" else []),
        *(["frozen-head"] if options.lm_head == "frozen" else []),
    ]
    return "-".join(["lm_memory-tiny" if options.tiny else "lm_memory-cuda", *chosen])


def _cuda(options: argparse.Namespace) -> bool:
    return options.device == "cuda" or (options.device == "auto" and harness.device_name() != "no GPU")


def run(options: argparse.Namespace) -> Report:
    return _on_device(options) if options.tiny or _cuda(options) else _on_host(options)


# --- host: a worker of a stage after the first ---------------------------------------------------------------


def _on_host(options: argparse.Namespace) -> Report:
    layers = options.layers or (4 if options.quick else 28)
    shape = {
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 512,
    }
    with harness.workspace() as folder:
        config = folder / "config.yaml"
        config.write_text(json.dumps(_host_config(shape, layers, folder)))
        harness.say("a sharded model, its import, and the boundary")
        made = harness.child("-m", "benchmarks.language.lm_memory", "make", str(config))
        harness.say("the stage")
        found = harness.child("-m", "benchmarks.language.lm_memory", "stage", str(config))
    over = found["growth_bytes"] - found["own_bytes"]
    whole = made["model_bytes"]
    text = f"{found['growth_bytes'] / 1e6:.0f} MB of {whole / 1e9:.2f} GB, {over / 1e6:+.0f} MB beside its own"
    return Report(
        title="host memory of a stage's worker",
        settings={"layers": layers, "path": ", ".join(found["path"]), "threads": harness.cores()},
        results={**made, **found},
        tables=[
            Table(
                "MB (10^6 bytes)",
                ("model", "the stage's weights", "own tensors", "worker", "beside its own", "predicted"),
                [
                    tuple(
                        value / 1e6
                        for value in (
                            whole,
                            found["weights_bytes"],
                            found["own_bytes"],
                            found["growth_bytes"],
                            over,
                            found["predicted_bytes"],
                        )
                    )
                ],
            )
        ],
        targets=[
            (
                "a worker holds at most its own tensors + 300 MB, of a model of at least 2 GB",
                text,
                over <= ALLOWANCE if whole >= 2e9 else None,
            )
        ],
        notes=["Worker: private memory (no file behind it) over that of a process with the libraries loaded."],
    )


def _host_config(shape: Json, layers: int, folder: Path) -> Json:
    return {
        "model": {"family": "causal_lm", "path": str(folder / "model"), "tokenizer": "bytes"},
        "shape": shape,
        "data": {
            "name": "stdlib",
            "sequence_length": 64,
            "train_limit": 12,
            "validation_limit": 4,
            "test_limit": 1,
        },
        "split": {"base": layers - 3, "head": 1, "intermediate": "omit", "train_base": False},
        "training": {"epochs": 1, "batch_size": 4, "clip": 1.0, "commit": "last"},
        "snapshots": {"mode": "always"},
        "evaluation": {"stages": False},
        "regimes": {"segprop": {"kind": "segprop"}},
        "resources": {"runner": "local", "device": "cpu", "slots": 1, "threads": harness.cores()},
        "run_dir": str(folder / "run"),
    }


def _settings(config: Path) -> Path:
    """The configuration as the program takes it: without the shape of the model that is to be made."""
    content = json.loads(config.read_text())
    content.pop("shape")
    own = config.with_name("run.yaml")
    own.write_text(json.dumps(content))
    return own


def make(config: Path) -> Json:
    """Write the model in shards and bring everything the measured stage needs into the store."""
    from benchmarks.language.lm_stage import order_of

    folder = config.parent / "model"
    total = _write_shards(json.loads(config.read_text())["shape"], folder)
    order_of(str(_settings(config)), "segprop", 1)
    return {"model_bytes": total, "shards": len(list(folder.glob("*.safetensors")))}


def _write_shards(shape: Json, folder: Path) -> int:
    """A random float32 checkpoint, one file a part, with the index that sharded checkpoints have."""
    from safetensors.torch import save_file

    from workers.models.causal_lm.pretrained.import_parts import import_parts
    from workers.specs.language import CausalLMSpec

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**shape, "tie_word_embeddings": False, "torch_dtype": "float32"}))
    places: dict[str, str] = {}
    total = 0
    for name, state in import_parts(CausalLMSpec(family="causal_lm", config=shape), seed=0):
        file = f"model-{name}.safetensors"
        save_file(state, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(state, file))
        total += sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def stage(config: Path) -> Json:
    """Train the stage as a worker does."""
    import torch

    # Everything that is imported on the way, before the baseline.
    import workers.domains.text.training
    import workers.training.trainer  # noqa: F401
    from benchmarks.language.lm_stage import order_of
    from workers.control import ThreadControl
    from workers.specs.results import StageResult
    from workers.tasks.execute import execute
    from workers.training.memory import load_lazily_loaded, settled_private_bytes

    node, order = order_of(str(_settings(config)), "segprop", 1)
    torch.set_num_threads(order.threads)
    load_lazily_loaded()
    baseline = settled_private_bytes()
    commit = execute(order, ThreadControl())
    assert commit is not None
    memory = commit.read(StageResult).memory
    assert memory is not None
    assert memory.peak_host_bytes is not None
    weights = memory.resident_bytes
    trained = 4 * memory.trainable_parameters
    growth = memory.peak_host_bytes - baseline
    # Weights, gradients, two moments; activations and buffers as predicted.
    working = max(0, node.estimate.peak_bytes - weights - node.estimate.optimizer_bytes - trained)
    return {
        "weights_bytes": weights,
        "own_bytes": weights + trained + node.estimate.optimizer_bytes + working,
        "growth_bytes": growth,
        "predicted_bytes": node.estimate.peak_bytes,
        "path": list(node.task["path"]),
    }


# --- device: the 8B shape ------------------------------------------------------------------------------------


def _on_device(options: argparse.Namespace) -> Report:
    names = options.cases or list(CASES)
    shape = {**LLAMA_8B, **(TINY if options.tiny else {"num_hidden_layers": 4} if options.quick else {})}
    common = {
        "device": "cuda" if _cuda(options) else "cpu",
        "length": 128 if options.quick or options.tiny else options.length,
        "micro": options.micro,
        "steps": options.steps,
        "optimizer": options.optimizer,
        "lm_head": options.lm_head,
        "layers": shape["num_hidden_layers"],
    }
    found: dict[str, Json] = {}
    for name in names:
        harness.say(name)
        given = json.dumps({"case": name, "shape": shape, **common})
        done = harness.python("-m", "benchmarks.language.lm_memory", "case", given, check=False)
        lines = done.stdout.strip().splitlines()
        # What does not fit the device is a result too.
        found[name] = json.loads(lines[-1]) if done.returncode == 0 and lines else {"failed": _reason(done.stderr)}
    rows = [
        (
            name,
            (result.get("peak_allocated_bytes") or 0) / 2**30 or None,
            result.get("tokens_per_s"),
            result.get("trainable", 0) / 1e6 or None,
            result.get("failed", ""),
        )
        for name, result in found.items()
    ]
    targets: list[tuple[str, str, bool | None]] = []
    for name in ("stage1/base1", "stage2"):
        peak = found.get(name, {}).get("peak_allocated_bytes")
        if peak is not None:
            holds = None if options.quick or options.tiny else peak / 2**30 < TO_BEAT["full fine-tuning"]
            targets.append((f"{name} below {TO_BEAT['full fine-tuning']} GiB", f"{peak / 2**30:.1f} GiB", holds))
    return Report(
        title="peak memory and speed of Llama-3.1-8B's shape by stage",
        settings=common,
        results=found,
        tables=[Table("Device", ("case", "peak, GiB", "tokens/s", "trained, M", ""), rows)],
        targets=targets,
        notes=[
            "Peak: torch.cuda.max_memory_allocated over the measured steps. bf16 weights, random.",
            "To beat, GiB for an 8B model (torchtune): " + ", ".join(f"{name} {gib}" for name, gib in TO_BEAT.items()),
        ],
    )


def _reason(errors: str) -> str:
    lines = [line for line in errors.strip().splitlines() if line.strip()]
    return lines[-1][:120] if lines else "no output"


def case(settings: Json) -> Json:
    """One case with random weights: a path of the real parts, the real loss and optimizer."""
    import time

    import torch

    from workers.device import autocast
    from workers.models.causal_lm.network import readout
    from workers.models.causal_lm.network.context import Frame
    from workers.models.causal_lm.network.lora import add_lora
    from workers.models.causal_lm.network.parts import Head, build_part
    from workers.models.causal_lm.network.quantized import quantize
    from workers.models.chain import ModulePath as Chain
    from workers.specs.experiment import OptimizerSpec
    from workers.specs.language import CausalLMSpec, LoraSpec
    from workers.training.memory import PeakMeter
    from workers.training.optimizer import build_optimizer

    device = torch.device(settings["device"])
    torch.manual_seed(0)
    base, kind, rank, bits = CASES[settings["case"]]
    shape = {**settings["shape"], "tie_word_embeddings": False}
    count = shape["num_hidden_layers"]
    base = min(base, count - 3)
    spec = CausalLMSpec(family="causal_lm", config=shape, master="bfloat16")
    tail = [f"layer{count - 2}", f"layer{count - 1}", "head"]
    names = {
        "stage1": ["embed", *(f"layer{index}" for index in range(base)), *tail],
        "stage2": [f"layer{base}", *tail],
        "e2e": ["embed", *(f"layer{index}" for index in range(count)), "head"],
    }[kind]
    parts = {}
    for name in names:
        part = build_part(spec, name, device)
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        if bits != "full":
            quantize(part, bits, torch.bfloat16)  # type: ignore[arg-type]  # a choice of the command line
        parts[name] = part
    path = Chain(parts, names, activations="keep" if kind == "stage2" else "recompute")
    for part in parts.values():
        if rank is not None:
            add_lora(part, LoraSpec(rank=rank), seed=0)
        if isinstance(part, Head) and (rank is not None or settings["lm_head"] == "frozen"):
            part.output_layer().requires_grad_(False)
    path.to(device).train(True)
    trained = [parameter for parameter in path.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(OptimizerSpec(name=settings["optimizer"], lr=1e-6), trained)
    rows, length = settings["micro"], settings["length"]
    ids = torch.randint(shape["vocab_size"], (rows, length), device=device)
    hidden = torch.randn((rows, length, shape["hidden_size"]), device=device, dtype=torch.bfloat16)
    entering = hidden if kind == "stage2" else ids
    context = Frame(spec, device)(entering, torch.arange(length, device=device)[None].expand(rows, -1))
    targets = torch.randint(shape["vocab_size"], (rows * length,), device=device)

    def step() -> None:
        with autocast("bf16", device):
            output = path((entering,), context)
        torch.autograd.backward(readout.loss(output, targets))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        step()
    synchronize()
    meter = PeakMeter(device, host=False)
    started = time.perf_counter()
    for _ in range(settings["steps"]):
        step()
    synchronize()
    seconds = time.perf_counter() - started
    peak = meter.stop()
    return {
        "peak_allocated_bytes": peak.device,
        "peak_reserved_bytes": peak.device_reserved,
        "tokens_per_s": rows * length * settings["steps"] / seconds,
        "trainable": sum(parameter.numel() for parameter in trained),
        "parameters": sum(parameter.numel() for parameter in path.parameters()),
    }


def main(arguments: list[str]) -> Any:
    what, given = arguments
    if what == "case":
        return case(json.loads(given))
    return (make if what == "make" else stage)(Path(given))


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
