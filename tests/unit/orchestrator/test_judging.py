"""`segprop judge`: what is wrong with a request is said at once, and what comes out can be compared."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_lm import write_folder

from cache_store.errors import DataError, UserError
from orchestrator import cli
from orchestrator.environment import Environment
from orchestrator.judging import JudgedFolder, Judgement, check, dtype, judge, labels, table
from workers.judge import judges
from workers.judge.judges import Judge, JudgeSettings
from workers.judge.model import JudgedModel, load_model
from workers.judge.scores import Answered, Score, standard_error

PROBLEM = {
    "task_id": "Test/0",
    "prompt": "def two():\n",
    "entry_point": "two",
    "canonical_solution": "    return 2\n",
    "test": "def check(candidate):\n    assert candidate() == 2\n",
}
CODE: Any = {"tasks": ("humaneval",), "allow_code_execution": True, "max_new_tokens": 8}

linux = pytest.mark.skipif(sys.platform != "linux", reason="the jail is made of what Linux has")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    (root / "humaneval").mkdir()
    (root / "humaneval" / "HumanEval.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    return root


@linux
def test_models_are_judged_side_by_side_and_written_down(folder: Path, data: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", seed=1)
    stream = io.StringIO()
    out = tmp_path / "scores.json"
    found = judge([folder, other], JudgeSettings(data=data, **CODE), out=out, stream=stream)
    assert json.loads(out.read_text()) == json.loads(json.dumps(found.to_json()))
    assert [model["name"] for model in found.to_json()["models"]] == ["tiny", "other"]
    assert [model["scores"][0]["n"] for model in found.to_json()["models"]] == [1, 1]
    assert "tiny: humaneval: done" in stream.getvalue()
    assert "other: humaneval: done" in stream.getvalue()
    written = json.loads(out.read_text())
    assert list(written) == ["format", "settings", "environment", "models"]
    assert written["settings"]["tasks"] == ["humaneval"]
    assert written["settings"]["data"] == str(data)
    assert list(written["models"][0]) == ["name", "folder", "scores", "seconds"]


def test_a_judge_is_one_row(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def depth(judged: JudgedModel, task: str, settings: JudgeSettings, report: Answered) -> Score:
        report(1, 1)
        layers = judged.model.config.num_hidden_layers
        return Score(task=task, metric="layers", value=float(layers), stderr=None, n=1, shots=settings.shots)

    monkeypatch.setitem(judges.JUDGES, "depth", Judge(lambda task, settings: None, depth))
    out = tmp_path / "scores.json"
    assert cli.main(["judge", str(folder), "--tasks", "depth", "--out", str(out), "--quiet"]) == 0
    [score] = json.loads(out.read_text())["models"][0]["scores"]
    assert (score["task"], score["metric"], score["shots"]) == ("depth", "layers", 5)
    assert score["value"] == load_model(folder).model.config.num_hidden_layers


@linux
def test_the_command_prints_a_table_and_nothing_else_when_quiet(
    folder: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--tasks", "humaneval", "--data", str(data), "--allow-code-execution", "--limit", "1", "-q"]
    assert cli.main(["judge", str(folder), *options]) == 0
    printed = capfd.readouterr()
    assert printed.out.split()[:5] == ["Task", "Metric", "Shots", "n", "tiny"]
    assert "humaneval" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--device", "cuda"], "--device: is for model folders; of a run resources.device says where"),
        (["--out", "scores.json"], "--out: is for model folders; of a run summary.json has the scores"),
        (["runs/y/model/e2e"], "is a run, which is judged alone"),
        ([], "its evaluation.judge asks nothing; say what to ask, such as --data DIR"),
    ],
)
def test_a_run_is_judged_as_its_configuration_says(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    (tmp_path / "config.yaml").write_text("model: {family: causal_lm}\ndata: {name: stdlib}\n")
    assert cli.main(["judge", str(tmp_path), *options]) == 2
    assert complaint in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["{folder}", "--tasks", "mmul"],
            "there is no mmul; did you mean mmlu?; there are mmlu, winogrande",
        ),
        (["{folder}", "--tasks", ","], "--tasks: names none"),
        (["{folder}/absent", "--tasks", "humaneval"], "absent: no such folder"),
        (["{data}", "--tasks", "humaneval"], "not a model folder, it has no config.json"),
        (["{folder}", "--tasks", "humaneval"], "--data: humaneval needs a folder that holds humaneval/HumanEval.jsonl"),
        (["{folder}", "--tasks", "humaneval", "--data", "{data}"], "allow_code_execution: false"),
        (["{folder}", "--tasks", "humaneval_plus", "--data", "{data}"], "has none of HumanEvalPlus*.jsonl"),
        (["{folder}", "--tasks", "mmlu", "--data", "{data}"], "holds no folder mmlu"),
        (["{folder}", "--limit", "0"], "--limit: 0: must be at least 1"),
        (["{folder}", "--dtype", "float8"], "--dtype: float8: must be one of auto, float32, bfloat16, float16"),
        (["{folder}", "--out", "{data}"], "--out: "),
        (["{folder}", "--out", "{data}/absent/x.json"], "--out: "),
        ([], "Missing argument"),
    ],
)
def test_bad_input_ends_with_its_reason_and_exit_code_2(
    folder: Path, data: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    filled = [argument.format(folder=folder, data=data) for argument in arguments]
    assert cli.main(["judge", *filled]) == 2
    assert complaint in " ".join(capfd.readouterr().err.split())


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    settings = JudgeSettings(tasks=("humanevil", "humaneval"), shots=-1, batch_size=0)
    with pytest.raises(UserError) as caught:
        check([tmp_path / "a", tmp_path / "b"], settings)
    for complaint in ("humanevil; did you mean humaneval?", "--shots: -1", "--batch-size: 0", "/a: no", "/b: no"):
        assert complaint in caught.value.message


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["x/model/e2e", "x/model/segprop"], ["e2e", "segprop"]),
        (["x/model/segprop", "y/model/segprop", "original"], ["x/model/segprop", "y/model/segprop", "original"]),
        (["a/m", "b/m"], ["a/m", "b/m"]),
        (["m", "m"], ["m", "m"]),
    ],
)
def test_models_are_called_by_what_tells_them_apart(folders: list[str], names: list[str]) -> None:
    assert labels([Path(folder) for folder in folders]) == names


def test_the_table_shows_groups_and_differences_but_not_every_subject() -> None:
    def model(name: str, value: float) -> JudgedFolder:
        def one(task: str, *parts: Score) -> Score:
            return Score(task=task, metric="acc", value=value, stderr=0.01, n=100, shots=5, parts=parts)

        whole = one("mmlu", one("mmlu_stem", one("mmlu_anatomy")))
        return JudgedFolder(name, name, (whole,))

    stream = io.StringIO()
    models = (model("original", 0.5), model("segprop [0.5]", 0.5125))
    table(Judgement(JudgeSettings(), Environment(), models), stream)
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert lines[1] == ["mmlu", "acc", "5", "100", "50.00", "±", "1.00", "51.25", "±", "1.00", "(+1.25)"]
    assert [line[0] for line in lines[1:]] == ["mmlu", "mmlu_stem"]
    assert "segprop [0.5]" in stream.getvalue()


@pytest.mark.parametrize("damage", ["config", "weights", "tokenizer", "shape"])
def test_a_folder_that_transformers_cannot_load_is_named(tmp_path: Path, damage: str) -> None:
    broken = write_folder(tmp_path / "broken")
    if damage == "config":
        (broken / "config.json").write_text('{"model_type": "no_such_model"}')
    elif damage == "weights":
        file = broken / "model.safetensors"
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "shape":
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    else:
        for file in broken.glob("token*"):
            file.unlink()
    with pytest.raises(DataError, match="broken"):
        load_model(broken)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    pickled = write_folder(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"no \.safetensors weights"):
        load_model(pickled)


def test_an_unknown_device_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match="device: tpu9"):
        load_model(folder, device="tpu9")


def test_types_of_weights_are_those_asked_for(folder: Path) -> None:
    import torch

    assert load_model(folder).model.dtype == torch.float32
    assert load_model(folder, dtype=dtype("bfloat16")).model.dtype == torch.bfloat16


def test_the_standard_error_is_that_of_the_mean() -> None:
    assert standard_error([1.0]) is None
    assert standard_error([0.0, 1.0]) == pytest.approx(0.5)
    assert standard_error([1.0, 0.0, 0.0, 1.0]) == pytest.approx((1 / 3) ** 0.5 / 2)
