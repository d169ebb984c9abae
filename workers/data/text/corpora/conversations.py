"""What a chat record must be, whatever template writes it: messages with roles, and which answers are learned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.data.text.corpora.base import Record, broken, clean

ANSWERS = "assistant"
#: Fields of an answer that are something to learn, beside its content.
CALLS = ("tool_calls", "function_call")
_SAID = (*CALLS, "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Conversation:
    """One record's messages as a template takes them: no field is None, content is one text or absent. `learned`
    holds the numbers of the answers that count, `asides` of those of weight 0, `empty` of those that say nothing (they
    do not count)."""

    messages: list[dict[str, Any]]
    learned: tuple[int, ...]
    empty: tuple[int, ...]
    asides: tuple[int, ...]


def conversation_of(record: Record, arguments_as_text: bool = False) -> Conversation:
    """Check one record and normalize it. DataError, naming the record and the message: it is no list of messages, a
    message lacks role or content, a weight is neither 0 nor 1, or no message is the assistant's.

    A list of text parts becomes one text, and a tool call's arguments written as JSON become the object they hold,
    which is what most templates expect (`arguments_as_text`: they stay as they are written). A `weight` of 0 makes an
    answer context only.
    """
    value = record.value
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else type(value).__name__
        raise broken(record, f"{what} instead of a list of messages {{role, content}}")
    messages = [_message(record, number, message) for number, message in enumerate(value)]
    if not arguments_as_text:
        messages = [_with_objects(message) for message in messages]
    answers = [number for number, message in enumerate(messages) if message["role"] == ANSWERS]
    if not answers:
        roles = ", ".join(sorted({message["role"] for message in messages}))
        raise broken(record, f"no message of the assistant to learn from (roles: {roles})")
    weights = [_weight(record, number, value[number]) for number in answers]
    empty = tuple(number for number in answers if not _says_something(messages[number]))
    learned = tuple(number for number, weight in zip(answers, weights, strict=True) if weight and number not in empty)
    asides = tuple(number for number, weight in zip(answers, weights, strict=True) if not weight)
    return Conversation(messages, learned, empty, asides)


def _message(record: Record, number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise broken(record, f"message {number} has no role; allowed: {{role, content}}")
    # Parquet gives every message all fields that any message has.
    fields = {key: _cleaned(value) for key, value in message.items() if value is not None and key != "weight"}
    content = fields.get("content")
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        fields["content"] = "".join(part["text"] for part in content)
    elif not isinstance(content, str) and not (content is None and any(fields.get(call) for call in CALLS)):
        raise broken(record, f"the content of message {number} is {content!r}; allowed: a text")
    calls = fields.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise broken(record, f"tool_calls of message {number} is {calls!r}; allowed: a list of {{function}}")
    return fields


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_with_arguments(call) for call in calls]} if calls else message


def _with_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"])}
    try:
        found = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return dict(call)
    return {**call, "arguments": found} if isinstance(found, dict) else dict(call)


def _weight(record: Record, number: int, message: Mapping[str, Any]) -> bool:
    weight = message.get("weight")
    if weight is not None and weight not in (0, 1):
        raise broken(
            record, f"the weight of message {number} is {weight!r}; allowed: 1, or 0 for an answer that is not learned"
        )
    return weight != 0


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool(message.get("content", "").strip()) or any(message.get(field) for field in _SAID)


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if isinstance(value, dict):
        return {key: _cleaned(item) for key, item in value.items()}
    return value
