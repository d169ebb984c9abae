"""HumanEval and HumanEval+: a model completes functions, and their tests are run on what it wrote.

Prompts and stop sequences are those of lm-evaluation-harness' `humaneval` task; generated code runs in the jail of
`sandbox.py`, and only when the user has allowed it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cache_store.errors import UserError
from workers.judge.model import JudgedModel
from workers.judge.problems import CodeProblem
from workers.judge.sandbox import Execution, Limits, demand, run
from workers.judge.scores import Answered, Score, standard_error

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


@dataclass(frozen=True, kw_only=True)
class CodeSpec:
    """How to ask and how to run. `samples` completions a problem: one is greedy, more are drawn at `temperature`.
    `limit`: only the first problems."""

    allow_code_execution: bool = False
    allow_unisolated: bool = False
    samples: int = 1
    temperature: float = 0.8
    max_new_tokens: int = 512
    limit: int | None = None
    batch_size: int = 8
    seed: int = 1234
    limits: Limits = field(default_factory=Limits)


def score(
    judged: JudgedModel, task: str, problems: Sequence[CodeProblem], spec: CodeSpec, progress: Answered | None = None
) -> Score:
    """Return pass@1 of `judged` on `problems` (of the task named `task`). The solved problems are in `notes["solved"]`:
    a part for each would be too much for a table. `progress` counts problems whose completions are there.

    UserError unless `spec.allow_code_execution`, or where the machine cannot isolate the code."""
    _check(spec)
    demand_jail(spec)
    asked = list(problems)[: spec.limit]
    completions = []
    for start in range(0, len(asked), spec.batch_size):
        batch = asked[start : start + spec.batch_size]
        completions += complete(judged, [problem.prompt for problem in batch], spec)
        if progress is not None:
            progress(len(completions), len(asked))
    executions = execute(asked, completions, spec)
    rates = [pass_at_k(len(tried), sum(one.passed for one in tried), 1) for tried in executions]
    return Score(
        task=task,
        metric="pass@1",
        value=sum(rates) / len(rates),
        stderr=standard_error(rates),
        n=len(asked),
        shots=0,
        notes={
            "samples": spec.samples,
            "isolated": list(executions[0][0].isolated),
            "outcomes": _counted(executions),
            "solved": [problem.task_id for problem, rate in zip(asked, rates, strict=True) if rate > 0],
        },
    )


def demand_jail(spec: CodeSpec) -> None:
    """Raise UserError unless generated code may run and this machine can isolate it. Ask before hours of generation."""
    run("", allow_code_execution=spec.allow_code_execution, allow_unisolated=spec.allow_unisolated)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Estimate without bias, from `n` samples of which `correct` pass, of the chance that one of `k` does
    (Chen et al. 2021): 1 - C(n - correct, k) / C(n, k)."""
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {correct} correct in {n}: needs 0 <= correct <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def execute(
    problems: Sequence[CodeProblem], completions: Sequence[Sequence[str]], spec: CodeSpec
) -> list[list[Execution]]:
    """Test every completion of every problem, on all cores this process may use."""
    work = [
        (index, problem, completion)
        for index, (problem, tried) in enumerate(zip(problems, completions, strict=True))
        for completion in tried
    ]
    done: list[list[Execution]] = [[] for _ in problems]
    with ThreadPoolExecutor(_cores()) as pool:
        found = pool.map(lambda item: _try(item[1], item[2], spec), work)
        for (index, _, _), execution in zip(work, found, strict=True):
            done[index].append(execution)
    return done


def complete(judged: JudgedModel, prompts: Sequence[str], spec: CodeSpec) -> list[list[str]]:
    """Return `spec.samples` completions of every prompt, each cut before the first stop sequence."""
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    model, tokenizer = judged.model, judged.tokenizer
    longest = getattr(model.config, "max_position_embeddings", None)
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    width = max(map(len, encoded))
    if longest is not None and width + spec.max_new_tokens > longest:
        raise UserError(
            f"max_new_tokens: {spec.max_new_tokens}: with a prompt of {width} tokens that exceeds the model's "
            f"{longest} positions"
        )
    ends = _end_tokens(model, tokenizer)
    # Left, so that every row continues where its prompt ends.
    ids = torch.tensor([[ends[0]] * (width - len(row)) + row for row in encoded], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False, "num_beams": 1}
    if spec.samples > 1:
        sampling = {"do_sample": True, "temperature": spec.temperature, "top_p": 0.95, "top_k": 0}
        torch.manual_seed(spec.seed)
    make_config: Any = GenerationConfig  # its constructor has no types
    config = make_config(
        max_new_tokens=spec.max_new_tokens,
        num_return_sequences=spec.samples,
        pad_token_id=ends[0],
        eos_token_id=ends,
        **sampling,
    )
    stopping = StoppingCriteriaList([_stops_at(tokenizer, width)])
    with torch.inference_mode():
        rows = model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=stopping)
    texts = [
        _continuation(tokenizer, encoded[index // spec.samples], row[width:].tolist(), ends)
        for index, row in enumerate(rows)
    ]
    return [texts[start : start + spec.samples] for start in range(0, len(texts), spec.samples)]


def cut(text: str) -> str:
    """Return `text` before the first stop sequence in it."""
    return text[: min((at for stop in STOPS if (at := text.find(stop)) >= 0), default=len(text))]


def _continuation(tokenizer: Any, prompt: list[int], new: list[int], ends: list[int]) -> str:
    """Decode tokens, behind their prompt: some tokenizers drop a leading space of what they are given."""
    until = next((position for position, token in enumerate(new) if token in ends), len(new))
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    return cut(tokenizer.decode(prompt + new[:until], skip_special_tokens=True)[len(before) :])


def _stops_at(tokenizer: Any, width: int) -> Any:
    """Make a stopping criterion: rows whose continuation holds a stop sequence are finished."""
    import torch

    def stops(input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        # The longest stop sequence has seven characters, so at most as many tokens.
        ends = [tokenizer.decode(row[max(width, len(row) - 8) :]) for row in input_ids]
        found = [any(stop in text for stop in STOPS) for text in ends]
        return torch.tensor(found, device=input_ids.device)

    return stops


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    found = model.generation_config.eos_token_id if model.generation_config is not None else None
    found = tokenizer.eos_token_id if found is None else found
    if found is None:
        raise UserError("the tokenizer has no end-of-text token, so generation would never end")
    return list(found) if isinstance(found, list | tuple) else [int(found)]


def _try(problem: CodeProblem, completion: str, spec: CodeSpec) -> Execution:
    return run(
        problem.program(completion),
        spec.limits,
        allow_code_execution=spec.allow_code_execution,
        allow_unisolated=spec.allow_unisolated,
        modules=problem.modules(),
    )


def _check(spec: CodeSpec) -> None:
    demand(spec.allow_code_execution)
    for name, least in (("samples", 1), ("max_new_tokens", 1), ("batch_size", 1), ("limit", 1)):
        value = getattr(spec, name)
        if value is not None and value < least:
            raise UserError(f"{name}: {value}: must be at least {least}")


def _counted(executions: Sequence[Sequence[Execution]]) -> dict[str, int]:
    names: Iterator[str] = (one.outcome for tried in executions for one in tried)
    counted: dict[str, int] = {}
    for name in names:
        counted[name] = counted.get(name, 0) + 1
    return dict(sorted(counted.items()))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
