"""Identify the files beside a model's weights that change what it computes, is fed or exports."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from cache_store.errors import ConfigError
from cache_store.keys import digest_json
from workers.data.text.tokens.tokenizers import load_tokenizer
from workers.models.causal_lm.network.skeleton import build_skeleton
from workers.models.causal_lm.pretrained.import_parts import companion_files
from workers.models.causal_lm.pretrained.locate import Located
from workers.specs.language import CausalLMSpec
from workers.specs.model import FileDigests

#: Package into which transformers puts the code that comes with checkpoints.
_DYNAMIC = "transformers_modules"


def file_digests(whole: CausalLMSpec, located: Located | None) -> FileDigests:
    """Digest tokenizer, companion files and model code of a spec whose `config` is the whole architecture.

    None for what is not there or cannot be read: who needs it reports that.
    """
    return FileDigests(tokenizer=_tokenizer(whole), companions=_companions(whole, located), code=_code(whole, located))


def _tokenizer(whole: CausalLMSpec) -> str | None:
    """By content, chat template included, wherever it was loaded from."""
    if whole.tokenizer is None and whole.path is None:
        return None
    try:
        return load_tokenizer(whole).digest
    except ConfigError:
        return None


def _companions(whole: CausalLMSpec, located: Located | None) -> str | None:
    """What an export copies. A GGUF file's own are inside it, so the digest of the weights covers them."""
    if located is not None and located.gguf is not None and whole.tokenizer is None:
        return None
    try:
        files = companion_files(replace(whole, gguf=None), None if located is None else replace(located, gguf=None))
    except (ConfigError, OSError):
        return None
    return _digest(files.items()) if files else None


def _code(whole: CausalLMSpec, located: Located | None) -> str | None:
    """Every Python file of a trusted checkpoint, and those of another repository that its `auto_map` names."""
    if not whole.trust_remote_code or located is None:
        return None
    files = _sources(located.folder)
    if "--" in str((whole.config or {}).get("auto_map")):
        model = build_skeleton(whole)
        for made in (type(model), type(model.config)):
            source = getattr(sys.modules.get(made.__module__), "__file__", None)
            if made.__module__.startswith(_DYNAMIC) and source is not None:
                files |= {f"{_DYNAMIC}/{name}": data for name, data in _sources(Path(source).parent).items()}
    return _digest(files.items())


def _sources(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}


def _digest(files: Iterable[tuple[str, bytes]]) -> str:
    contents: Mapping[str, str] = {name: hashlib.sha256(data).hexdigest() for name, data in files}
    return digest_json(contents)
