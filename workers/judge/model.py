"""Load a language model out of a Hugging Face folder, with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cache_store.errors import DataError, UserError, first_line

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class JudgedModel:
    """A transformers model in evaluation mode and its tokenizer."""

    model: Any
    tokenizer: Any


def check_folder(folder: Path) -> None:
    """Raise DataError when `folder` is not a model that transformers can load; imports nothing heavy."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; a model is a folder as save_pretrained or segprop export writes it")
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: not a model folder, it has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise DataError(f"{folder}: not a model folder, it has no .safetensors weights (pickled ones are not read)")


def load_model(folder: Path, *, device: str = "cpu", dtype: Dtype = "auto") -> JudgedModel:
    """Load the model in `folder` onto `device`. `auto`: in the type its config names.

    DataError when the folder holds no causal language model or no tokenizer; UserError for an unknown device."""
    check_folder(folder)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {device}: {first_line(error)}") from error
    reporting: Any = logging
    bars = reporting.is_progress_bar_enabled()
    reporting.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
        model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, use_safetensors=True, **options)
    except Exception as error:
        # transformers raises anything from OSError to KeyError for a folder that is not what it should be.
        raise DataError(f"{folder}: transformers cannot load it: {type(error).__name__}: {error}") from error
    finally:
        if bars:
            reporting.enable_progress_bar()
    return JudgedModel(model.to(place).eval(), tokenizer)
