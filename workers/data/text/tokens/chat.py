"""Chat records through a tokenizer's own template: tokens, and which of them the assistant said."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from cache_store.errors import ConfigError
from workers.data.text.corpora.base import Record, broken
from workers.data.text.tokens.tokenizers import PretrainedTokenizer, Tokenizer, clean

#: Templates that mark what the assistant says, so that transformers can tell its tokens from the rest.
_GENERATION = re.compile(r"\{%-?\s*generation\b")
_ANSWERS = "assistant"

#: A token sequence and a flag a token: does it count as a target.
Flagged = tuple[np.ndarray, np.ndarray]


class ChatTemplate:
    """Renders records with one tokenizer. ConfigError when that has no template, or cannot tell where tokens lie."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        inner = tokenizer.tokenizer if isinstance(tokenizer, PretrainedTokenizer) else None
        template = getattr(inner, "chat_template", None)
        if inner is None or not template:
            raise ConfigError(
                "model.tokenizer: this tokenizer has no chat template; allowed for data.name chat: the tokenizer of a "
                "model tuned on chats, or one whose chat_template you have set"
            )
        if not inner.is_fast:
            raise ConfigError(
                "model.tokenizer: chat needs a fast tokenizer (tokenizer.json), which says where tokens lie"
            )
        self._tokenizer = inner
        marked = template if isinstance(template, str) else template.get("default", "")
        self._marks = bool(_GENERATION.search(marked))

    def encode(self, records: Sequence[Record]) -> list[Flagged]:
        """int32 tokens and uint8 flags of each record. DataError, naming the record: it is no list of messages, has
        no answer, or the template refuses it."""
        conversations = [_messages(record) for record in records]
        if self._marks:
            return [self._marked(record, talk) for record, talk in zip(records, conversations, strict=True)]
        texts, spans = [], []
        for record, talk in zip(records, conversations, strict=True):
            text, answers = self._answers(record, talk)
            texts.append(text)
            spans.append(answers)
        # The template writes the special tokens itself.
        encoded = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
        )
        result = []
        for record, tokens, offsets, answers in zip(
            records, encoded["input_ids"], encoded["offset_mapping"], spans, strict=True
        ):
            places = np.array(offsets, np.int64).reshape(-1, 2)
            starts, stops = np.array(answers, np.int64).T
            # A token counts when all of it lies in an answer: one that began before it was not the assistant's to say.
            owner = np.searchsorted(starts, places[:, 0], side="right") - 1
            inside = (owner >= 0) & (places[:, 1] <= stops[owner]) & (places[:, 1] > places[:, 0])
            result.append(_flagged(record, tokens, inside))
        return result

    def _marked(self, record: Record, messages: list[dict[str, Any]]) -> Flagged:
        encoded = self._render(record, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return _flagged(record, encoded["input_ids"], np.array(encoded["assistant_masks"], bool))

    def _answers(self, record: Record, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and where in it each answer begins and ends (its end-of-turn token included)."""
        whole = self._render(record, messages, tokenize=False)
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != _ANSWERS:
                continue
            after = self._render(record, messages[: turn + 1], tokenize=False)
            before = self._before(record, messages[: turn + 1], after)
            if not (after.startswith(before) and whole.startswith(after)):
                raise broken(
                    record,
                    f"the chat template writes the turns before message {turn} differently once it follows, so its "
                    "answer cannot be found; allowed: a template that marks answers with {% generation %}, or one that "
                    "only ever appends",
                )
            # The line break after a turn is the template's, not the assistant's.
            spans.append((len(before), max(len(before), len(after.rstrip()))))
        return whole, spans

    def _before(self, record: Record, messages: list[dict[str, Any]], after: str) -> str:
        """The text up to where the last message, an answer, begins; `after` is the text up to its end."""
        if len(messages) > 1:
            whole: str = self._render(record, messages[:-1], tokenize=False, add_generation_prompt=True)
            return whole
        # No template renders nothing at all: what asks for an answer is found behind this one, and in front of it.
        prompt = self._render(record, messages, tokenize=False, add_generation_prompt=True).removeprefix(after)
        begin, found, _ = after.partition(prompt) if prompt else ("", "", "")
        if not found:
            raise broken(
                record, "it begins with the assistant, and the chat template does not show where its turn does"
            )
        return begin + found

    def _render(self, record: Record, messages: list[dict[str, Any]], **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(messages, **options)
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise broken(record, f"the tokenizer's chat template refuses it: {error}") from error


def _flagged(record: Record, tokens: Any, inside: np.ndarray) -> Flagged:
    if not inside.any():
        raise broken(record, "the assistant says nothing in it that would count as a target")
    return np.array(tokens, np.int32), inside.astype(np.uint8)


def _messages(record: Record) -> list[dict[str, Any]]:
    messages = record.value
    if not isinstance(messages, list) or not messages:
        raise broken(record, f"{type(messages).__name__} instead of a list of messages {{role, content}}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise broken(record, f"message {number} has no role; allowed: {{role, content}}")
        if not isinstance(message.get("content"), str):
            raise broken(record, f"the content of message {number} is {message.get('content')!r}; allowed: a text")
    if not any(message["role"] == _ANSWERS for message in messages):
        roles = ", ".join(sorted({message["role"] for message in messages}))
        raise broken(record, f"no message of the assistant to learn from (roles: {roles})")
    return [{**message, "content": clean(message["content"])} for message in messages]
