"""Chats in every layout they come in give the tokens and targets of the messages form."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from text_makers import smollm, source_of, spec_of, store, word_tokenizer, write_lines, write_parquet

from cache_store.errors import DataError
from workers.data.text.inspect import inspect_text
from workers.data.text.prepare import prepare_text
from workers.data.text.tokens.tokenizers import PretrainedTokenizer, load_tokenizer
from workers.domains.text.planning import TEXT
from workers.specs.language import CausalLMSpec, TextSpec

Row = Mapping[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> Row:
    return {"role": "assistant", "content": text, **more}


def ask(i: int) -> str:
    return f"What is {i} plus {i}, “in words”?"


def say(i: int) -> str:
    return f"{i} plus {i} is {2 * i},\nnothing else."


NUMBERS = range(12)
PLAIN = [[user(ask(i)), answer(say(i))] for i in NUMBERS]
SYSTEM = [[{"role": "system", "content": "Be brief."}, *talk] for talk in PLAIN]
#: Layout, as its own project describes it -> (a row, the messages that it means).
FIXTURES: dict[str, tuple[Callable[[int], Row], Callable[[int], list[Row]]]] = {
    # OpenAI's fine-tuning format.
    "messages": (lambda i: {"messages": [user(ask(i)), answer(say(i))]}, lambda i: PLAIN[i]),
    # ShareGPT: anon8231489123/ShareGPT_Vicuna_unfiltered on the hub.
    "sharegpt": (
        lambda i: {
            "id": str(i),
            "conversations": [{"from": "human", "value": ask(i)}, {"from": "gpt", "value": say(i)}],
        },
        lambda i: PLAIN[i],
    ),
    # As FastChat and LLaMA-Factory write it, with a column for the system prompt.
    "sharegpt with system": (
        lambda i: {
            "conversations": [{"from": "human", "value": ask(i)}, {"from": "gpt", "value": say(i)}],
            "system": "Be brief.",
        },
        lambda i: SYSTEM[i],
    ),
    "sharegpt with a system turn": (
        lambda i: {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": ask(i)},
                {"from": "gpt", "value": say(i)},
            ]
        },
        lambda i: SYSTEM[i],
    ),
    # lmsys/lmsys-chat-1m: one conversation, in OpenAI's words.
    "conversation": (lambda i: {"conversation": PLAIN[i], "model": "x"}, lambda i: PLAIN[i]),
    "messages as JSON": (lambda i: {"messages": json.dumps(PLAIN[i])}, lambda i: PLAIN[i]),
    # tatsu-lab/alpaca.
    "alpaca": (lambda i: {"instruction": ask(i), "input": "", "output": say(i), "text": "…"}, lambda i: PLAIN[i]),
    "alpaca with input": (
        lambda i: {"instruction": "Add.", "input": f"{i}, {i}", "output": say(i)},
        lambda i: [user(f"Add.\n{i}, {i}"), answer(say(i))],
    ),
    # LLaMA-Factory's supervised alpaca.
    "alpaca with history": (
        lambda i: {
            "instruction": ask(i),
            "input": "",
            "output": say(i),
            "system": "Be brief.",
            "history": [["a", "b"], ["c", "d"]],
        },
        lambda i: [SYSTEM[i][0], user("a"), answer("b"), user("c"), answer("d"), *PLAIN[i]],
    ),
    # TRL's prompt-completion, standard and conversational.
    "prompt and completion": (lambda i: {"prompt": ask(i), "completion": say(i)}, lambda i: PLAIN[i]),
    "prompt and completion of messages": (
        lambda i: {
            "prompt": [user("a"), answer("b"), user(ask(i))],
            "completion": [answer(say(i))],
        },
        lambda i: [user("a"), answer("b", weight=0), user(ask(i)), answer(say(i))],
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CausalLMSpec:
    folder = tmp_path_factory.mktemp("tokenizer")
    word_tokenizer(folder)
    return spec_of(folder)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> CausalLMSpec:
    """SmolLM2's tokenizer as a folder, which loads a hundred times as fast as its GGUF file."""
    folder = tmp_path_factory.mktemp("smollm2")
    loaded = load_tokenizer(smollm())
    assert isinstance(loaded, PretrainedTokenizer)
    loaded.tokenizer.save_pretrained(folder)
    return CausalLMSpec(family="causal_lm", tokenizer=str(folder), config={"vocab_size": 49152})


def chat(path: Path, **settings: Any) -> TextSpec:
    return TextSpec(name="chat", path=str(path), sequence_length=400, validation=1, test=1, **settings)


def learned(data: TextSpec, model: CausalLMSpec) -> dict[str, list[tuple[list[int], list[int]]]]:
    """By split, (tokens, places of the tokens that count) of every sample."""
    snapshots = store()
    result = prepare_text(data, model, 0, snapshots, fingerprint=inspect_text(data).fingerprint)
    found: dict[str, list[tuple[list[int], list[int]]]] = {}
    for split in ("train", "validation", "test"):
        source = source_of(data, model, split, snapshots, 0, result)
        batches = [source.batch(np.array([row])) for row in range(source.rows)]
        found[split] = [(batch.ids[0].tolist(), (batch.where + 1).tolist()) for batch in batches]
    return found


def messages_form(folder: Path, talks: Iterable[Any], model: CausalLMSpec, **settings: Any) -> Any:
    path = write_lines(folder / "reference" / "m.jsonl", [{"messages": list(talk)} for talk in talks])
    found = learned(chat(path, **settings), model)
    assert all(places for samples in found.values() for _, places in samples)
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "tokenizer") for name in FIXTURES),
        ("sharegpt", "real"),
        ("alpaca", "real"),
        ("prompt and completion", "real"),
    ],
)
def test_a_layout_found_by_its_columns_gives_what_the_messages_form_gives(
    tmp_path: Path, request: pytest.FixtureRequest, name: str, kind: str
) -> None:
    model = request.getfixturevalue(kind)
    row, talk = FIXTURES[name]
    path = write_lines(tmp_path / "a.jsonl", map(row, NUMBERS))
    assert learned(chat(path), model) == messages_form(tmp_path, map(talk, NUMBERS), model)


@pytest.mark.parametrize("name", ["sharegpt", "alpaca", "prompt and completion", "prompt and completion of messages"])
@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather", "jsonl.zst", "json.gz", "csv", "tsv.gz"])
def test_every_kind_of_file_holds_every_layout(tmp_path: Path, tokenizer: CausalLMSpec, name: str, kind: str) -> None:
    row, talk = FIXTURES[name]
    rows = list(map(row, NUMBERS))
    if kind in ("csv", "tsv.gz") and not all(isinstance(value, str) for value in rows[0].values()):
        rows = [{"messages": json.dumps(talk(i))} for i in NUMBERS]
    write(tmp_path / f"a.{kind}", rows)
    assert learned(chat(tmp_path), tokenizer) == messages_form(tmp_path / "other", map(talk, NUMBERS), tokenizer)


def write(path: Path, rows: list[Row]) -> None:
    """Rows in a file of the kind that its name says."""
    kind = path.name.partition(".")[2]
    table = pa.Table.from_pylist(rows) if kind in ("parquet", "arrow", "feather") else None
    if kind == "parquet":
        write_parquet(path, {name: table[name] for name in table.column_names})
    elif table is not None:
        make = pa.ipc.new_file if kind == "feather" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    elif kind.startswith("json"):
        content = "\n".join(map(json.dumps, rows)).encode()
        packed = gzip.compress(content) if kind.endswith("gz") else pa.compress(content, codec="zstd", asbytes=True)
        path.write_bytes(packed)
    else:
        text = io.StringIO()
        writer = csv.writer(text, delimiter="\t" if kind.startswith("tsv") else ",")
        writer.writerows([list(rows[0]), *(list(row.values()) for row in rows)])
        content = text.getvalue().encode("utf-8-sig")
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)


def test_columns_of_other_names_are_told(tmp_path: Path, tokenizer: CausalLMSpec) -> None:
    expected = messages_form(tmp_path, PLAIN, tokenizer)
    asked = write_lines(tmp_path / "a.jsonl", [{"question": ask(i), "reply": say(i)} for i in NUMBERS])
    assert learned(chat(asked, columns={"prompt": "question", "completion": "reply"}), tokenizer) == expected
    assert learned(chat(asked, columns={"instruction": "question", "output": "reply"}), tokenizer) == expected
    talks = write_lines(tmp_path / "b.jsonl", [{"talk": FIXTURES["sharegpt"][0](i)["conversations"]} for i in NUMBERS])
    for settings in ({"column": "talk"}, {"columns": {"messages": "talk"}}, {"columns": {"conversations": "talk"}}):
        assert learned(chat(talks, **settings), tokenizer) == expected
    with_input = write_lines(tmp_path / "c.jsonl", [{"q": "Add.", "x": f"{i}", "a": say(i)} for i in NUMBERS])
    found = learned(chat(with_input, columns={"instruction": "q", "input": "x", "output": "a"}), tokenizer)
    assert found == messages_form(tmp_path / "c", [[user(f"Add.\n{i}"), answer(say(i))] for i in NUMBERS], tokenizer)


def test_an_input_that_the_first_rows_lack_is_read(tmp_path: Path, tokenizer: CausalLMSpec) -> None:
    rows = [{"instruction": ask(i), "output": say(i)} | ({"input": "now"} if i > 9 else {}) for i in NUMBERS]
    talks = [[user(ask(i) + ("\nnow" if i > 9 else "")), answer(say(i))] for i in NUMBERS]
    assert learned(chat(write_lines(tmp_path / "a.jsonl", rows)), tokenizer) == messages_form(
        tmp_path, talks, tokenizer
    )


def test_what_the_columns_cannot_be_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"instructions": "a", "output": "b"}])
    with pytest.raises(
        DataError, match=r"a\.jsonl has no 'messages' or 'conversations' .*'instruction'\?.*columns says"
    ):
        inspect_text(chat(path))
    with pytest.raises(DataError, match=r"has no 'instruction'; did you mean 'instructions'\?"):
        inspect_text(chat(path, columns={"instruction": "instruction"}))

    def problems(**settings: Any) -> list[str]:
        return [f"{'.'.join(key)}: {words}" for key, words in TEXT.problems(TextSpec(**{"name": "chat", **settings}))]

    assert problems(columns={"promt": "x"})[0].startswith(
        "data.columns: 'promt' is nothing that a column of a chat can"
    )
    assert "did you mean 'prompt'?" in problems(columns={"promt": "x"})[0]
    assert problems(columns={"prompt": "x", "output": "y"}) == [
        "data.columns: prompt, output are of no one layout; allowed: columns of messages, or of conversations, "
        "system, or of instruction, output, input, system, history, or of prompt, completion, system"
    ]
    assert problems(column="x", columns={"messages": "y"})[0].startswith("data.columns: not with data.column")
    assert problems(name="text", columns={"messages": "y"})[0].startswith("data.columns: 'messages' is nothing that")
    assert problems(name="stdlib", system="x", targets="everything") == [
        "data.system: is for data.name chat",
        "data.targets: is for data.name chat",
    ]
    assert problems(columns={"prompt": "x"}, system="x", targets="last_answer") == []


def test_a_system_prompt_is_added_where_there_is_none(tmp_path: Path, tokenizer: CausalLMSpec) -> None:
    mixed = [SYSTEM[i] if i % 2 else PLAIN[i] for i in NUMBERS]
    other = [SYSTEM[i] if i % 2 else [{"role": "system", "content": "Answer."}, *PLAIN[i]] for i in NUMBERS]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": talk} for talk in mixed])
    assert learned(chat(path, system="Answer."), tokenizer) == messages_form(tmp_path, other, tokenizer)


def test_the_last_answer_or_everything_counts_where_that_is_asked(tmp_path: Path, tokenizer: CausalLMSpec) -> None:
    talks = [[*PLAIN[i], user("Again."), answer(f"{i}"), user("More.")] for i in NUMBERS]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks])
    context = [[talk[0], {**talk[1], "weight": 0}, *talk[2:]] for talk in talks]
    last = messages_form(tmp_path, context, tokenizer)
    assert learned(chat(path, targets="last_answer"), tokenizer) == last
    everything = learned(chat(path, targets="everything"), tokenizer)
    assert everything == {
        split: [(tokens, list(range(1, len(tokens)))) for tokens, _ in samples]
        for split, samples in messages_form(tmp_path, talks, tokenizer).items()
    }
    # But for answers of weight 0.
    aside = write_lines(tmp_path / "b.jsonl", [{"messages": talk} for talk in context])
    first = messages_form(tmp_path, [[*talk[:3], {**talk[3], "weight": 0}, talk[4]] for talk in talks], tokenizer)
    assert learned(chat(aside, targets="everything"), tokenizer) == {
        split: [
            (tokens, [place for place in range(1, len(tokens)) if place not in places]) for tokens, places in samples
        ]
        for split, samples in first.items()
    }


def test_calls_and_observations_of_sharegpt_are_calls_and_what_tools_say(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
        "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    word_tokenizer(tmp_path / "tokenizer", template=template)
    call = {"name": "add", "arguments": {"a": 1}}
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Two."},
    ]
    talk = [
        user("a"),
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "2"},
        answer("Two."),
    ]
    path = write_lines(tmp_path / "a.jsonl", [{"conversations": turns}] * 5)
    model = spec_of(tmp_path / "tokenizer")
    assert learned(chat(path), model) == messages_form(tmp_path, [talk] * 5, model)
