"""Make a GGUF file of an exported language model, by llama.cpp's own converter where it is on this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cache_store.errors import SegpropError, UserError
from cache_store.storage.durable import put_in_place, typed_errors

#: The converter in a checkout of llama.cpp.
SCRIPT = "convert_hf_to_gguf.py"
#: What a file may hold, as the converter calls it; auto: the type the model is in, of 16 bits where it can be.
TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
#: Lines of its output that are shown where it fails.
_SHOWN = 3


def converter(place: Path, kind: str = "auto") -> Path:
    """Return the script: `place` itself, or the one in that checkout of llama.cpp. UserError where there is none, or
    where `kind` is none of `TYPES`."""
    if kind not in TYPES:
        raise UserError(f"--gguf-type: {kind}: is none; allowed: {', '.join(TYPES)}")
    script = place / SCRIPT if place.is_dir() else place
    if not script.is_file():
        raise UserError(f"--gguf: {script}: there is no such file; give a checkout of llama.cpp, or its {SCRIPT}")
    return script


def convert(script: Path, folder: Path, target: Path, kind: str) -> None:
    """Run the converter on an exported folder, in a process of its own; `target` appears when it is whole.

    UserError where the folder is no model of transformers, SegpropError with the converter's last words where it
    fails."""
    if not (folder / "config.json").is_file():
        raise UserError(f"--gguf: {folder}: is no language model of transformers, it has no config.json")
    partial = target.with_name(f".{target.name}")
    with typed_errors("write", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        command = [sys.executable, str(script), str(folder), "--outfile", str(partial), "--outtype", kind]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if done.returncode != 0 or not partial.is_file():
            partial.unlink(missing_ok=True)
            said = " / ".join(line.strip() for line in done.stdout.strip().splitlines()[-_SHOWN:]) or "said nothing"
            raise SegpropError(f"{script.name} failed on {folder} ({done.returncode}): {said}")
        put_in_place(partial, target)
