"""Which tokens of a chat are learned: exactly the answers and their stop markers, whatever the template's habits."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from text_makers import merging_tokenizer

from cache_store.errors import DataError
from workers.data.text.corpora.base import Record
from workers.data.text.corpora.findings import Findings
from workers.data.text.tokens.chat import ChatTemplate
from workers.data.text.tokens.tokenizers import PretrainedTokenizer
from workers.specs.data_results import Finding

#: A turn ends only where the next role begins.
NEXT_ROLE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
OWN_BOS = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
GLUED = (
    "{% for m in messages %}{% if m.role == 'user' %}Q:{{ m.content }}A:{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)
#: Ends the whole text, beside every turn.
ENDS_TWICE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
#: No prompt for an answer, blanks around it.
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
#: Knows no prompt: the header of an answer comes with it.
NO_PROMPT = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
#: Writes what was thought in the turns since the user last spoke, and an empty thought where there was none.
THINKS = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and "
    "loop.index0 > ns.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}<call>{{ c.function | tojson }}</call>{% endfor %}<|call|>"
    "{% else %}<|end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
#: A turn is closed by words, not by an added token.
IN_WORDS = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n### end\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def learned(tokenizer: Any, template: str, messages: Any, findings: Findings | None = None) -> tuple[str, list[str]]:
    """(the whole text, the runs of it that count)."""
    tokenizer.chat_template = template
    record = Record(messages, "folder/chats.jsonl", 7)
    ((tokens, flags),) = ChatTemplate(PretrainedTokenizer(tokenizer)).encode([record], findings)
    runs = itertools.groupby(range(len(tokens)), lambda place: flags[place])
    return tokenizer.decode(tokens), [tokenizer.decode(tokens[list(run)]) for flag, run in runs if flag]


ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<|call|>")


def test_where_only_the_next_role_ends_a_turn_its_marker_is_learned_and_put_behind_the_last() -> None:
    talk = [user("a"), answer("b"), user("c"), answer("d")]
    whole, runs = learned(merging_tokenizer(*ROLES), NEXT_ROLE, talk)
    assert runs == ["b<|user|>", "d<|user|>"]
    assert whole == "<|user|>\na<|assistant|>\nb<|user|>\nc<|assistant|>\nd<|user|>"


def test_where_no_added_token_ends_an_answer_the_end_of_text_does() -> None:
    for template, whole in ((NEXT_ROLE, "<|user|>\na<|assistant|>\nyes</s>"), (GLUED, "Q:aA:yes</s>")):
        assert learned(merging_tokenizer(), template, [user("a"), answer("yes")]) == (whole, ["yes</s>"])


def test_a_model_that_could_not_learn_to_stop_is_refused() -> None:
    tokenizer = merging_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"row 7 of .*nothing behind an answer, and the tokenizer has no end-of-text"):
        learned(tokenizer, GLUED, [user("a"), answer("yes")])


def test_a_word_that_merges_with_what_is_before_it_is_learned_alone() -> None:
    tokenizer = merging_tokenizer(merges=[(":", "y"), ("A", ":y"), ("y", "Q")])
    assert "A:y" in tokenizer.tokenize("Q:?A:y")
    talk = [user("?"), answer("y"), user("!"), answer("y")]
    findings = Findings()
    assert learned(tokenizer, GLUED, talk, findings) == ("Q:?A:yQ:!A:y</s>", ["y", "y</s>"])
    assert list(findings.found()) == ["answer behind which the chat template writes no end"]
    # What the model is given before it answers is what it was trained behind.
    ((tokens, flags),) = ChatTemplate(PretrainedTokenizer(tokenizer)).encode([Record(talk[:2], "a", 0)])
    prompt = tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True)["input_ids"]
    assert tokens[: np.flatnonzero(flags)[0]].tolist() == prompt


def test_a_space_that_trimmed_offsets_hide_is_no_part_of_the_answer() -> None:
    from tokenizers import processors

    tokenizer = merging_tokenizer(merges=[("Ġ", "y")])
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    template = GLUED.replace("A:", "A: ")
    assert learned(tokenizer, template, [user("?"), answer("y")]) == ("Q:?A: y</s>", ["y</s>"])


def test_a_tokenizer_that_begins_with_a_space_puts_none_before_an_answer_cut_off() -> None:
    tokenizer = merging_tokenizer(merges=[(":", "y")], spaces=True)
    whole, runs = learned(tokenizer, GLUED, [user("?"), answer("y")])
    assert (whole, runs) == (" Q:?A:y</s>", ["y</s>"])


def test_blanks_that_a_token_takes_with_it_do_not_tear_it_apart() -> None:
    from tokenizers import AddedToken

    tokenizer = merging_tokenizer("<|user|>", "<|assistant|>")
    tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, special=True)])
    talk = [user("a"), answer("b"), user("c"), answer("d")]
    _, runs = learned(tokenizer, NO_PROMPT, talk)
    assert runs == ["b<|end|>", "d<|end|>"]
    ((tokens, _),) = ChatTemplate(PretrainedTokenizer(tokenizer)).encode([Record(talk, "a", 0)])
    assert tokens.tolist() == tokenizer.apply_chat_template(talk)["input_ids"]


@pytest.mark.parametrize("talk", [[answer("y"), user("a"), answer("n")], [answer("y")]])
def test_an_answer_at_the_very_beginning_marks_no_more_than_itself(talk: Any) -> None:
    tokenizer = merging_tokenizer(merges=[("<", "/")])
    template = MARKED.replace("{{ eos_token }}", "")
    whole, runs = learned(tokenizer, template, talk)
    assert runs == [message["content"] for message in talk if message["role"] == "assistant"]
    assert whole == "".join(message["content"] for message in talk)


def test_an_empty_mark_is_no_error() -> None:
    findings = Findings()
    template = MARKED.replace("{{ eos_token }}", "")
    talk = [answer(""), user("a"), answer("b")]
    assert learned(merging_tokenizer(), template, talk, findings) == ("ab", ["b"])
    assert findings.found() == {"empty answer": Finding(count=1, first=("row 7 of chats.jsonl",))}


def test_marks_are_those_of_transformers_where_it_can_tell() -> None:
    tokenizer = merging_tokenizer(merges=[("a", "n"), ("an", "d"), ("o", "n")])
    talk = [user("one and two"), answer("and on"), user("on"), answer("no and on")]
    tokenizer.chat_template = MARKED
    expected = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    ((tokens, flags),) = ChatTemplate(PretrainedTokenizer(tokenizer)).encode([Record(talk, "a", 0)])
    assert (tokens.tolist(), flags.tolist()) == (expected["input_ids"], expected["assistant_masks"])


def test_the_beginning_of_text_comes_once() -> None:
    tokenizer = merging_tokenizer()
    plain = learned(tokenizer, OWN_BOS, [user("a"), answer("b")])
    assert plain == ("<s>user: a</s>assistant: b</s>", [" b</s>"])
    template = OWN_BOS.replace("{{ m.role }}: ", "")
    whole, runs = learned(tokenizer, template.replace("assistant:", ""), [user("<s>a"), answer("b")])
    assert (whole, runs) == ("<s>a</s>b</s>", ["b</s>"])


def test_the_next_roles_marker_is_put_behind_an_answer_whose_thought_the_next_turn_would_drop() -> None:
    template = THINKS.replace("<|end|>", "").replace("\n{% endfor %}", "{% endfor %}")
    talk = [user("a"), answer("b", reasoning_content="hm")]
    _, runs = learned(merging_tokenizer(*ROLES, "<think>", "</think>"), template, talk)
    assert runs == ["<think>hm</think>b<|user|>"]


def test_all_tokens_that_close_a_turn_are_learned() -> None:
    talk = [user("a"), answer("b"), user("c"), answer("d")]
    closes = NO_PROMPT.replace("<|end|>", "<|end|><|call|>")
    assert learned(merging_tokenizer(*ROLES), closes, talk)[1] == ["b<|end|><|call|>", "d<|end|><|call|>"]
    ends = NO_PROMPT.replace("<|end|>\n", "<|end|>") + "{{ eos_token }}"
    assert learned(merging_tokenizer(*ROLES), ends, talk)[1] == ["b<|end|>", "d<|end|>"]


def test_an_end_of_the_whole_text_is_not_the_answers() -> None:
    talk = [user("a"), answer("b"), user("c"), answer("d")]
    whole, runs = learned(merging_tokenizer(*ROLES), ENDS_TWICE, talk)
    assert runs == ["b<|end|>", "d<|end|>"]
    assert whole.endswith("d<|end|>\n</s>")


def test_blanks_between_the_prompt_and_an_answer_are_learned_a_header_is_not() -> None:
    talk = [user("a"), answer("b"), user("c"), answer("d")]
    assert learned(merging_tokenizer(), BRACKETS, talk)[1] == [" b </s>", " d </s>"]
    assert learned(merging_tokenizer(*ROLES), NO_PROMPT, talk)[1] == ["b<|end|>", "d<|end|>"]


def test_a_turn_closed_in_words_is_learned_with_them() -> None:
    talk = [user("a"), answer("b"), user("c"), answer("d\n")]
    assert learned(merging_tokenizer(), IN_WORDS, talk)[1] == ["b\n### end", "d\n\n### end"]


def test_thoughts_and_calls_are_learned_where_the_template_writes_them() -> None:
    call = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
    talk = [
        user("a"),
        answer("b", reasoning_content="early"),
        user("c"),
        answer(None, reasoning_content="add", tool_calls=call),
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
        answer("d"),
    ]
    findings = Findings()
    _, runs = learned(merging_tokenizer(*ROLES, "<think>", "</think>"), THINKS, talk, findings)
    assert runs == [
        "b<|end|>",
        '<think>add</think><call>{"name": "add", "arguments": {"a": 1}}</call><|call|>',
        "<think></think>d<|end|>",
    ]
    assert findings.found() == {
        "reasoning_content of assistant that the chat template does not write": Finding(
            count=1, first=("row 7 of chats.jsonl",)
        )
    }


def test_arguments_are_an_object_or_the_text_they_came_as_whichever_the_template_takes() -> None:
    call = [{"function": {"name": "add", "arguments": '{"a":1}'}}]
    talk = [user("a"), answer("b", tool_calls=call)]
    for written, expected in (("a | tojson", '{"a": 1}'), ("'=' + a", '={"a":1}')):
        template = NEXT_ROLE.replace(
            "{{ m.content }}",
            "{{ m.content }}{% for c in m.tool_calls %}{% set a = c.function.arguments %}{{ "
            + written
            + " }}{% endfor %}",
        )
        assert learned(merging_tokenizer(*ROLES), template, talk)[1] == [f"b{expected}<|user|>"]


def test_a_call_that_the_template_does_not_write_is_refused_unless_it_is_context() -> None:
    call = [{"function": {"name": "add", "arguments": {}}}]
    talk = [user("a"), answer("", tool_calls=call), {"role": "tool", "content": "2"}, answer("d")]
    with pytest.raises(DataError, match=r"row 7 of .*does not write the tool_calls of message 1, so they cannot be"):
        learned(merging_tokenizer(*ROLES), NEXT_ROLE, talk)
    findings = Findings()
    talk[1]["weight"] = 0
    assert learned(merging_tokenizer(*ROLES), NEXT_ROLE, talk, findings)[1] == ["d<|user|>"]
    assert list(findings.found()) == ["tool_calls of assistant that the chat template does not write"]


def test_contents_that_the_template_leaves_out_are_counted() -> None:
    template = "{% for m in messages if m.role != 'system' %}" + NEXT_ROLE.split("%}", 1)[1]
    findings = Findings()
    talk = [{"role": "system", "content": "be brief"}, user("a"), answer("b")]
    assert learned(merging_tokenizer(*ROLES), template, talk, findings)[1] == ["b<|user|>"]
    assert list(findings.found()) == ["content of system that the chat template does not write"]
    findings = Findings()
    template = NEXT_ROLE.replace("m.content", "m.content | tojson")
    assert learned(merging_tokenizer(*ROLES), template, [user('"a"'), answer("b")], findings)[1] == ['"b"']
    assert list(findings.found()) == ["content of user that the chat template writes otherwise"]


@pytest.mark.parametrize("template", [NEXT_ROLE, MARKED])
def test_answers_of_weight_0_are_context(template: str) -> None:
    talk = [user("a"), answer("b", weight=0), user("c"), answer("d", weight=1)]
    runs = learned(merging_tokenizer(*ROLES), template, talk)[1]
    assert runs == ["d<|user|>" if template is NEXT_ROLE else "d</s>"]
    with pytest.raises(DataError, match=r"the weight of message 1 is 0\.5; allowed: 1, or 0"):
        learned(merging_tokenizer(*ROLES), template, [user("a"), answer("b", weight=0.5)])


@pytest.mark.parametrize("template", [NEXT_ROLE, MARKED, GLUED])
def test_an_empty_answer_is_no_target_and_counted(template: str) -> None:
    findings = Findings()
    tokenizer = merging_tokenizer(*ROLES)
    runs = learned(tokenizer, template, [user("a"), answer(" "), user("c"), answer("d")], findings)[1]
    assert [run[0] for run in runs] == ["d"]
    assert learned(tokenizer, template, [user("a"), answer("")], findings)[1] == []
    assert findings.found() == {"empty answer": Finding(count=2, first=("row 7 of chats.jsonl",) * 2)}


def test_a_role_that_the_template_does_not_name_is_refused() -> None:
    talk = [{"role": "narrator", "content": "Once."}, user("a"), answer("b")]
    with pytest.raises(DataError, match=r"row 7 of .*message 0 has the role 'narrator' \(allowed: system, developer"):
        learned(merging_tokenizer(*ROLES), NEXT_ROLE, talk)
    assert learned(merging_tokenizer(*ROLES), NEXT_ROLE + "{# 'narrator' #}", talk)[1] == ["b<|user|>"]
    with pytest.raises(DataError, match=r"the role 'asistant'; did you mean 'assistant'\?"):
        learned(merging_tokenizer(*ROLES), NEXT_ROLE, [user("a"), {"role": "asistant", "content": "b"}, answer("b")])


def test_parts_of_text_are_one_text() -> None:
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    talk = [{"role": "user", "content": parts[:1]}, {"role": "assistant", "content": parts}]
    assert learned(merging_tokenizer(*ROLES), NEXT_ROLE, talk)[1] == ["bc<|user|>"]
    with pytest.raises(DataError, match=r"the content of message 0 is .*image.*; allowed: a text"):
        learned(merging_tokenizer(*ROLES), NEXT_ROLE, [{"role": "user", "content": [{"type": "image"}]}, answer("b")])


def test_marks_inside_a_macro_are_refused_for_they_are_misplaced() -> None:
    template = (
        "{% macro said(m) %}<|assistant|>\n{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ said(m) }}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    with pytest.raises(DataError, match=r"row 7 of .*marks '<\|ass' as what the assistant says in message 1, which is"):
        learned(merging_tokenizer(*ROLES), template, [user("a"), answer("hello")])


def test_a_template_that_does_not_write_an_answer_is_refused() -> None:
    # As those of models that see: a content is a list of parts.
    template = NEXT_ROLE.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
    with pytest.raises(DataError, match=r"row 7 of .*does not write contents of the assistant that are one text"):
        learned(merging_tokenizer(*ROLES), template, [user("a"), answer("b")])


def test_a_template_whose_marks_cannot_be_matched_with_weights_is_refused() -> None:
    template = MARKED.replace("== 'assistant'", "== 'assistant' and loop.last")
    talk = [user("a"), answer("b", weight=0), user("c"), answer("d")]
    with pytest.raises(DataError, match="marks 1 answers of 2, so those that count cannot be told"):
        learned(merging_tokenizer(), template, talk)
