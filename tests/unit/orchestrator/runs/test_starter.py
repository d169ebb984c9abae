"""`segprop init`, `segprop doctor`, `segprop schema` and --set."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from PIL import Image
from text_classifiers import network_of, text_spec, word_pieces

from cache_store.errors import UserError
from orchestrator.cli import main
from orchestrator.runs import doctor
from orchestrator.runs.starter import Wanted, configuration, data_called, family_called


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(8):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


def test_a_configuration_for_images_is_written_planned_and_loads(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    assert main(["init", str(path), "--model", "resnet18", "--data", str(images), "--device", "l4"]) == 0
    said = capsys.readouterr().out
    assert "Nothing was run" in said
    assert f"segprop run {path}" in said
    text = path.read_text()
    assert text.splitlines()[0] == "# yaml-language-server: $schema=segprop.schema.json"
    assert text.count("\n# ") >= 4
    Draft202012Validator(json.loads((tmp_path / "segprop.schema.json").read_text())).validate(yaml.safe_load(text))
    assert not (tmp_path / "runs").exists()
    assert main(["init", str(path), "--model", "resnet18", "--data", "digits"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_configuration_that_cannot_be_planned_is_not_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "cat" / "1.png")
    path = tmp_path / "mine.yaml"
    assert main(["init", str(path), "--model", "resnet18", "--data", str(tmp_path / "photos")]) == 2
    assert "one class alone" in capsys.readouterr().err
    assert not path.exists()


def test_nobody_is_asked_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["init", str(tmp_path / "x.yaml"), "--model", "resnet18"]) == 2
    assert "--data: is missing, and there is no terminal to ask in" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("typer.prompt", lambda question: "digits")
    assert main(["init", str(tmp_path / "x.yaml"), "--model", "resnet18"]) == 0
    assert yaml.safe_load((tmp_path / "x.yaml").read_text())["data"]["name"] == "digits"


ROWS = {
    "messages.jsonl": ('{"messages": []}\n', "chat"),
    "alpaca.csv": ("instruction,input,output\na,b,c\n", "chat"),
    "prose.csv": ("text,source\na,b\n", "text"),
    "reviews.csv": ("label,text\n1,a\n", "labelled"),
    "pairs.jsonl": ('{"premise": "a", "hypothesis": "b", "label": 1}\n', "labelled"),
    "broken.jsonl": ("{\n", "text"),
    "book.txt": ("Once upon a time\n", "text"),
}


@pytest.mark.parametrize("name", ROWS)
def test_data_are_told_by_what_lies_there(name: str, tmp_path: Path) -> None:
    content, expected = ROWS[name]
    (tmp_path / name).write_text(content)
    assert data_called(str(tmp_path / name)) == (expected, "text")
    assert data_called(str(tmp_path)) == (expected, "text")


def test_models_are_told_by_name_and_others_get_the_nearest(tmp_path: Path) -> None:
    assert [family_called(name) for name in ("resnet50", "vgg16_bn", "vit_b_16")] == ["resnet", "vgg", "vit"]
    assert family_called("meta-llama/Llama-3.1-8B") == family_called(str(tmp_path)) == "causal_lm"
    assert family_called("swin_t", "cifar10", "images") == "torchvision"
    assert family_called("google/vit-base", "folder", "images") == "hf_image"
    with pytest.raises(UserError, match="did you mean 'resnet18'"):
        family_called("resnet-18")
    with pytest.raises(UserError, match="did you mean 'digits'"):
        data_called("digit")
    with pytest.raises(UserError, match="both of one kind"):
        configuration(Wanted("resnet18", "stdlib"))


def test_a_text_model_is_told_by_what_it_was_and_else_by_the_data(tmp_path: Path) -> None:
    assert family_called("google-bert/bert-base-uncased", "labelled") == "hf_text"
    assert family_called("google-bert/bert-base-uncased", "chat") == "causal_lm"
    for stated, family in (("LlamaForCausalLM", "causal_lm"), ("BertForMaskedLM", "hf_text")):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [stated]}))
        assert family_called(str(tmp_path), "labelled") == family_called(str(tmp_path), "text") == family
    (tmp_path / "config.json").write_text("{")
    assert family_called(str(tmp_path), "labelled") == "hf_text"


def test_a_classifier_of_text_gets_a_configuration_that_plans(tmp_path: Path) -> None:
    rows = tmp_path / "reviews.csv"
    rows.write_text("text,label\n" + "".join(f"w{index % 7} w9,{index % 2}\n" for index in range(40)))
    folder = tmp_path / "bert"
    spec = text_spec(max_position_embeddings=128)
    network_of(spec).save_pretrained(folder)
    word_pieces(folder)
    path = tmp_path / "mine.yaml"
    assert main(["init", str(path), "--model", str(folder), "--data", str(rows), "--regimes", "segprop"]) == 0
    written = yaml.safe_load(path.read_text())
    assert written["model"] == {"family": "hf_text", "path": str(folder)}
    assert written["data"]["name"] == "labelled"


def test_a_language_models_configuration_is_one_that_the_schema_allows() -> None:
    from orchestrator.runs.json_schema import json_schema

    text = configuration(Wanted("meta-llama/Llama-3.1-8B", "stdlib", device="h100"))
    Draft202012Validator(json_schema()).validate(yaml.safe_load(text))


def test_the_doctor_finds_what_is_missing_and_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "peft" else object())
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "file").write_text("")
    assert main(["doctor", str(tmp_path), "--json"]) == 0
    out = capsys.readouterr().out
    found = {each["name"]: each for each in json.loads(out)}
    assert found["torch"]["state"] == "ok"
    assert found["peft"]["remedy"] == "pip install 'segprop[lm]'"
    assert found["HF_TOKEN"]["found"] == "set"
    assert "hf_secret" not in out
    assert "/s written" in found["disk speed"]["found"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    assert main(["doctor", str(tmp_path), "--store", str(tmp_path / "file" / "store")]) == 1
    said = capsys.readouterr().out
    assert "PROBLEM  store:" in said
    assert "1 problem\n" in said
    assert main(["doctor", str(tmp_path), "--store", str(tmp_path / "store")]) == 0


def test_set_is_the_same_as_a_key_behind_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(f"model: {{name: resnet18}}\ndata: {{name: digits}}\nregimes: [e2e]\nrun_dir: {tmp_path}/run\n")
    assert (
        main(["plan", str(path), "training.epochs=3", "--set", "seed=5", "--set", "training.batch_size=7", "--json"])
        == 0
    )
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["training"]["epochs"], config["training"]["batch_size"], config["seed"]) == (3, 7, 5)
    assert main(["plan", str(path), "--set", "training.epoch=3"]) == 2
    assert "did you mean" in capsys.readouterr().err
