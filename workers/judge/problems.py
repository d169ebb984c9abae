"""Read HumanEval and HumanEval+ problems, and make the programs that test a completion of them."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_store.errors import DataError, UserError

#: File name patterns by task, first match wins, below `humaneval/` of the data folder.
FILES = {
    "humaneval": ("HumanEval.jsonl", "HumanEval.jsonl.gz"),
    "humaneval_plus": ("HumanEvalPlus*.jsonl", "HumanEvalPlus*.jsonl.gz"),
}
_NEEDED = ("task_id", "prompt", "entry_point", "canonical_solution")


@dataclass(frozen=True)
class CodeProblem:
    """A function to complete. `test` defines `check(candidate)`; in EvalPlus' own format there are `inputs` instead
    (JSON text, a list of argument lists), and the canonical solution says what is right for them."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str | None
    inputs: str | None
    atol: float

    def program(self, completion: str) -> str:
        """Return Python source that returns when `completion` solves the problem and raises when it does not."""
        solution = self.prompt + completion
        if self.inputs is None:
            return f"{solution}\n\n{self.test}\n\ncheck({self.entry_point})\n"
        settings = {
            "solution": solution,
            "reference": self.prompt + self.canonical_solution,
            "entry_point": self.entry_point,
            "atol": self.atol,
        }
        return f"SETTINGS = {settings!r}\nINPUTS = {self.inputs!r}\n{_PLUS}"

    def modules(self) -> tuple[str, ...]:
        """Name the folders outside the standard library that the tests (not the completion) need: numpy's, or none."""
        if self.test is None or self.inputs is not None or "import numpy" not in self.test:
            return ()
        found = importlib.util.find_spec("numpy")
        if found is None or found.origin is None:
            raise UserError(f"{self.task_id}: its tests need numpy, which is not installed")
        return (str(Path(found.origin).parents[1]),)


def read_problems(path: Path) -> tuple[CodeProblem, ...]:
    """Read problems from JSON lines, gzipped or not: HumanEval's, EvalPlus' (`base_input`, `plus_input`, `atol`) and
    the hub's HumanEval+ (tests that hold their inputs). DataError names the line that is wrong."""
    try:
        opener: Any = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            problems = tuple(_problems(path, file))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not problems:
        raise DataError(f"{path}: holds no problems")
    return problems


def find_file(data: Path, task: str) -> Path:
    """Find the file of `task` below `data`; DataError says what was looked for."""
    folder = data / "humaneval"
    for pattern in FILES[task]:
        found = sorted(folder.glob(pattern))
        if found:
            return found[0]
    raise DataError(f"{folder}: has none of {', '.join(FILES[task])}, which {task} needs")


def _problems(path: Path, lines: Any) -> Iterator[CodeProblem]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        missing = [key for key in _NEEDED if not isinstance(row, dict) or not isinstance(row.get(key), str)]
        if not missing and "test" not in row and "base_input" not in row:
            missing = ["test (or base_input)"]
        if missing:
            raise DataError(f"{path}:{number}: not a HumanEval problem, it has no {', '.join(missing)}")
        inputs = None
        if "base_input" in row:
            # EvalPlus writes {} for problems without extra inputs.
            inputs = json.dumps([*row["base_input"], *(row.get("plus_input") or [])])
        yield CodeProblem(
            task_id=row["task_id"],
            prompt=row["prompt"],
            entry_point=row["entry_point"],
            canonical_solution=row["canonical_solution"],
            test=row.get("test"),
            inputs=inputs,
            atol=float(row.get("atol") or 0),
        )


#: EvalPlus' rules for equal results: exact, except that floats may differ by atol (1e-6 unless given) and 1e-7 of the
#: expected value, and that any zero of the polynomial will do for find_zero.
_PLUS = """
import json


def _close(found, expected, atol):
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(_close, found, expected, [atol] * len(expected)))
    return found == expected or abs(found - expected) <= atol + 1e-7 * abs(expected)


def _floats(value):
    return isinstance(value, float) or (
        isinstance(value, (list, tuple)) and all(isinstance(item, float) for item in value)
    )


def _function(source):
    names = {"__name__": "program"}
    exec(source, names)
    return names[SETTINGS["entry_point"]]


reference, inputs = _function(SETTINGS["reference"]), json.loads(INPUTS)
expected_results = [reference(*arguments) for arguments in inputs]
candidate = _function(SETTINGS["solution"])
for arguments, kept, expected in zip(json.loads(INPUTS), json.loads(INPUTS), expected_results, strict=True):
    found, atol = candidate(*arguments), SETTINGS["atol"]
    if SETTINGS["entry_point"] == "find_zero":
        assert abs(sum(c * found**i for i, c in enumerate(kept[0]))) <= (atol or 1e-6), f"f{kept} is not 0"
        continue
    if atol == 0 and _floats(expected):
        atol = 1e-6
    same = found == expected or (atol != 0 and type(found) is type(expected) and _close(found, expected, atol))
    assert same, f"f(*{kept}) is {found!r}, not {expected!r}"
"""
