"""Look at what a machine has of what runs need, and say how to get what is missing: `segprop doctor`.

Writes one file without a name where results would go, to see how fast the disk is; a store that it is to try is made if
it is not there."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import psutil

from cache_store.errors import SegpropError
from cache_store.storage.open import open_storage
from orchestrator.environment import describe_environment, gpus
from orchestrator.units import human_bytes

OK, NOTE, PROBLEM = "ok", "note", "problem"
#: Bytes written to see how fast a disk is, and speeds below which snapshots wait for it.
_WRITTEN = 64 << 20
_SLOW_DISK = 100e6
#: Free space and memory below which the smaller examples do not run.
_LITTLE_DISK, _LITTLE_MEMORY = 5_000_000_000, 4_000_000_000
#: Package -> extra that brings it, and what it is for.
EXTRAS: Mapping[str, tuple[str, str]] = {
    "peft": ("lm", "low-rank adapters"),
    "datasets": ("lm", "data sets of the hub"),
    "gguf": ("lm", "GGUF files"),
    "accelerate": ("lm", "loading language models"),
    "lm_eval": ("eval", "`segprop judge`"),
    "obstore": ("s3", "stores on S3, GCS and Azure"),
    "bitsandbytes": ("quantized", "8-bit optimizers and weights (CUDA)"),
    "torchao": ("torchao", "optimizers with 4-bit states"),
    "deepspeed": ("deepspeed", "resources.gang.strategy: zero3"),
}
#: Environment variables that hold what others ask for, and what for; never shown.
TOKENS = {
    "HF_TOKEN": "gated models of the Hugging Face hub",
    "AWS_ACCESS_KEY_ID": "stores on S3",
    "GOOGLE_APPLICATION_CREDENTIALS": "stores on GCS",
    "AZURE_STORAGE_ACCOUNT_NAME": "stores on Azure",
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `state`: ok, note (something is left out without it), problem; `remedy`: how to mend it."""

    name: str
    state: str
    found: str
    remedy: str = ""


def examine(folder: Path, store: str | None = None) -> Iterator[Finding]:
    """Yield what is found, one thing at a time. `folder`: where results would go; `store`: an address to try, too."""
    yield from _versions()
    yield from _extras()
    yield from _devices()
    yield _memory()
    yield from _disk(folder)
    yield _shared_memory()
    if store is not None:
        yield _store(store)
    yield from _tokens()


def _versions() -> Iterator[Finding]:
    machine = describe_environment()
    yield Finding("python", OK, f"{machine.python} on {machine.system}, {machine.cpu}, {machine.cores} cores")
    for name in ("segprop", "torch", "torchvision", "transformers", "ray"):
        version = machine.packages.get(name)
        if version is None:
            yield Finding(name, PROBLEM, "not installed", "pip install segprop, or `make setup` in a checkout")
        else:
            yield Finding(name, OK, version)


def _extras() -> Iterator[Finding]:
    for package, (extra, purpose) in EXTRAS.items():
        if find_spec(package) is not None:
            yield Finding(package, OK, _version(package))
        else:
            yield Finding(package, NOTE, f"not installed: no {purpose}", f"pip install 'segprop[{extra}]'")


def _version(package: str) -> str:
    try:
        return metadata.version(package.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return "installed"


def _devices() -> Iterator[Finding]:
    seen = gpus()
    for number, gpu in enumerate(seen):
        size = "" if gpu.memory_bytes is None else f", {human_bytes(gpu.memory_bytes)}"
        yield Finding(f"GPU {number}", OK, f"{gpu.name}{size}")
    if not seen:
        yield Finding(
            "GPU", NOTE, "none: everything runs on the CPU", "fine for small networks; see configs/*_cpu.yaml"
        )
        return
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        remedy = (
            "this torch is built without CUDA: install one from pytorch.org's CUDA index"
            if built is None
            else f"torch is built for CUDA {built}: the driver may be older, see `nvidia-smi`"
        )
        yield Finding("CUDA", PROBLEM, "there is a GPU, and torch cannot use it", remedy)
        return
    bf16 = "bf16 in hardware" if torch.cuda.is_bf16_supported(including_emulation=False) else "bf16 emulated: use fp16"
    yield Finding("CUDA", OK, f"{torch.version.cuda}, {bf16}")


def _memory() -> Finding:
    found = psutil.virtual_memory()
    words = f"{human_bytes(found.available)} of {human_bytes(found.total)} free"
    if found.available < _LITTLE_MEMORY:
        return Finding("memory", NOTE, words, "lower resources.slots: every slot is a process with a network")
    return Finding("memory", OK, words)


def _disk(folder: Path) -> Iterator[Finding]:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < _LITTLE_DISK:
        remedy = "set run_dir or store to another disk, or snapshots.budget; `segprop clean runs` frees some"
        yield Finding("disk", NOTE, f"{human_bytes(free)} free in {place}", remedy)
    else:
        yield Finding("disk", OK, f"{human_bytes(free)} free in {place}")
    if free < 2 * _WRITTEN:
        return
    try:
        speed = _write_speed(place)
    except OSError as error:
        yield Finding(
            "disk", PROBLEM, f"{place} cannot be written: {error.strerror or error}", "set run_dir to another folder"
        )
        return
    words = f"{human_bytes(round(speed))}/s written"
    if speed < _SLOW_DISK:
        yield Finding("disk speed", NOTE, words, "stages may wait for snapshots: snapshots.costs: measured weighs that")
    else:
        yield Finding("disk speed", OK, words)


def _write_speed(place: Path) -> float:
    """Write a file, with all of it on the disk at the end, and return bytes a second."""
    data = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=place) as file:
        start = time.perf_counter()
        for _ in range(_WRITTEN >> 20):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return _WRITTEN / (time.perf_counter() - start)


def _shared_memory() -> Finding:
    """Ray keeps what passes between processes in /dev/shm; elsewhere it takes a folder."""
    if platform.system() != "Linux":
        return Finding("shared memory", OK, "not needed here")
    size = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    if size < 1 << 30:
        remedy = "in a container: --shm-size=4g; or resources.runner: local, which needs none"
        return Finding(
            "shared memory", NOTE, f"/dev/shm has {human_bytes(size)}: Ray is slow with less than 1 GiB", remedy
        )
    return Finding("shared memory", OK, f"/dev/shm has {human_bytes(size)}")


def _store(store: str) -> Finding:
    """Open a store as a run would, which tries whether it can be written and read."""
    try:
        open_storage(store)
    except SegpropError as error:
        return Finding("store", PROBLEM, f"{store}: {error.message}", "docs/storage.md says what each kind needs")
    return Finding("store", OK, f"{store} can be written and read")


def _tokens() -> Iterator[Finding]:
    for name, purpose in TOKENS.items():
        file = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "token"
        if os.environ.get(name):
            yield Finding(name, OK, "set")
        elif name == "HF_TOKEN" and file.is_file():
            yield Finding(name, OK, "logged in")
        else:
            yield Finding(
                name, NOTE, f"not set: no {purpose}", f"export {name}=… where that is wanted, or write it into .env"
            )


def show(findings: Iterator[Finding]) -> list[Finding]:
    """Print findings as they come, and return them."""
    seen = []
    for found in findings:
        mark = {OK: "  ok   ", NOTE: "  note ", PROBLEM: "PROBLEM"}[found.state]
        print(f"{mark}  {found.name}: {found.found}{f'; {found.remedy}' if found.remedy else ''}", flush=True)
        seen.append(found)
    problems = sum(found.state == PROBLEM for found in seen)
    print(f"{problems or 'no'} problem{'' if problems == 1 else 's'}", flush=True)
    return seen
