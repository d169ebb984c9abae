"""`workers.judge.humaneval` and `problems`: problems as published, completions as greedy decoding gives them."""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_lm import model, tokenizer

from cache_store.errors import DataError, UserError
from workers.judge.humaneval import STOPS, CodeSpec, complete, cut, execute, pass_at_k, score
from workers.judge.model import JudgedModel
from workers.judge.problems import CodeProblem, find_file, read_problems

SHARED = Path(os.environ.get("SEGPROP_SHARED") or Path(__file__).resolve().parents[5] / "shared")
ALLOWED = CodeSpec(allow_code_execution=True, batch_size=3, max_new_tokens=24)
ADD = {
    "task_id": "Test/0",
    "prompt": 'def add(a, b):\n    """The sum."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
PLUS = {**ADD, "test": "", "base_input": [[1, 2], [0.5, 0.25]], "plus_input": [[[1], [2]], [-1, 1]], "atol": 0}

linux = pytest.mark.skipif(sys.platform != "linux", reason="the jail is made of what Linux has")


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def problem(**changes: Any) -> CodeProblem:
    fields = {**ADD, "inputs": None, "atol": 0.0, **changes}
    return CodeProblem(**fields)


def passes(one: CodeProblem, completion: str) -> bool:
    [[done]] = execute([one], [[completion]], ALLOWED)
    return done.passed


@linux
def test_every_published_solution_passes_and_an_empty_one_never_does() -> None:
    try:
        file = find_file(SHARED / "data", "humaneval")
    except DataError as error:
        pytest.skip(error.message)
    problems = read_problems(file)
    assert len(problems) == 164
    solved = execute(problems, [[one.canonical_solution] for one in problems], ALLOWED)
    assert [one.task_id for one, [done] in zip(problems, solved, strict=True) if not done.passed] == []
    empty = execute(problems[::8], [["    return None\n"] for _ in problems[::8]], ALLOWED)
    assert not any(done.passed for [done] in empty)


@linux
def test_every_sample_of_a_problem_is_tried_in_order() -> None:
    done = execute([problem()], [["    return a + b\n", "    return a\n", "    return b + a\n"]], ALLOWED)
    assert [one.passed for one in done[0]] == [True, False, True]


@linux
def test_evalplus_inputs_are_judged_by_the_canonical_solution(tmp_path: Path) -> None:
    [plus] = read_problems(write(tmp_path / "p.jsonl", PLUS))
    assert passes(plus, "    return a + b\n")
    assert not passes(plus, "    return a + b if isinstance(a, int) else 0.75 + 1e-3\n")
    assert not passes(plus, "    return (a + b) if a != -1 else 1\n")
    assert not passes(plus, "    return a + b if isinstance(a, list) or a != 1 else str(3)\n")


@linux
def test_evalplus_allows_floats_their_rounding_but_nothing_else(tmp_path: Path) -> None:
    third = {**PLUS, "canonical_solution": "    return [a / 3, b / 3]\n", "base_input": [[1.0, 2.0]], "plus_input": []}
    [plus] = read_problems(write(tmp_path / "p.jsonl", third))
    assert passes(plus, "    return [a / 3 + 1e-9, b / 3]\n")
    assert not passes(plus, "    return [a / 3 + 1e-4, b / 3]\n")
    assert not passes(plus, "    return [a / 3]\n")
    assert not passes(plus, "    return (a / 3, b / 3)\n".replace("(a", "(a + 1e-9"))
    [loose] = read_problems(write(tmp_path / "q.jsonl", {**third, "atol": 1e-3}))
    assert passes(loose, "    return [a / 3 + 1e-4, b / 3]\n")


@linux
def test_a_candidate_that_changes_its_arguments_does_not_change_what_is_expected(tmp_path: Path) -> None:
    ordered = "    a.sort()\n    return a\n"
    row = {**PLUS, "canonical_solution": ordered, "base_input": [[[2, 1], 0]], "plus_input": {}}
    [plus] = read_problems(write(tmp_path / "p.jsonl", row))
    assert passes(plus, ordered)
    assert passes(plus, "    return [min(a), max(a)]\n")
    assert not passes(plus, "    a.clear()\n    return a\n")


@linux
def test_any_zero_will_do_for_find_zero(tmp_path: Path) -> None:
    row = {
        **PLUS,
        "prompt": "def find_zero(xs):\n",
        "entry_point": "find_zero",
        "canonical_solution": "    return 1.0\n",
        "base_input": [[[-1, 0, 1]]],
        "plus_input": [],
        "atol": 1e-4,
    }
    [plus] = read_problems(write(tmp_path / "p.jsonl", row))
    assert passes(plus, "    return -1.0\n")
    assert not passes(plus, "    return 0.5\n")


@linux
def test_tests_that_need_numpy_get_it() -> None:
    needing = problem(test="import numpy as np\ndef check(f):\n    assert np.allclose(f(1.0, 2.0), 3.0)\n")
    assert passes(needing, "    return a + b\n")


def test_gzip_and_plain_files_hold_the_same_problems(tmp_path: Path) -> None:
    plain = write(tmp_path / "HumanEval.jsonl", ADD, {**ADD, "task_id": "Test/1"})
    packed = tmp_path / "HumanEval.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_problems(plain) == read_problems(packed)
    assert [one.task_id for one in read_problems(plain)] == ["Test/0", "Test/1"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no problems"),
        ("{", r":1: not JSON"),
        ("[" * 100_000, r":1: not JSON"),
        ("[1]", r":1: not a HumanEval problem"),
        (json.dumps(ADD) + "\n" + json.dumps({**ADD, "prompt": None}), r":2: .* it has no prompt"),
        (json.dumps({key: value for key, value in ADD.items() if key != "test"}), "no test"),
    ],
)
def test_a_file_that_holds_something_else_is_named_with_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=complaint):
        read_problems(tmp_path / "p.jsonl")


def test_missing_and_truncated_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"HumanEval.jsonl, HumanEval.jsonl.gz"):
        find_file(tmp_path, "humaneval")
    with pytest.raises(DataError, match="cannot be read"):
        read_problems(tmp_path / "absent.jsonl")
    packed = tmp_path / "p.jsonl.gz"
    packed.write_bytes(gzip.compress(random.Random(0).randbytes(5000))[:2000])
    with pytest.raises(DataError, match="cannot be read"):
        read_problems(packed)


@given(st.integers(1, 40), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(n: int, data: st.DataObject) -> None:
    correct, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    # The chance that k draws without replacement all miss, one draw after the other.
    miss = 1.0
    for drawn in range(k):
        miss *= max(0, n - correct - drawn) / (n - drawn)
    assert pass_at_k(n, correct, k) == pytest.approx(1 - miss, abs=1e-9)
    assert pass_at_k(n, correct, 1) == pytest.approx(correct / n)
    if k < n:
        assert pass_at_k(n, correct, k + 1) >= pass_at_k(n, correct, k)


def test_pass_at_k_is_unbiased() -> None:
    """Over all ways in which samples can turn out, its mean is the true chance that one of k passes."""
    chance, n, k = 0.3, 6, 2
    mean = 0.0
    for outcome in range(2**n):
        correct = outcome.bit_count()
        mean += chance**correct * (1 - chance) ** (n - correct) * pass_at_k(n, correct, k)
    assert mean == pytest.approx(1 - (1 - chance) ** k)


@pytest.mark.parametrize(("n", "correct", "k"), [(0, 0, 1), (3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_pass_at_k_refuses_what_has_no_meaning(n: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, correct, k)


@given(st.text(alphabet="ab \n", max_size=20), st.sampled_from(STOPS), st.text(alphabet="xy\n#", max_size=20))
def test_a_completion_ends_before_its_first_stop_sequence(before: str, stop: str, after: str) -> None:
    assert cut(before + stop + after) == before
    assert cut(before) == before


def greedy(judged: JudgedModel, prompt: str, most: int) -> str:
    """Token by token, without batch, padding or cache."""
    ids = judged.tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(most):
        with torch.inference_mode():
            token = int(judged.model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == judged.tokenizer.eos_token_id:
            break
        ids.append(token)
        text: str = judged.tokenizer.decode(ids[start:])
        if any(stop in text for stop in STOPS):
            break
    return cut(judged.tokenizer.decode(ids[start:]))


@pytest.fixture(scope="module")
def judged() -> JudgedModel:
    return JudgedModel(model(), tokenizer())


def test_completions_are_greedy_whatever_else_is_in_the_batch(judged: JudgedModel) -> None:
    prompts = ["def f(x):\n", "class A:\n    def method(self, value):\n", "x"]
    judged.model.generation_config.do_sample = True
    judged.model.generation_config.temperature = 5.0
    found = complete(judged, prompts, ALLOWED)
    assert found == [[greedy(judged, prompt, ALLOWED.max_new_tokens)] for prompt in prompts]
    assert any(text for [text] in found)


def test_generation_stops_at_a_stop_sequence(judged: JudgedModel) -> None:
    """Weights that write the same text whatever they are asked: a body, then a new function without an end."""
    text = "\n    return 1\ndef g(): "
    letters = judged.tokenizer(text)["input_ids"]
    scripted = _Scripted(judged.model, letters)
    assert complete(JudgedModel(scripted, judged.tokenizer), ["def f():"], ALLOWED) == [["\n    return 1"]]
    assert scripted.steps == len("\n    return 1\ndef")


def test_samples_are_drawn_from_the_seed(judged: JudgedModel) -> None:
    spec = CodeSpec(allow_code_execution=True, samples=3, temperature=1.0, max_new_tokens=12)
    first, again = complete(judged, ["def f", "x"], spec), complete(judged, ["def f", "x"], spec)
    assert first == again
    assert [len(tried) for tried in first] == [3, 3]
    assert len({text for tried in first for text in tried}) > 2
    other = CodeSpec(allow_code_execution=True, samples=3, temperature=1.0, max_new_tokens=12, seed=5)
    assert complete(judged, ["def f", "x"], other) != first


class _Scripted(torch.nn.Module):
    """Generates through transformers' own loop, with logits that spell a text over and over."""

    def __init__(self, inner: Any, letters: list[int]) -> None:
        super().__init__()
        self.inner, self.letters, self.steps = inner, letters, 0
        inner_forward = inner.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            out = inner_forward(*args, **kwargs)
            out.logits = torch.zeros_like(out.logits)
            out.logits[:, -1, self.letters[self.steps % len(self.letters)]] = 1.0
            self.steps += 1
            return out

        self.forward_of_inner = forward

    config = property(lambda self: self.inner.config)
    device = property(lambda self: self.inner.device)
    generation_config = property(lambda self: self.inner.generation_config)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        before = self.inner.forward
        self.inner.forward = self.forward_of_inner
        try:
            return self.inner.generate(*args, **kwargs)
        finally:
            self.inner.forward = before


@linux
def test_the_score_is_the_share_of_problems_solved(judged: JudgedModel) -> None:
    body = "    return a + b\n<end>"
    letters = judged.tokenizer(body.removesuffix("<end>"))["input_ids"] + [judged.tokenizer.eos_token_id]
    problems = [problem(), problem(task_id="Test/1", test="def check(f):\n    assert f(2, 2) == 5\n")]
    seen: list[tuple[int, int]] = []
    spec = CodeSpec(allow_code_execution=True, max_new_tokens=40)
    found = score(
        JudgedModel(_Scripted(judged.model, letters), judged.tokenizer),
        "humaneval",
        problems,
        spec,
        lambda done, total: seen.append((done, total)),
    )
    assert (found.value, found.n, found.metric, found.stderr) == (0.5, 2, "pass@1", 0.5)
    assert found.notes["solved"] == ["Test/0"]
    assert found.notes["outcomes"] == {"failed": 1, "passed": 1}
    assert seen[-1] == (2, 2)


def test_a_prompt_beyond_the_models_positions_is_refused() -> None:
    small = JudgedModel(model(positions=32), tokenizer())
    with pytest.raises(UserError, match="exceeds the model's 32 positions"):
        complete(small, ["x" * 20], ALLOWED)


def test_nothing_is_generated_before_the_user_allows_the_code_to_run(judged: JudgedModel) -> None:
    with pytest.raises(UserError, match="allow_code_execution: false"):
        score(judged, "humaneval", [problem()], CodeSpec())
