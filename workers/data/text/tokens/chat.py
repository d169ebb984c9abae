"""Chat records through a tokenizer's own template: tokens, and which of them the assistant said."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cache_store.errors import ConfigError, DataError
from cache_store.suggest import did_you_mean
from workers.data.text.corpora.base import Record, broken
from workers.data.text.corpora.conversations import ANSWERS, CALLS, Conversation, conversation_of
from workers.data.text.corpora.findings import Findings
from workers.data.text.tokens.exact import ExactTokens, Span
from workers.data.text.tokens.tokenizers import PretrainedTokenizer, Tokenizer
from workers.data.text.tokens.turns import TurnFinder
from workers.specs.language import ChatTargets

#: Templates that mark what the assistant says.
_GENERATION = re.compile(r"\{%-?\s*generation\b")
#: Roles that templates write without naming them; a template may name others.
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
#: Fields that nobody expects to be written: they say which message something belongs to.
_UNWRITTEN = ("role", "content", "id", "tool_call_id")

#: A token sequence and a flag a token: does it count as a target.
Flagged = tuple[np.ndarray, np.ndarray]


class ChatTemplate:
    """Renders records with one tokenizer. `targets`: which tokens count. ConfigError when the tokenizer has no
    template, or cannot tell where tokens lie."""

    def __init__(self, tokenizer: Tokenizer, targets: ChatTargets = "answers") -> None:
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
        self._targets = targets
        self._template: str = template if isinstance(template, str) else template.get("default", "")
        self._marks = bool(_GENERATION.search(self._template))
        self._exact = ExactTokens(inner)
        added = [token.content for token in inner.added_tokens_decoder.values()]
        self._turns = TurnFinder(added, inner.bos_token, inner.eos_token)

    def encode(self, records: Sequence[Record], findings: Findings | None = None) -> list[Flagged]:
        """Return the int32 tokens and uint8 flags of each record: flagged are exactly the answers that count and
        their stop markers.

        `findings` counts answers that are empty (they do not count) and what the template does not write. DataError,
        naming the record: `conversation_of` refuses it, a role that the template does not know, a tool call that it
        does not write, an answer that cannot be told from the rest, or the template refuses it.
        """
        findings = findings or Findings()
        texts, spans = [], []
        for record in records:
            text, answers = self._rendered(record, findings)
            texts.append(text)
            spans.append(answers)
        result: list[Flagged] = []
        for record, answers, (tokens, inside) in zip(records, spans, self._exact.encode(texts, spans), strict=True):
            if answers and not inside.any():
                raise broken(record, "the assistant says nothing in it that would count as a target")
            if self._targets == "everything":
                inside[:1] = False  # nothing is before it to predict it from
            result.append((tokens, inside.astype(np.uint8)))
        return result

    def _rendered(self, record: Record, findings: Findings) -> tuple[str, list[Span]]:
        """Render the whole text and say where the answers that count lie in it."""
        talk = conversation_of(record)
        self._check_roles(record, talk)
        try:
            text, spans, endless = self._found(record, talk)
        except DataError:
            # Some templates want the arguments of a call as text.
            other = conversation_of(record, arguments_as_text=True)
            if other == talk:
                raise
            talk = other
            text, spans, endless = self._found(record, talk)
        for _ in range(endless):
            findings.add("answer behind which the chat template writes no end", record)
        for _ in talk.empty:
            findings.add("empty answer", record)
        for what in self._unwritten(record, talk, text):
            findings.add(what, record)
        return self._one_bos(text, spans)

    def _check_roles(self, record: Record, talk: Conversation) -> None:
        for number, message in enumerate(talk.messages):
            role = message["role"]
            if role not in _ROLES and not re.search(rf"['\"]{re.escape(role)}['\"]", self._template):
                hint = did_you_mean(role, _ROLES)
                raise broken(
                    record,
                    f"message {number} has the role {role!r}{hint} (allowed: {', '.join(_ROLES)}, and those that the "
                    "chat template names)",
                )

    def _found(self, record: Record, talk: Conversation) -> tuple[str, list[Span], int]:
        """Return the whole text, where what counts lies in it, and how many answers nothing ends."""
        if self._targets == "everything":
            return self._everything(record, talk)
        if self._targets == "last_answer":
            talk = replace(talk, learned=talk.learned[-1:])
        return self._answers(record, talk)

    def _everything(self, record: Record, talk: Conversation) -> tuple[str, list[Span], int]:
        """All of the text counts, but answers of weight 0. Where there are none, any template will do."""
        try:
            # The last answer shows what has to be put behind the text so that something ends it.
            text, spans, endless = self._answers(record, replace(talk, learned=talk.asides or talk.learned[-1:]))
        except DataError:
            if talk.asides:
                raise
            text, spans, endless = self._render(record, talk.messages), [], 0
        edges = [0, *(edge for span in spans for edge in span), len(text)] if talk.asides else [0, len(text)]
        around = zip(edges[::2], edges[1::2], strict=True)
        return text, [(start, stop) for start, stop in around if start < stop], endless

    def _answers(self, record: Record, talk: Conversation) -> tuple[str, list[Span], int]:
        """Return the whole text, where the answers that count lie in it, and how many of them nothing ends."""
        if self._marks:
            return *self._marked(record, talk), 0

        def render(messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
            return self._render(record, messages, prompt=prompt)

        try:
            return self._turns.find(talk.messages, talk.learned, render)
        except ValueError as error:
            raise broken(record, str(error)) from error

    def _marked(self, record: Record, talk: Conversation) -> tuple[str, list[Span]]:
        """Find answers by the template's own marks. transformers finds the marks; its mask of tokens takes the
        whole text for an answer of one token at its beginning, and cannot do with an empty one."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[talk.messages],
                chat_template=self._tokenizer.get_chat_template(),
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise _refused(record, error) from error
        text: str = rendered[0][0]
        marks: list[Span] = rendered[1][0]
        answers = [number for number, message in enumerate(talk.messages) if message["role"] == ANSWERS]
        if len(marks) == len(answers):
            for number, (start, stop) in zip(answers, marks, strict=True):
                self._check_mark(record, number, talk.messages[number].get("content", "").strip(), text[start:stop])
            marks = [span for number, span in zip(answers, marks, strict=True) if number in talk.learned]
        elif len(talk.learned) + len(talk.empty) < len(answers):
            raise broken(
                record,
                f"the chat template marks {len(marks)} answers of {len(answers)}, so those that count cannot be told",
            )
        spans = [(start, stop) for start, stop in marks if start < stop]
        if talk.learned and not spans:
            raise broken(record, "the chat template marks nothing of what the assistant says in it")
        return text, spans

    def _check_mark(self, record: Record, number: int, content: str, marked: str) -> None:
        # Inside macros and set blocks the marks' places are counted from another beginning.
        if content not in marked and marked.strip() not in content:
            raise broken(
                record,
                f"the chat template marks {marked[:40]!r} as what the assistant says in message {number}, which is "
                "something else; allowed: generation blocks outside macros and set blocks",
            )

    def _unwritten(self, record: Record, talk: Conversation, text: str) -> Iterator[str]:
        """Name what of the messages is not in the text: fields without which the same is written, and contents."""
        whole, never = "", "that the chat template does not write"
        for number, message in enumerate(talk.messages):
            for field in message:
                if field in _UNWRITTEN or not message[field]:
                    continue
                whole = whole or self._render(record, talk.messages)
                if not self._same_without(record, talk, number, field, whole):
                    continue
                if field in CALLS and number in talk.learned:
                    raise broken(
                        record,
                        f"the chat template does not write the {field} of message {number}, so they cannot be learned; "
                        "allowed: a template that writes them, or a weight of 0 for that message",
                    )
                yield f"{field} of {message['role']} {never}"
            if message.get("content", "").strip() not in text:
                # Escaped, say, or without what was thought.
                whole = whole or self._render(record, talk.messages)
                same = self._same_without(record, talk, number, "content", whole)
                yield f"content of {message['role']} {never if same else 'that the chat template writes otherwise'}"

    def _same_without(self, record: Record, talk: Conversation, number: int, field: str, whole: str) -> bool:
        message = {key: value for key, value in talk.messages[number].items() if key != field}
        try:
            return self._render(record, [*talk.messages[:number], message, *talk.messages[number + 1 :]]) == whole
        except DataError:
            return False

    def _one_bos(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """Remove a second token for the text's beginning, which the first message brought although the template
        writes one."""
        bos = self._tokenizer.bos_token
        while bos and text.startswith(bos * 2) and all(start >= len(bos) for start, _ in spans):
            text = text[len(bos) :]
            spans = [(start - len(bos), stop - len(bos)) for start, stop in spans]
        return text, spans

    def _render(self, record: Record, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise _refused(record, error) from error
        return text


def _refused(record: Record, error: Exception) -> DataError:
    return broken(record, f"the tokenizer's chat template refuses it: {error}")
