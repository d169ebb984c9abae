"""The layouts that chats come in, each told by its columns and read as a list of messages {role, content}. Pure.

To add one: write what turns its columns into messages, and add its row to `LAYOUTS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from cache_store.errors import DataError
from cache_store.suggest import did_you_mean
from workers.data.text.corpora.rows.columns import Columns, Values, missing_column

#: What ShareGPT and its successors call who speaks -> the role. `function_call` holds a call as JSON.
_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "claude": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
#: Messages that say how the assistant is to behave.
_SYSTEM = ("system", "developer")

#: What columns are -> the names they usually have.
Names = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Layout:
    """One layout. `needed`: columns by which it is told; `optional`: what else is read where columns of these names are
    there; `messages`: makes the messages of what columns are -> values. What it cannot make sense of it leaves as it
    is, for `conversation_of` to refuse."""

    name: str
    needed: Names
    messages: Callable[[Values], Any]
    optional: tuple[str, ...] = ()

    @property
    def words(self) -> frozenset[str]:
        """Return what its columns are."""
        return frozenset((*self.needed, *self.optional))


def _turns(row: Values) -> Any:
    """Messages of OpenAI ({role, content}) or of ShareGPT ({from, value}), or either as JSON text."""
    turns = row.get("messages", row.get("conversations"))
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            return turns
    if not isinstance(turns, list):
        return turns
    return [*_said("system", row.get("system")), *map(_turn, turns)]


def _turn(turn: Any) -> Any:
    if not isinstance(turn, dict) or turn.get("role") is not None or not isinstance(turn.get("from"), str):
        return turn
    more = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    speaker, content = turn["from"].lower(), turn.get("value")
    role = _SPEAKERS.get(speaker, speaker)
    if speaker == "function_call" and (call := _call(content)) is not None:
        return {"role": role, "content": None, "tool_calls": [call], **more}
    return {"role": role, "content": content, **more}


def _call(text: Any) -> dict[str, Any] | None:
    """A tool call that is written as JSON {name, arguments}; None where it is none."""
    try:
        call = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return {"type": "function", "function": call} if isinstance(call, dict) and "name" in call else None


def _alpaca(row: Values) -> Any:
    """An instruction, its input behind a line break where it has one, and the answer; earlier rounds before them."""
    question = row["instruction"]
    if isinstance(question, str) and isinstance(row.get("input"), str) and row["input"].strip():
        question = f"{question}\n{row['input']}"
    return [
        *_said("system", row.get("system")),
        *_rounds(row.get("history")),
        {"role": "user", "content": question},
        {"role": "assistant", "content": row["output"]},
    ]


def _rounds(history: Any) -> Iterator[dict[str, Any]]:
    """Earlier rounds, each a pair of question and answer."""
    for pair in history if isinstance(history, list) else ():
        for role, content in zip(("user", "assistant"), pair, strict=False):
            yield {"role": role, "content": content}


def _completion(row: Values) -> Any:
    """A prompt and what follows it, texts or lists of messages as TRL has them; answers in the prompt are context."""
    prompt = _messages(row["prompt"], "user")
    answers = _messages(row["completion"], "assistant")
    if not isinstance(prompt, list) or not isinstance(answers, list):
        return prompt if isinstance(answers, list) else answers
    context = [_as_context(message) for message in map(_turn, prompt)]
    return [*_said("system", row.get("system")), *context, *map(_turn, answers)]


def _messages(value: Any, role: str) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _as_context(message: Any) -> Any:
    answers = isinstance(message, dict) and message.get("role") == "assistant"
    return {**message, "weight": 0} if answers else message


def _said(role: str, text: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": text}] if isinstance(text, str) and text.strip() else []


#: Where a file has the columns of several, the first counts.
LAYOUTS = (
    Layout("messages", {"messages": ("messages",)}, _turns),
    Layout("sharegpt", {"conversations": ("conversations", "conversation")}, _turns, ("system",)),
    Layout(
        "alpaca",
        {"instruction": ("instruction",), "output": ("output",)},
        _alpaca,
        ("input", "system", "history"),
    ),
    Layout("prompt_completion", {"prompt": ("prompt",), "completion": ("completion",)}, _completion, ("system",)),
)
#: All that a column of a chat can be.
WORDS = tuple(dict.fromkeys(word for layout in LAYOUTS for word in (*layout.needed, *layout.optional)))


def one_layout_has(words: Collection[str]) -> bool:
    """Tell whether some layout has columns for all of these."""
    return any(layout.words >= set(words) for layout in LAYOUTS)


def chat_columns(where: str, found: Collection[str], named: Mapping[str, str], system: str | None) -> Columns:
    """Find how a file with these columns holds chats. `named`: what columns are -> their names, where they are not the
    usual ones; `system`: a system prompt for the conversations that have none. DataError: they make no layout."""
    for name in named.values():
        if name not in found:
            raise missing_column(where, name, found, "data.columns")
    for layout in LAYOUTS:
        needed = {word: _name(found, named.get(word), usual) for word, usual in layout.needed.items()}
        if layout.words >= set(named) and all(name in found for name in needed.values()):
            optional = {word: named.get(word, word) for word in layout.optional}
            return Columns(needed, _reader(layout, system), optional)
    raise _no_layout(where, found)


def _name(found: Collection[str], named: str | None, usual: tuple[str, ...]) -> str:
    return named or next((name for name in usual if name in found), usual[0])


def turns_column(column: str, system: str | None) -> Columns:
    """Return the columns of chats of which only the one that holds the messages is named."""
    return Columns({"messages": column}, _reader(LAYOUTS[0], system))


def _reader(layout: Layout, system: str | None) -> Callable[[Values], Any]:
    return layout.messages if system is None else partial(_with_system, layout, system)


def _with_system(layout: Layout, system: str, row: Values) -> Any:
    """The messages with a system prompt, where they have none of their own."""
    messages = layout.messages(row)
    if not isinstance(messages, list) or any(isinstance(m, dict) and m.get("role") in _SYSTEM for m in messages):
        return messages
    return [*_said("system", system), *messages]


def _no_layout(where: str, found: Collection[str]) -> DataError:
    ways = " or ".join(" with ".join(repr(names[0]) for names in layout.needed.values()) for layout in LAYOUTS)
    usual = [name for layout in LAYOUTS for names in layout.needed.values() for name in names]
    hints = (did_you_mean(name, usual, cutoff=0.7) for name in found)
    hint = next((hint for hint in hints if hint), "")
    what = (
        f"has no {ways}{hint} (it has {', '.join(map(str, found)) or 'none'}); data.columns says which column is what"
    )
    return DataError(f"data.columns: {where} {what}", what=what)
