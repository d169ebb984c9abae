"""The formats of text data, by the name that a configuration gives as `data.name`: a row each.

To add a format: write a `Corpus` that finds its documents and reads them, and add its row here and its name to
`TextSpec.name`. Loads no torch and no transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from workers.data.text.corpora.base import BYTES_PER_TOKEN, Corpus
from workers.data.text.corpora.file_corpus import CHATS, TEXTS, FileCorpus
from workers.data.text.corpora.hub import HubCorpus
from workers.data.text.corpora.multiple_choice import MMLU, WinoGrande
from workers.data.text.corpora.sections import Sections, too_few
from workers.data.text.corpora.stdlib import StdlibCorpus
from workers.data.text.tokens.encode import Encoder, chat_encoder, question_encoder, text_encoder
from workers.data.text.tokens.tokenizers import Tokenizer
from workers.specs.language import TextSpec

#: How documents become samples: one each; joined, and cut wherever a sample is full; or joined as long as whole ones
#: fit.
Packing = Literal["none", "cut", "whole"]


@dataclass(frozen=True)
class TextFormat:
    """A kind of text data. `open` finds its documents; `encoder` makes what turns them into tokens (ConfigError when
    the tokenizer cannot do what that needs); `running`: whether documents are running text, which may be packed;
    `candidates`: answers of a question, of which training takes one (1: there are no questions); `rendered`: a template
    writes documents, and may refuse one."""

    open: Callable[[TextSpec], Corpus]
    encoder: Callable[[Tokenizer, TextSpec], Encoder]
    running: bool = False
    candidates: int = 1
    rendered: bool = False


TEXT_FORMATS: dict[str, TextFormat] = {
    "text": TextFormat(partial(FileCorpus, contents=TEXTS), text_encoder, running=True),
    "chat": TextFormat(partial(FileCorpus, contents=CHATS), chat_encoder, rendered=True),
    "mmlu": TextFormat(MMLU, question_encoder, candidates=4),
    "winogrande": TextFormat(WinoGrande, question_encoder, candidates=2),
    "hub": TextFormat(HubCorpus, text_encoder, running=True),
    "stdlib": TextFormat(StdlibCorpus, text_encoder, running=True),
}


def open_corpus(data: TextSpec) -> Corpus:
    """Find the documents of a data set. Running text of too few documents to hold some out is split inside them, with
    gaps of about a sample. Errors as `inspect_text`."""
    form = TEXT_FORMATS[data.name]
    corpus = form.open(data)
    held_out = too_few(corpus.documents, {"validation": data.validation, "test": data.test}) if form.running else {}
    return Sections(corpus, held_out, data.sequence_length * BYTES_PER_TOKEN) if held_out else corpus


def packing_of(data: TextSpec) -> Packing:
    """Return how documents are joined into samples."""
    form = TEXT_FORMATS[data.name]
    if form.running:
        return "cut" if data.pack else "none"
    return "whole" if form.rendered and data.pack is True else "none"


def data_is_packed(data: TextSpec) -> bool:
    """Return whether documents are joined into samples."""
    return packing_of(data) != "none"
