"""`workers.judge.harness`: local files asked exactly as the harness asks its own data sets."""

from __future__ import annotations

import csv
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lm import model, tokenizer

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install segprop[eval]")

from cache_store.errors import DataError, UserError
from workers.judge.harness import HarnessSpec, build_tasks, score
from workers.judge.model import JudgedModel

COLUMNS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")
SUBJECTS = ("anatomy", "astronomy", "management")


def question(subject: str, split: str, number: int) -> dict[str, Any]:
    return {
        "question": f" What is {number} in {subject}, {split}?\nSay, “{number}”. ",
        "choices": [f"{number + offset} {'x' * offset}" for offset in range(4)],
        "answer": (number * 7 + len(subject)) % 4,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in the layout of the published ones: five examples and seven questions a subject."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("dev", 5), ("test", 7)):
        (folder / "mmlu" / split).mkdir(parents=True)
        for subject in SUBJECTS:
            with (folder / "mmlu" / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(COLUMNS)
                for number in range(count):
                    row = question(subject, split, number)
                    writer.writerow([row["question"], *row["choices"], row["answer"]])
    (folder / "winogrande").mkdir()
    for name, count in (("train_s", 40), ("train_xs", 9), ("dev", 11)):
        with (folder / "winogrande" / f"{name}.jsonl").open("w") as file:
            for number in range(count):
                file.write(json.dumps({"qID": f"{name}-{number}", **sentence(name, number)}) + "\n")
    return folder


def sentence(name: str, number: int) -> dict[str, str]:
    return {
        "sentence": f"In {name} the cup beat the box because _ was {number} times as tall.",
        "option1": "the cup",
        "option2": "the box",
        "answer": str(1 + number * 5 % 3 % 2),
    }


def spec(data: Path, **changes: Any) -> HarnessSpec:
    return HarnessSpec(**{"data": data, "subjects": SUBJECTS, "batch_size": 2, **changes})


def requests(task: Any, limit: int | None = None) -> list[Any]:
    task.build_all_requests(limit=limit)
    return [(instance.doc_id, instance.idx, instance.args) for instance in task.instances]


@cache
def definitions() -> Any:
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    folders = [folder / "mmlu" / "default", folder / "winogrande"]  # reading all takes half a minute
    return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False).task_index


def harness_own(name: str, folder: Path, shots: int, cache: Path) -> Any:
    """The harness' definition with nothing changed but the place of the data set, loaded by its own means."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(definitions()[name].yaml_path)
    config.pop("tag", None)
    config.update(dataset_path=str(folder), dataset_kwargs={"cache_dir": str(cache)})
    task = ConfigurableTask(config=config)
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=1234)
    return task


def write_hub_set(folder: Path, name: str, splits: dict[str, list[dict[str, Any]]]) -> Path:
    """Rows as a data set of the hub lies in its repository: Parquet, and a card that says which file is what."""
    from datasets import Dataset

    lines = ["---", "configs:", f"- config_name: {name}", "  data_files:"]
    for split, rows in splits.items():
        Dataset.from_list(rows).to_parquet(str(folder / name / f"{split}.parquet"))
        lines += [f"  - split: {split}", f"    path: {name}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


@pytest.mark.parametrize("shots", [0, 2, 5])
def test_mmlu_is_asked_from_files_as_the_harness_asks_it_from_a_hub_set(data: Path, tmp_path: Path, shots: int) -> None:
    rows = {
        split: [{"subject": "anatomy", **question("anatomy", split, number)} for number in range(count)]
        for split, count in (("dev", 5), ("test", 7))
    }
    theirs = harness_own("mmlu_anatomy", write_hub_set(tmp_path / "set", "anatomy", rows), shots, tmp_path / "cache")
    tasks = build_tasks("mmlu", spec(data, shots=shots)).tasks
    ours = requests(tasks["mmlu_anatomy"])
    assert ours == requests(theirs)
    assert len(ours) == 7 * 4
    assert ours[0][2][0].count("Answer:") == shots + 1
    for doc_ours, doc_theirs in zip(tasks["mmlu_anatomy"].eval_docs, theirs.eval_docs, strict=True):
        assert tasks["mmlu_anatomy"].doc_to_target(doc_ours) == theirs.doc_to_target(doc_theirs)


@pytest.mark.parametrize("shots", [0, 5])
def test_winogrande_is_asked_from_files_as_the_harness_asks_it_from_a_hub_set(
    data: Path, tmp_path: Path, shots: int
) -> None:
    rows = {
        "train": [sentence("train_s", number) for number in range(40)],
        "validation": [sentence("dev", number) for number in range(11)],
    }
    folder = write_hub_set(tmp_path / "set", "winogrande_xl", rows)
    theirs = harness_own("winogrande", folder, shots, tmp_path / "cache")
    built = build_tasks("winogrande", spec(data, shots=shots))
    tasks, groups, notes = built.tasks, built.groups, built.notes
    assert requests(tasks["winogrande"]) == requests(theirs)
    assert groups == {}
    assert notes["examples"] == "train_s.jsonl"  # the largest there is


def test_the_seed_chooses_winograndes_examples(data: Path) -> None:
    def asked(seed: int) -> list[Any]:
        return requests(build_tasks("winogrande", spec(data, seed=seed)).tasks["winogrande"])

    assert asked(1) == asked(1)
    assert asked(1) != asked(2)


@pytest.fixture(scope="module")
def judged() -> JudgedModel:
    return JudgedModel(model(seed=3, positions=4096), tokenizer())


def preferred(judged: JudgedModel, prompt: str, choices: list[str]) -> int:
    """The choice with the highest log-likelihood, computed here."""
    sums = []
    start = len(judged.tokenizer(prompt)["input_ids"])
    for choice in choices:
        ids = torch.tensor([judged.tokenizer(prompt + choice)["input_ids"]])
        with torch.inference_mode():
            scores = judged.model(ids).logits[0].float().log_softmax(-1)
        sums.append(scores[range(start - 1, ids.shape[1] - 1), ids[0, start:]].sum().item())
    return sums.index(max(sums))


def test_the_score_is_the_share_of_questions_where_the_right_letter_is_likeliest(
    judged: JudgedModel, data: Path
) -> None:
    found = score(judged, "mmlu", spec(data, shots=1))
    right = {}
    for subject in SUBJECTS:
        head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        hits = 0
        for number in range(7):
            prompt = head + shown(question(subject, "dev", 0), answered=True) + "\n\n"
            asked = question(subject, "test", number)
            prompt += shown(asked, answered=False)
            hits += preferred(judged, prompt, [" A", " B", " C", " D"]) == asked["answer"]
        right[f"mmlu_{subject}"] = hits / 7
    parts = {part.task: part.value for group in found.parts for part in group.parts}
    assert parts == pytest.approx(right)
    assert found.value == pytest.approx(sum(right.values()) / 3)
    assert 0 < found.value < 1
    assert {group.task: group.n for group in found.parts} == {
        "mmlu_stem": 14,  # to the harness, anatomy is one of these
        "mmlu_other": 7,
    }
    assert found.n == 21


def shown(row: dict[str, Any], *, answered: bool) -> str:
    letters = "ABCD"
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters, row["choices"], strict=True))
    return f"{row['question'].strip()}\n{choices}Answer:" + (f" {letters[row['answer']]}" if answered else "")


def test_the_limit_is_a_subjects_and_the_same_again_is_the_same(judged: JudgedModel, data: Path) -> None:
    seen: list[tuple[int, int]] = []
    first = score(judged, "mmlu", spec(data, limit=2), lambda done, total: seen.append((done, total)))
    assert first.n == 6
    assert seen == [(done, 24) for done in range(1, 25)]
    assert score(judged, "mmlu", spec(data, limit=2)) == first
    assert score(judged, "mmlu", spec(data, limit=3)).notes["answers"] != first.notes["answers"]


def test_a_single_question_has_no_standard_error(judged: JudgedModel, data: Path) -> None:
    found = score(judged, "winogrande", spec(data, limit=1))
    assert (found.n, found.stderr) == (1, None)
    assert score(judged, "mmlu", spec(data, limit=1, subjects=("anatomy",))).n == 1


@pytest.mark.parametrize(
    ("task", "changes", "complaint"),
    [
        ("mmmlu", {}, "mmmlu: the harness is used for mmlu and winogrande"),
        ("mmlu", {"shots": 6}, "shots: 6: .* at most 5"),
        ("mmlu", {"shots": -1}, "shots: -1: must be at least 0"),
        ("mmlu", {"limit": 0}, "limit: 0"),
        ("mmlu", {"batch_size": 0}, "batch_size: 0"),
        ("mmlu", {"subjects": ("anatomy", "alchemy")}, "no alchemy; it has abstract_algebra, anatomy"),
        ("mmlu", {"subjects": None}, r"abstract_algebra_dev\.csv: cannot be read"),
    ],
)
def test_impossible_requests_are_refused(data: Path, task: str, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        build_tasks(task, spec(data, **changes))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("question,choice0,choice1,choice2,answer\n", "has no choice3"),
        ("", "has no question"),
        (",".join(COLUMNS) + "\nWhat?,a,b,c,d,4\n", r"csv:2: must be a question, four choices"),
        (",".join(COLUMNS) + "\nWhat?,a,b,c\n", r"csv:2: must be a question, four choices"),
        (",".join(COLUMNS) + "\n", "mmlu_anatomy: its dev files .* hold no questions"),
    ],
)
def test_malformed_mmlu_files_are_named(data: Path, tmp_path: Path, text: str, complaint: str) -> None:
    for split in ("dev", "test"):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        source = data / "mmlu" / split / f"anatomy_{split}.csv"
        (tmp_path / "mmlu" / split / source.name).write_text(source.read_text() if split == "test" else text)
    with pytest.raises(DataError, match=complaint):
        build_tasks("mmlu", spec(tmp_path, subjects=("anatomy",)))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", r"dev\.jsonl:1: not a JSON object"),
        ("3", r"dev\.jsonl:1: not a JSON object"),
        ('{"sentence": "a _"}', "has no option1, option2, answer"),
        ('{"sentence": "a", "option1": "b", "option2": "c", "answer": "1"}', "a sentence with _ in it"),
        ('{"sentence": "_", "option1": "b", "option2": "c", "answer": "3"}', "an answer of 1 or 2"),
    ],
)
def test_malformed_winogrande_files_are_named(tmp_path: Path, line: str, complaint: str) -> None:
    (tmp_path / "winogrande").mkdir()
    (tmp_path / "winogrande" / "train_xs.jsonl").write_text(json.dumps(sentence("x", 1)) + "\n")
    (tmp_path / "winogrande" / "dev.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=complaint):
        build_tasks("winogrande", spec(tmp_path))


def test_without_training_files_winogrande_has_no_examples(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of train_xl\.jsonl, .* is there"):
        build_tasks("winogrande", spec(tmp_path))
