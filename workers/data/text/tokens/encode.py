"""Documents to tokens with flags, in batches: running text, chats, questions with their candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cache_store.errors import ConfigError
from workers.data.text.corpora.base import Record, broken, text_of
from workers.data.text.corpora.findings import Findings
from workers.data.text.tokens.chat import ChatTemplate
from workers.data.text.tokens.tokenizers import Tokenizer
from workers.specs.language import TextSpec


@dataclass
class Encoded:
    """Token sequences one after the other. `tokens` int32 and `flags` uint8 (this token may be a target), both
    (total,); `lengths` int64, one a sequence (0: an empty document); `owners` int64: which of the batch's records
    it came from; `correct` uint8: it is the right candidate (of what has no candidates: 1); `findings`: what was odd in
    the records."""

    tokens: np.ndarray
    flags: np.ndarray
    lengths: np.ndarray
    owners: np.ndarray
    correct: np.ndarray
    findings: Findings = field(default_factory=Findings)


#: Records to sequences; the second argument: keep all candidates of a question, or only the correct one.
Encoder = Callable[[Sequence[Record], bool], Encoded]


def chat_encoder(tokenizer: Tokenizer, data: TextSpec) -> Encoder:
    """Make an encoder of chats. ConfigError: the tokenizer has no chat template, or does not say where tokens lie."""
    template = ChatTemplate(tokenizer, data.targets)
    return lambda records, candidates: _chats(records, template)


def question_encoder(tokenizer: Tokenizer, data: TextSpec) -> Encoder:
    """Make an encoder of questions."""
    return lambda records, candidates: _questions(records, candidates, tokenizer)


def text_encoder(tokenizer: Tokenizer, data: TextSpec) -> Encoder:
    """Make an encoder of running text. ConfigError: the tokenizer has no end-of-text token."""
    if tokenizer.eos is None:
        raise ConfigError("model.tokenizer: it has no end-of-text token, which documents are joined with")
    return lambda records, candidates: _texts(records, tokenizer)


def _chats(records: Sequence[Record], template: ChatTemplate) -> Encoded:
    findings = Findings()
    encoded = _sequences(template.encode(records, findings))
    encoded.findings = findings
    return encoded


def _sequences(flagged: Sequence[tuple[np.ndarray, np.ndarray]]) -> Encoded:
    lengths = np.array([len(tokens) for tokens, _ in flagged], np.int64)
    return Encoded(
        tokens=np.concatenate([np.empty(0, np.int32), *(tokens for tokens, _ in flagged)]),
        flags=np.concatenate([np.empty(0, np.uint8), *(flags for _, flags in flagged)]),
        lengths=lengths,
        owners=np.arange(len(lengths)),
        correct=np.ones(len(lengths), np.uint8),
    )


def _texts(records: Sequence[Record], tokenizer: Tokenizer) -> Encoded:
    """Every token is a target but a document's first; a document ends with the end-of-text token."""
    texts = [text_of(record) for record in records]
    end = np.array([tokenizer.eos], np.int32)
    flagged = []
    for text, tokens in zip(texts, tokenizer.encode(texts), strict=True):
        if not text:
            whole = tokens[:0]
        else:
            # Some tokenizers end a text themselves.
            whole = tokens if tokens.size and tokens[-1] == end[0] else np.concatenate([tokens, end])
        flags = np.ones(len(whole), np.uint8)
        flags[:1] = 0
        flagged.append((whole, flags))
    return _sequences(flagged)


def _questions(records: Sequence[Record], candidates: bool, tokenizer: Tokenizer) -> Encoded:
    """Only the continuation's tokens are targets: those beyond as many as the context alone has, the way
    lm-evaluation-harness splits them (spaces that end a context count as the continuation's)."""
    owners, correct, wholes, contexts = [], [], [], []
    for number, record in enumerate(records):
        for index, candidate in enumerate(record.value.candidates):
            if candidates or index == record.value.correct:
                owners.append(number)
                correct.append(index == record.value.correct)
                wholes.append(candidate.context + candidate.continuation)
                contexts.append(candidate.context.rstrip())
    # Candidates that share a context have it tokenized once.
    different = list(dict.fromkeys(contexts))
    length_of = {context: len(tokens) for context, tokens in zip(different, tokenizer.encode(different), strict=True)}
    flagged = []
    for owner, context, tokens in zip(owners, contexts, tokenizer.encode(wholes), strict=True):
        flags = np.zeros(len(tokens), np.uint8)
        flags[max(1, length_of[context]) :] = 1
        if not flags.any():
            raise broken(records[owner], "an answer of this question has no token of its own")
        flagged.append((tokens, flags))
    result = _sequences(flagged)
    result.owners = np.array(owners, np.int64)
    result.correct = np.array(correct, np.uint8)
    return result
