"""`python -m benchmarks [NAME…] [--quick]`: run benchmarks and write benchmarks/results/<name>.{json,md}.

Options of one benchmark need its name: `python -m benchmarks segprop_vs_e2e --model resnet50`.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness

#: Name -> (folder, what it answers), in the order in which all are run.
NAMES = {
    "startup": ("driver", "how long until something happens"),
    "augment": ("data", "images a second of the view pipeline, beside torchvision's transforms"),
    "checkpoints": ("training", "a stage with a checkpoint every 20 s beside one without: time and memory"),
    "clocks": ("training", "what counting the time of a stage costs its steps"),
    "memory": ("training", "peak memory of each stage, beside end-to-end training"),
    "overhead": ("driver", "an orchestrated run beside a plain PyTorch loop"),
    "production": ("store", "the first epoch of a stage whose snapshots are made before it, or while it trains"),
    "driver_scale": ("driver", "what the driver alone can do: thousands of nodes, hundreds of made-up devices"),
    "growth": ("driver", "how the work of the driver grows: nodes of a plan, trials of a sweep, files of a store"),
    "segprop_vs_e2e": ("training", "a whole SegProp run beside an end-to-end run"),
    "sweep": ("training", "a sweep beside its trials as runs of their own"),
    "snapcheck": ("store", "the snapshot store beside the hardware and other formats"),
    "wavefront": ("driver", "overlapping stages beside stages one after the other: time and quality"),
    "lm_stage": ("language", "tokens a second of a language model's stage, beside an end-to-end step"),
    "lm_peers": ("language", "a fine-tune beside transformers' Trainer and PEFT"),
    "lm_loss": ("language", "the loss of a language model in pieces, beside the whole logits and Liger's kernel"),
    "encodings": ("store", "what an encoding of snapshots saves, costs, and does to the numbers"),
    "policy": ("store", "snapshots or recompute: do the predictions come true, is the decided way the faster one"),
    "lm_trace": ("language", "what a language model's stage holds, traced without a device, beside the plan"),
    "lm_memory": ("language", "what a language model's stage holds: host of a worker, device of the 8B shape"),
}


def main(arguments: Sequence[str]) -> int:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(NAMES)}; all by default")
    common.add_argument("--quick", action="store_true", help="seconds instead of minutes; for trying, not for quoting")
    common.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the results")
    chosen, others = common.parse_known_args(arguments)
    names = chosen.names or list(NAMES)
    # An option's value looks like a name to this first look; the benchmark's own parser knows better.
    names = [name for name in names if name in NAMES] if others else names
    unknown = [name for name in names if name not in NAMES]
    helping = {"-h", "--help"} & set(others)
    if unknown or (helping and len(names) != 1):
        parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__, parents=[common])
        if unknown:
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(NAMES)}")
        parser.print_help()
        return 0
    if len(names) == 1:
        return run(names[0], common, arguments)
    if others:
        common.error(f"{' '.join(others)}: options of a benchmark need exactly one NAME")
    # Each in a process of its own: none inherits another's threads, caches or peak memory.
    options = ["--out", str(chosen.out), *(["--quick"] if chosen.quick else [])]
    codes = [
        subprocess.run([sys.executable, "-m", "benchmarks", name, *options], check=False).returncode for name in names
    ]
    return max(codes)


def run(name: str, common: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    folder, question = NAMES[name]
    module = importlib.import_module(f"benchmarks.{folder}.{name}")
    parser = argparse.ArgumentParser(f"python -m benchmarks {name}", description=module.__doc__, parents=[common])
    module.add_arguments(parser)
    options = parser.parse_args(arguments)
    if options.names != [name]:
        parser.error(f"give one NAME with options of a benchmark, not {' '.join(options.names)}")
    context = harness.context(arguments)
    harness.say(f"{name}: {question}")
    report: harness.Report = module.run(options)
    report.settings = {"quick": options.quick, **report.settings}
    if hasattr(module, "result_name"):
        name = module.result_name(options)
    # Quick figures never replace real ones.
    paths = harness.write(report, f"{name}.quick" if options.quick else name, context, options.out)
    print(harness.markdown(report, name, context))
    for path in paths:
        harness.say(f"written: {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
