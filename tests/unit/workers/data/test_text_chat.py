"""Chat records through the tokenizer's own template: only what the assistant said counts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_makers import BYTES, CHATML, smollm, source_of, spec_of, store, word_tokenizer, write_lines, write_parquet

from cache_store.errors import ConfigError, DataError
from workers.data.text.corpora.base import Record
from workers.data.text.inspect import inspect_text
from workers.data.text.prepare import prepare_text
from workers.data.text.splits import split_documents
from workers.data.text.tokens.chat import ChatTemplate
from workers.data.text.tokens.tokenizers import ByteTokenizer, PretrainedTokenizer
from workers.specs.as_json import to_json
from workers.specs.data_results import Finding, TextDataResult
from workers.specs.experiment import Experiment
from workers.specs.language import CausalLMSpec, TextSpec
from workers.specs.task_kinds import TASKS
from workers.specs.tasks import DataTask, EvaluateTask

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n{% else %}"
    "{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Forgets what the assistant thought in all turns but the last, as reasoning models' templates do.
FORGETFUL = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] if loop.last else m['content'].split('/')[-1] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [
    {"role": "system", "content": "the answer is"},
    {"role": "user", "content": "wörd1 wörd2?"},
    {"role": "assistant", "content": "wörd3 the answer"},
    {"role": "user", "content": "assistant\nthe answer is"},
    {"role": "assistant", "content": "\nyes  "},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return word_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def encode(tokenizer: Any, messages: Any, template: str = CHATML) -> tuple[str, list[str], Any]:
    """(the whole text, the runs of text that count, the flags)."""
    tokenizer.chat_template = template
    ((tokens, flags),) = ChatTemplate(PretrainedTokenizer(tokenizer)).encode([Record(messages, "chats.jsonl", 7)])
    runs: list[list[int]] = [[]]
    for token, flag in zip(tokens.tolist(), flags.tolist(), strict=True):
        if flag:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return tokenizer.decode(tokens.tolist()), [tokenizer.decode(run) for run in runs if run], flags


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_answers_and_their_ends_count_and_nothing_else(tokenizer: Any, template: str) -> None:
    whole, runs, flags = encode(tokenizer, TALK, template)
    assert whole == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert runs == ["wörd3 the answer<|im_end|>", "\nyes  <|im_end|>"]
    assert flags.dtype == "uint8"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["user", "assistant"]), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
        ),
        min_size=1,
        max_size=5,
    ).filter(lambda talk: any(role == "assistant" for role, _ in talk))
)
@settings(max_examples=40, deadline=None)
def test_prefixes_and_marks_find_the_same_answers(tmp_path_factory: pytest.TempPathFactory, talk: Any) -> None:
    made = word_tokenizer(tmp_path_factory.mktemp("tokenizer")) if not _MADE else _MADE[0]
    _MADE[:] = [made]
    messages = [{"role": role, "content": content} for role, content in talk]
    assert encode(made, messages, CHATML)[1] == encode(made, messages, MARKED)[1]


_MADE: list[Any] = []


def test_answers_are_learned_as_a_template_that_forgets_writes_them(tokenizer: Any) -> None:
    simple = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b/c"}]
    assert encode(tokenizer, simple, FORGETFUL)[1] == ["b/c<|im_end|>"]
    assert encode(tokenizer, [*simple, {"role": "user", "content": "d"}], FORGETFUL)[1] == ["c"]


def test_a_template_that_rewrites_earlier_turns_is_refused_by_record(tokenizer: Any) -> None:
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "the answer"},
    ]
    with pytest.raises(DataError, match=r"row 7 of chats\.jsonl: the chat template writes the turns before message 1"):
        encode(tokenizer, talk, "{{ messages[-1].content | length }}" + CHATML)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "NoneType instead of a list of messages"),
        ([], "instead of a list of messages"),
        ("hello", "str instead of a list"),
        ([{"content": "x"}], "message 0 has no role"),
        ([{"role": "assistant"}], "the content of message 0 is None"),
        ([{"role": "user", "content": "x"}], r"no message of the assistant to learn from \(roles: user\)"),
    ],
)
def test_a_record_that_is_no_conversation_is_named(tokenizer: Any, messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"row 7 of chats\.jsonl: .*{message}"):
        encode(tokenizer, messages)


def test_what_the_template_refuses_is_named(tokenizer: Any) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"row 7 of chats\.jsonl: .*template refuses it: roles must alternate"):
        encode(tokenizer, TALK, template)


def test_a_tokenizer_without_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        ChatTemplate(ByteTokenizer())
    with pytest.raises(ConfigError, match="no chat template"):
        ChatTemplate(PretrainedTokenizer(word_tokenizer(tmp_path, template=None)))


@pytest.mark.parametrize("format_", ["jsonl", "parquet"])
def test_records_are_read_tokenized_and_served_one_sample_each(tmp_path: Path, format_: str) -> None:
    whole = word_tokenizer(tmp_path / "tokenizer")
    talks = [[*TALK[:2], {"role": "assistant", "content": f"answer {i}"}] for i in range(12)]
    if format_ == "jsonl":
        path = write_lines(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks])
    else:
        path = write_parquet(tmp_path / "a.parquet", {"messages": talks})
    data = TextSpec(name="chat", path=str(path), sequence_length=200, validation=1, test=1)
    assert inspect_text(data).rows == {"train": 10, "validation": 1, "test": 1}
    source = source_of(data, spec_of(tmp_path / "tokenizer"))
    assert (source.rows, source.restarts, source.groups) == (10, False, None)
    for row in range(source.rows):
        batch = source.batch(source.offsets[:1] + row)
        answer = whole.decode(batch.targets.tolist())
        assert answer.startswith("answer ")
        assert answer.endswith("<|im_end|>")
        assert whole.decode(batch.ids[0].tolist()).endswith(f"assistant\n{answer}\n")


def test_an_answer_cut_away_whole_leaves_its_sample_out_and_counted(tmp_path: Path) -> None:
    word_tokenizer(tmp_path / "tokenizer")
    talks = [TALK[1:3] if i % 3 else [{"role": "user", "content": "x" * 300}, TALK[2]] for i in range(30)]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks])
    data = TextSpec(name="chat", path=str(path), sequence_length=60, validation=6, test=6)
    statistics = prepare_text(data, spec_of(tmp_path / "tokenizer"), 0, store()).statistics
    cut = sum(part.without_targets for part in statistics.values())
    assert cut == sum(part.truncated for part in statistics.values()) == 10
    assert sum(part.samples.count for part in statistics.values()) == 20


def lost_at(path: Path, length: int, questions: list[str], **settings: Any) -> TextDataResult:
    word_tokenizer(path / "tokenizer")
    talks = [[{"role": "user", "content": question}, TALK[2]] for question in questions]
    file = write_lines(path / "a.jsonl", [{"messages": talk} for talk in talks])
    data = TextSpec(name="chat", path=str(file), sequence_length=length, validation=10, test=10, **settings)
    return prepare_text(data, spec_of(path / "tokenizer"), 0, store())


def test_samples_that_lose_targets_are_said_and_above_half_refused(tmp_path: Path) -> None:
    short, long = "x", "x" * 300
    assert lost_at(tmp_path, 400, [short] * 90 + [long] * 10).warnings == ()
    assert lost_at(tmp_path, 60, [short] * 99 + [long]).warnings == ()  # 1 of 100 is not above 1 %
    assert lost_at(tmp_path, 60, [short] * 98 + [long] * 2).warnings == (
        "2 of 100 samples (2.0 %) have no targets and are left out",
        "2 of 100 samples (2.0 %) are longer than data.sequence_length 60 and were cut",
    )
    assert lost_at(tmp_path, 60, [short] * 50 + [long] * 50, overlong="drop").warnings == (
        "50 of 100 samples (50.0 %) are longer than data.sequence_length 60 and were dropped",
    )
    allowed = r"; allowed: a larger data\.sequence_length \(the longest sample takes \d{3} tokens\)"
    with pytest.raises(DataError, match=r"60 of 100 samples \(60\.0 %\) have no targets and are left out" + allowed):
        lost_at(tmp_path, 60, [short] * 40 + [long] * 60)
    with pytest.raises(
        DataError, match=r"no samples are left of 80 .*80 without_targets\); allowed: a larger data\.seq"
    ):
        lost_at(tmp_path, 60, [long] * 100)


def test_chats_of_which_most_lose_their_ends_are_refused(tmp_path: Path) -> None:
    questions = ["x" * (30 if i % 3 else 1) for i in range(60)]
    longest = lost_at(tmp_path, 400, questions).statistics["train"].documents.max
    with pytest.raises(DataError, match=r"40 of 60 samples \(66\.7 %\) are longer than data\.sequence_length \d+ and"):
        lost_at(tmp_path, longest - 2, questions)


def test_a_loss_of_most_samples_is_refused_with_all_there_is_to_say_unless_it_is_allowed(tmp_path: Path) -> None:
    questions = ["x"] * 40 + ["x" * 300] * 60
    with pytest.raises(DataError) as refused:
        lost_at(tmp_path, 60, questions)
    ways = (
        r"; allowed: a larger data\.sequence_length \(the longest .*\), or data\.allow_loss: true to go on with .* left"
    )
    assert len(refused.value.details["problems"]) == 2
    for problem, what in zip(refused.value.details["problems"], ("have no targets", "are longer"), strict=True):
        assert re.fullmatch(rf"data\.sequence_length: 60 of 100 samples \(60\.0 %\) {what} .*{ways}", problem)
    with pytest.raises(DataError, match=r"60 of 100 samples .* were dropped; allowed: .*allow_loss"):
        lost_at(tmp_path, 60, questions, overlong="drop")
    allowed = lost_at(tmp_path, 60, questions, allow_loss=True)
    assert sum(allowed.rows.values()) == 40
    assert allowed.warnings[0] == "60 of 100 samples (60.0 %) have no targets and are left out"
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": "x" * 50}) + "\n" for _ in range(9)))
    long = TextSpec(name="text", path=str(tmp_path / "b.jsonl"), pack=False, sequence_length=20, validation=2, test=2)
    # Running text teaches as far as it goes.
    assert prepare_text(long, BYTES, 0, store()).warnings == (
        "9 of 9 samples (100.0 %) are longer than data.sequence_length 20 and were cut",
    )


def test_what_may_be_lost_decides_no_identity() -> None:
    data, model = TextSpec(name="stdlib"), CausalLMSpec(family="causal_lm", config={})
    for kind, make in (
        ("data", lambda data: DataTask(data=data, fingerprint="f", model=model)),
        (
            "evaluate",
            lambda data: EvaluateTask(
                experiment=Experiment(model=model, data=data, classes=1, seed=0),
                path=("head",),
                split="test",
                batch_size=1,
                precision="fp32",
            ),
        ),
    ):
        strict, lenient = (TASKS[kind].identity(to_json(make(replace(data, allow_loss=on)))) for on in (False, True))
        assert strict == lenient
        assert "allow_loss" not in json.dumps(strict)


def test_what_is_odd_in_records_is_counted_by_split_and_said(tmp_path: Path) -> None:
    word_tokenizer(tmp_path / "tokenizer")
    talks = [[{"role": "user", "content": f"{i}"}, {**TALK[2], "reasoning_content": "hm"}] for i in range(12)]
    talks[3][1] = {"role": "assistant", "content": ""}
    path = write_lines(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks])
    data = TextSpec(name="chat", path=str(path), sequence_length=100, validation=1, test=1)
    snapshots = store()
    result = prepare_text(data, spec_of(tmp_path / "tokenizer"), 0, snapshots)
    found = [part.findings or {} for part in result.statistics.values()]
    unwritten = "reasoning_content of assistant that the chat template does not write"
    assert sum(part[unwritten].count for part in found if unwritten in part) == 11
    assert [part["empty answer"] for part in found if "empty answer" in part] == [
        Finding(count=1, first=("row 3 of a.jsonl",))
    ]
    assert result.warnings[0] == "1 of 12 samples (8.3 %) have no targets and are left out"
    assert result.warnings[1] == "1 times: empty answer (row 3 of a.jsonl)"
    assert result.warnings[2].startswith(f"11 times: {unwritten} (row ")
    assert sum(part.samples.count for part in result.statistics.values()) == 11
    # Said again where everything is found in the store.
    assert prepare_text(data, spec_of(tmp_path / "tokenizer"), 0, snapshots) == result


def test_rows_that_the_template_refuses_are_named_together_or_skipped_and_counted(tmp_path: Path) -> None:
    word_tokenizer(tmp_path / "tokenizer")
    talks = [[{"role": "user", "content": f"{i}"}, TALK[2]] for i in range(40)]
    for row in (2, 30, 31):
        talks[row][0] = {"role": "narrator", "content": "x"}
    path = write_lines(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks])
    data = TextSpec(name="chat", path=str(path), sequence_length=100, validation=3, test=3)
    model = spec_of(tmp_path / "tokenizer")
    with pytest.raises(DataError) as refused:
        prepare_text(data, model, 0, store())
    named = [re.match(r"row (\d+) of .*has the role 'narrator'", line) for line in refused.value.details["problems"]]
    train = split_documents(data, 0, {"train": 40})["train"][1].tolist()
    assert [found and int(found[1]) for found in named] == [row for row in (2, 30, 31) if row in train]
    assert len(named) > 1
    result = prepare_text(replace(data, bad="skip"), model, 0, store())
    assert sum(part.samples.count for part in result.statistics.values()) == 37
    assert sum(part.skipped or 0 for part in result.statistics.values()) == 3
    assert any(
        re.match(r"3 times: skipped: message 0 has the role 'narrator'.*row 2 of a", w) for w in result.warnings or ()
    )
    # What is left is what it would be without them.
    others = write_lines(
        tmp_path / "b" / "a.jsonl", [{"messages": talk} for i, talk in enumerate(talks) if i not in (2, 30, 31)]
    )
    whole = prepare_text(replace(data, path=str(others)), model, 0, store())
    assert sum(whole.tokens.values()) == sum(result.tokens.values())


def test_smollm2s_own_template_counts_the_answers() -> None:
    from workers.data.text.tokens.tokenizers import load_tokenizer

    model: CausalLMSpec = smollm()
    loaded = load_tokenizer(model)
    assert isinstance(loaded, PretrainedTokenizer)
    whole, runs, _ = encode(loaded.tokenizer, TALK, loaded.tokenizer.chat_template)
    assert runs == ["wörd3 the answer<|im_end|>", "\nyes  <|im_end|>"]
    assert whole == loaded.tokenizer.apply_chat_template(TALK, tokenize=False)
