"""Small text data sets, tokenizers made on the spot, and where the shared real data lies."""

from __future__ import annotations

import csv
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from real_model import gguf_file

from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage
from workers.data.text.prepare import prepare_text
from workers.data.text.source import TextSource
from workers.specs.data_results import TextDataResult
from workers.specs.experiment import Experiment
from workers.specs.language import CausalLMSpec, TextSpec

SHARED = Path(os.environ.get("SEGPROP_SHARED") or Path(__file__).resolve().parents[3] / "shared")
BYTES = CausalLMSpec(family="causal_lm", tokenizer="bytes", config={"vocab_size": 257, "max_position_embeddings": 4096})
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def shared(name: str) -> str:
    """A folder of the shared real data; the test is skipped where it is not there."""
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"needs {folder} (SEGPROP_SHARED names its parent): the real data set {name}")
    return str(folder)


def smollm() -> CausalLMSpec:
    """SmolLM2-135M-Instruct's tokenizer out of its GGUF file."""
    pytest.importorskip("gguf", reason="needs the package gguf, to read SmolLM2's tokenizer")
    file = gguf_file()
    config = {"vocab_size": 49152, "max_position_embeddings": 8192}
    return CausalLMSpec(family="causal_lm", path=str(file.parent), gguf=file.name, config=config)


def store() -> SnapshotStore:
    return SnapshotStore(open_storage(f"memory://{uuid.uuid4().hex}"))


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path: Path, columns: Mapping[str, Any], row_group_size: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path, row_group_size=row_group_size)
    return path


def texts(count: int, words: int = 5) -> list[str]:
    """Different short documents, not all ASCII."""
    return [" ".join(f"wörd{(i * 7 + k) % 50}" for k in range(1 + (i * 3) % words)) + f" #{i}" for i in range(count)]


def word_tokenizer(
    folder: Path, template: str | None = CHATML, eos: str | None = "<|im_end|>", bos: bool = False
) -> Any:
    """A fast tokenizer of bytes with a few merges, saved as `save_pretrained` does; `bos` puts <s> before texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the answer is assistant user system", *texts(20)], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token="<s>" if bos else None)
    whole.chat_template = template
    whole.save_pretrained(str(folder))
    return whole


def spec_of(tokenizer: Path, **config: Any) -> CausalLMSpec:
    return CausalLMSpec(family="causal_lm", tokenizer=str(tokenizer), config={"vocab_size": 400, **config})


def source_of(
    data: TextSpec,
    model: CausalLMSpec = BYTES,
    split: str = "train",
    snapshots: SnapshotStore | None = None,
    seed: int = 0,
    result: TextDataResult | None = None,
) -> TextSource:
    snapshots = snapshots or store()
    result = result or prepare_text(data, model, seed, snapshots)
    return TextSource(Experiment(model=model, data=data, classes=1, seed=seed), result, snapshots, split)


def samples_of(source: TextSource) -> list[tuple[list[int], list[int], list[int]]]:
    """(tokens, positions, places in the sample that count as targets) of every sample, read one at a time."""
    found = []
    for row in range(source.rows):
        batch = source.batch(np.array([row]))
        assert batch.attention_mask is None
        assert (batch.targets == batch.ids[0][batch.where + 1]).all()
        found.append((batch.ids[0].tolist(), batch.position_ids[0].tolist(), (batch.where + 1).tolist()))
    return found


def mmlu_folder(
    root: Path,
    subjects: Sequence[str] = ("high_school_art", "anatomy"),
    questions: int = 9,
    training: int = 12,
    validation: int = 4,
) -> str:
    """Write MMLU as CSV: the first subject with a header and answers 0 to 3, the others as published. `validation`: 0
    for no val files."""
    for subject in subjects:
        for split, count in (("dev", 3), ("val", validation), ("test", questions)):
            if not count:
                continue
            first = subject == subjects[0]
            header = [["question", "choice0", "choice1", "choice2", "choice3", "answer"]] if first else []
            rows = [_mmlu_row(f"{subject} {split}", i, i % 4 if first else "ABCD"[i % 4]) for i in range(count)]
            _write_csv(root / split / f"{subject}_{split}.csv", header + rows)
    return mmlu_training(root, training)


def mmlu_training(root: Path, questions: int = 12) -> str:
    """Write two files of auxiliary_train, without headers as published, beside whatever lies at `root`."""
    for name, rows in (("aux_law", range(questions // 2)), ("race", range(questions // 2, questions))):
        _write_csv(root / "auxiliary_train" / f"{name}.csv", [_mmlu_row("training", i, "ABCD"[i % 4]) for i in rows])
    return str(root)


def _mmlu_row(what: str, number: int, answer: Any) -> list[Any]:
    return [f' {what} {number},\n"why"? ', *(f"c{number}{k}" for k in range(4)), answer]


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)


def merging_tokenizer(*added: str, merges: Iterable[tuple[str, str]] = (), spaces: bool = False) -> Any:
    """A fast tokenizer of bytes, `merges` over any boundary, the added tokens `<s>`, `</s>` and these; with `spaces`
    it puts one before every stretch of text, as SentencePiece models do."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pairs = list(merges)
    for pair in pairs:
        vocabulary["".join(pair)] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if spaces:
        inner.normalizer = normalizers.Prepend(" ")
    whole = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>")  # type: ignore[no-untyped-call]
    whole.add_special_tokens({"additional_special_tokens": list(added)})
    return whole
