"""A model's weights as parts, one part at a time, wherever they come from; and the files that belong to it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from cache_store.errors import first_line
from workers.data.text.gguf_reading import quicken
from workers.models.causal_lm.errors import refuse
from workers.models.causal_lm.network.parts import part_names
from workers.models.causal_lm.network.random_init import random_state
from workers.models.causal_lm.network.skeleton import build_skeleton, is_tied
from workers.models.causal_lm.network.structure import structure
from workers.models.causal_lm.pretrained.checkpoint import Checkpoint
from workers.models.causal_lm.pretrained.configs import config_json
from workers.models.causal_lm.pretrained.locate import COMPANIONS, Located, locate
from workers.specs.export_files import TRAINED_QUESTIONS
from workers.specs.language import CausalLMSpec


def import_parts(spec: CausalLMSpec, seed: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name and state of every part in order, on the host in the master type.

    `spec.config` holds the whole architecture (see `inspect`). With `path`: the checkpoint's tensors, read one at a
    time (safetensors or GGUF); without: random ones from the seed. The generator holds one part and one tensor, as
    long as the caller lets each part go. All problems of a checkpoint's files are raised before the first part.
    """
    located = locate(spec, weights=True)
    if located is None:
        yield from _random_parts(spec, seed)
        return
    checkpoint = Checkpoint(spec, located)
    if is_tied(spec) and not checkpoint.holds_one_matrix():
        # Of the hub, whose weights planning does not load.
        raise refuse(
            f"{spec.path} says tie_word_embeddings: true, but its embedding and LM head differ; allowed: false",
            "model.config",
            value=True,
        )
    for name in part_names(spec):
        yield name, checkpoint.state(name)


def _random_parts(spec: CausalLMSpec, seed: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    found = structure(spec)
    embedding, lm_head = f"{found.embedding}.weight", f"{found.lm_head}.weight"
    matrix: Tensor | None = None
    for name in part_names(spec):
        state = random_state(spec, name, seed)
        if is_tied(spec):
            matrix = state.get(embedding, matrix)
            if lm_head in state and matrix is not None:
                state[lm_head] = matrix.clone()
        yield name, state


def companions(spec: CausalLMSpec) -> dict[str, bytes]:
    """The small files of an export by name: config.json, generation_config.json, tokenizer and chat template; and the
    model's own code, where it is trusted: nothing else can load the export.

    Of the tokenizer's own folder or hub id where `spec.tokenizer` names one; a byte tokenizer has no files.
    """
    files = {"config.json": config_json(spec, type(build_skeleton(spec)).__name__)}
    return files | companion_files(spec, locate(spec, weights=False))


def companion_files(spec: CausalLMSpec, located: Located | None) -> dict[str, bytes]:
    """As `companions`, of a model that was located, without the config.json that is made for it."""
    files: dict[str, bytes] = {}
    if located is not None:
        files |= _from_gguf(located.gguf) if located.gguf is not None else _from_folder(located.folder)
        if spec.trust_remote_code:
            files |= {path.name: path.read_bytes() for path in sorted(located.folder.glob("*.py"))}
    if spec.tokenizer == "bytes":
        return {name: data for name, data in files.items() if not _is_tokenizer(name)}
    if spec.tokenizer is not None:
        other = locate(replace(spec, path=spec.tokenizer, revision=None, gguf=None), weights=False)
        assert other is not None
        files = {name: data for name, data in files.items() if not _is_tokenizer(name)}
        files |= {name: data for name, data in _from_folder(other.folder).items() if _is_tokenizer(name)}
    return files


def _is_tokenizer(name: str) -> bool:
    return name not in ("config.json", "generation_config.json", TRAINED_QUESTIONS) and not name.endswith(".py")


def _from_folder(folder: Path) -> dict[str, bytes]:
    paths = sorted({path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()})
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _from_gguf(path: Path) -> dict[str, bytes]:
    """The tokenizer inside a GGUF file, as transformers writes it."""
    from transformers import AutoTokenizer

    try:
        quicken()
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except (ValueError, OSError, KeyError, TypeError, ImportError, NotImplementedError) as e:
        raise refuse(f"the tokenizer inside {path} cannot be read: {first_line(e)}", "model.gguf") from e
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _from_folder(Path(folder))
