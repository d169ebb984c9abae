"""Loading a configuration: what is read, what is refused, how it is said."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from planning import CIFAR, SMALL, merged, small_config

from cache_store import suggest
from cache_store.errors import ConfigError, DataError
from orchestrator.config import messages
from orchestrator.config.compatibility import compatible
from orchestrator.config.load import load, read_document
from orchestrator.config.messages import WORDS_ELSEWHERE, _all_keys
from orchestrator.config.rates import Rates
from orchestrator.config.schema import Config, config_class
from orchestrator.config.values import parse_size
from orchestrator.config.yaml_loader import MAX_BYTES, key_text, parse_document
from orchestrator.runs.dry_run import print_plan
from orchestrator.runs.prepare import prepare, prepare_document
from orchestrator.runs.run_dir import check_run_dir, claim_run_dir, in_own_dir
from workers.specs.as_json import to_json
from workers.specs.experiment import TrainSpec

FINITE = "must be a finite number, a whole one below 2^63"
BASE = """\
model:
  name: resnet18
  stem: small
data:
  name: digits
  image_size: 16
"""


def write(tmp_path: Path, text: str, name: str = "config.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def problems_of(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the one error, without the heading and the indent."""
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    heading, *lines = caught.value.message.splitlines()
    count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
    assert heading == f"{path}: {count}"
    assert len(caught.value.details["problems"]) == len(lines)
    json.dumps(caught.value.details)
    assert caught.value.exit_code == 2
    return [line[2:] for line in lines]


# -- YAML ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("3E+2", 300.0),
        ("1.5e2", 150.0),
        (".5", 0.5),
        ("-2", -2),
        ("1_000", 1000),
        ("0x10", 16),
        ("010", 10),
        ("12:30", "12:30"),
        ("2024-01-02", "2024-01-02"),
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1e-3'", "1e-3"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("-", None),
        ("[1, 2e-1]", [1, 0.2]),
    ],
)
def test_scalars_mean_what_they_look_like(text: str, value: Any) -> None:
    if text == "-":
        assert parse_document("a:\n  -\n").data == {"a": [None]}
        return
    document = parse_document(f"a: {text}\n")
    assert document.problems == []
    assert document.data == {"a": value}
    assert type(document.data["a"]) is type(value)


def test_every_key_and_item_knows_its_line() -> None:
    document = parse_document("a:\n  b: 1\n\n  c:\n    - x\n    - {d: 2}\n")
    assert document.lines == {
        ("a",): 1,
        ("a", "b"): 2,
        ("a", "c"): 4,
        ("a", "c", 0): 5,
        ("a", "c", 1): 6,
        ("a", "c", 1, "d"): 6,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "line 2: a: duplicate key, first set on line 1"),
        ("x:\n  a: 1\n  b: 2\n  a: 3\n", "line 4: x.a: duplicate key, first set on line 2"),
        ("1: a\n", "line 1: 1: '1' is not text; keys must be text (quote it)"),
        ("a: .inf\n", f"line 1: a: .inf: {FINITE}"),
        ("a: 1e999\n", f"line 1: a: 1e999: {FINITE}"),
        (f"a: 0x{'f' * 300}\n", f"line 1: a: 0x{'f' * 55}...: {FINITE}"),
        (f"a: {1 << 63}\n", f"line 1: a: {1 << 63}: {FINITE}"),
        (f"a: 1{'0' * 30}\n", f"line 1: a: 1{'0' * 30}: {FINITE}"),
        ('a: "x\\0"\n', "line 1: a: 'x\\x00': holds a control character; allowed: printable text"),
        ('a: "\\ud800"\n', "line 1: a: '\\ud800': holds a control character; allowed: printable text"),
        ('"a\\e": 1\n', "line 1: 'a\\x1b': a key holds a control character; allowed: printable text"),
        ("a: !!python/object/apply:os.system [x]\n", None),
        ("a: !!binary aGk=\n", "line 1: a: tag tag:yaml.org,2002:binary is not supported"),
        ("<<: {a: 1}\n", "line 1: <<: merge keys are not supported; write the keys out"),
        ("- a\n", "line 1: ['a']: must be a mapping of keys to values"),
        ("? [a]\n: 1\n", "line 1: keys must be plain text"),
    ],
)
def test_surprising_yaml_is_refused(text: str, message: str | None) -> None:
    document = parse_document(text)
    if message is None:
        assert document.data == {"a": ["x"]}  # a sequence is a sequence whatever its tag: nothing is ever called
    else:
        assert [str(problem) for problem in document.problems] == [message]


def test_multiplying_aliases_and_deep_nesting_stop_early() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 12):
        items = ", ".join([f"*a{level - 1}"] * 9)
        bomb += f"a{level}: &a{level} [{items}]\n"
    assert [problem.message.split(":")[0] for problem in parse_document(bomb).problems] == ["too large"]
    endless = "a: &a [*a]\n"
    assert [problem.message.split(":")[0] for problem in parse_document(endless).problems] == ["too large"]
    with pytest.raises(ConfigError, match="nested too deeply"):
        parse_document("[" * 50_000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("training: {epochs: 0x" + "f" * 300 + "}", f"line 7: training.epochs: 0x{'f' * 55}...: {FINITE}"),
        ("training: {epochs: 1" + "0" * 18 + "}", "line 7: training.epochs: 1000000000000000000: must be less than"),
        ("snapshots: {budget: 1" + "0" * 400 + "TB}", "line 7: snapshots.budget: 1" + "0" * 76 + "...: must be less"),
        ('run: ""', 'line 7: run: "": must start with a letter or digit'),
        ('run: "a\\n"', 'line 7: run: "a\\n": must start with a letter or digit'),
        ("run: " + "a" * 201, f"line 7: run: {'a' * 77}...: string should have at most 200 characters"),
        ('run_dir: " "', 'line 7: run_dir: " ": must not be blank'),
        ('store: "\\t"', 'line 7: store: "\\t": must not be blank'),
        ('resources: {address: ""}', 'line 7: resources.address: "": must not be blank'),
    ],
)
def test_what_cannot_be_meant_is_refused_once(tmp_path: Path, settings: str, message: str) -> None:
    (problem,) = problems_of(tmp_path, BASE + settings + "\n")
    assert problem.startswith(message)


def test_every_key_takes_an_extreme_value_or_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, BASE)
    taken, unnamed = 0, []
    for key in _all_keys(config_class("resnet")):
        for value in ("1e300", str((1 << 63) - 1), "1e-300", "-1", "0", '""', "[1e300, 1e300]", "{a: {b: 1}}"):
            override = f"{key_text(key)}={value}"
            try:
                prepared = prepare(path, [override], inspect=lambda *_: CIFAR)
            except ConfigError as error:
                unnamed += [override] if f" {key[0]}" not in error.message else []
                continue
            taken += 1
            print_plan(prepared, io.StringIO())
    assert unnamed == []
    assert taken > 30


def test_of_many_problems_the_first_are_listed(tmp_path: Path) -> None:
    keys = "".join(f"k{index}: 1\n" for index in range(20_000))
    path = write(tmp_path, BASE + keys)
    with pytest.raises(ConfigError) as caught:
        load(path)
    first, *lines, last = caught.value.message.splitlines()
    assert (first, len(lines), last) == (f"{path}: 20000 problems", 50, "  … and 19950 more")
    assert len(caught.value.message) < 20_000
    long = "x" * 100_000
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, BASE), [f"{long}=1", f"data.name={long}"])
    assert len(caught.value.message) < 2_000


def test_names_are_compared_for_the_problems_alone_that_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []

    def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
        compared.append(name)
        return suggest.nearest(name, known, cutoff)

    monkeypatch.setattr(messages, "nearest", nearest)
    path = write(tmp_path, BASE + "trainnig: {}\n" + "".join(f"k{index}: 1\n" for index in range(2_000)))
    with pytest.raises(ConfigError, match=r"trainnig: unknown key; did you mean training\?"):
        load(path)
    assert len(compared) == 50


def test_a_file_has_no_more_regimes_than_a_sweep_has_trials(tmp_path: Path) -> None:
    regimes = "".join(f"  r{index}: {{kind: e2e}}\n" for index in range(1001))
    with pytest.raises(ConfigError, match=r"regimes: .* at most 1000"):
        load(write(tmp_path, f"{BASE}regimes:\n{regimes}"))


def test_the_plan_of_many_regimes_that_share_their_work_stays_short(tmp_path: Path) -> None:
    def printed(count: int) -> int:
        regimes = "".join(f"  r{index}: {{kind: segprop}}\n" for index in range(count))
        path = write(tmp_path, f"{BASE}regimes:\n{regimes}")
        stream = io.StringIO()
        print_plan(prepare(path, inspect=lambda *_: CIFAR), stream)
        return len(stream.getvalue())

    assert printed(80) < 2.2 * printed(40)


@pytest.mark.parametrize("text", ["a: [1\n", "a: 1\n b: 2\n", "\tx: 1\n", "a: 1\n---\nb: 2\n", "a: *x\n"])
def test_broken_yaml_names_the_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"config.yaml: line \d+: not valid YAML"):
        load(write(tmp_path, text))


def test_unreadable_files_are_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="directory"):
        load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(tmp_path / "binary.yaml")
    (tmp_path / "control.yaml").write_bytes(b"a: \x01\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(tmp_path / "control.yaml")
    (tmp_path / "large.yaml").write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than"):
        load(tmp_path / "large.yaml")


# -- values -------------------------------------------------------------------------------------------------


def test_defaults_and_names_follow_the_file(tmp_path: Path) -> None:
    config = load(write(tmp_path, BASE, "my run.yaml"))
    assert (config.run, config.run_dir, config.store) == ("my-run", "runs/my-run", "runs/my-run/store")
    assert list(config.regimes) == ["e2e", "lw", "segprop"]
    assert config.training == TrainSpec()
    assert config.regime("segprop").split.base == 1


def test_an_empty_section_means_its_defaults(tmp_path: Path) -> None:
    config = load(write(tmp_path, BASE + "training:\nregimes:\n  e2e:\n  x: {kind: lw, training: }\n"))
    assert config.training == TrainSpec()
    assert {name: regime.kind for name, regime in config.regimes.items()} == {"e2e": "e2e", "x": "lw"}


def test_overrides_replace_and_create(tmp_path: Path) -> None:
    config = load(
        write(tmp_path, BASE + "regimes: [e2e, segprop]\ntraining: {epochs: 5}\n"),
        [
            "training.epochs=3",
            "training.optimizer.lr=1e-3",
            "regimes.segprop.split.base=2",
            "snapshots.budget=2GB",
        ],
    )
    assert config.training.epochs == 3
    assert config.training.optimizer.lr == 0.001
    assert config.regime("segprop").split.base == 2
    assert config.regime("e2e").split.base == 1
    assert config.snapshots.budget == 2_000_000_000
    assert list(load(tmp_path / "config.yaml", ["regimes=[lw]"]).regimes) == ["lw"]


def test_stage_overrides_win_over_groups_and_groups_over_the_regime(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        {
            "regimes": {
                "segprop": {
                    "training": {"epochs": 7, "optimizer": {"lr": 0.5}},
                    "stages": {
                        "segments": {"epochs": 9, "optimizer": {"eps": 1e-3}},
                        "stage3-seg3": {"optimizer": {"lr": 0.25}},
                    },
                }
            }
        },
    )
    regime = config.regime("segprop")
    stages = {stage.name: regime.stage_training(stage) for stage in regime.layout(["seg1", "seg2", "seg3", "seg4"])}
    assert (stages["stage1-base"].epochs, stages["stage1-base"].optimizer.lr) == (7, 0.5)
    assert (stages["stage2-seg2"].epochs, stages["stage2-seg2"].optimizer.eps) == (9, 1e-3)
    assert stages["stage3-seg3"].optimizer.lr == 0.25
    assert stages["stage3-seg3"].epochs == 9
    assert stages["stage3-seg3"].optimizer.eps == 1e-3
    assert stages["stage3-seg3"].batch_size == 64


@pytest.mark.parametrize(
    ("text", "size"), [("20GB", 20 * 10**9), ("32 MiB", 32 << 20), ("1.5kB", 1500), ("7B", 7), (12, 12)]
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_size(text) == size


def test_the_resolved_configuration_loads_as_itself(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        {
            "regimes": {
                "e2e": {},
                "lw": {},
                "old": {"kind": "lw", "variant": "mapped", "head_convs": 2},
                "two": {"kind": "segprop", "head_convs": 2, "split": {"base": 2}},
            },
            "snapshots.budget": "3GiB",
        },
    )
    dump = config.resolved()
    again = load(write(tmp_path, yaml.safe_dump(dump), "resolved.yaml"))
    assert again.resolved() == dump
    assert json.loads(json.dumps(dump)) == dump
    convs = {name: again.regime(name).model.head_convs for name in again.regimes}
    assert convs == {"e2e": 1, "lw": 0, "old": 2, "two": 2}
    assert {name: regime.get("variant") for name, regime in dump["regimes"].items()} == {
        "e2e": None,
        "lw": "published",
        "old": "mapped",
        "two": None,
    }
    assert "head_convs" not in dump["regimes"]["lw"]
    assert to_json(again.training) == dump["training"]


# -- problems -----------------------------------------------------------------------------------------------


def test_all_problems_are_reported_at_once_in_file_order(tmp_path: Path) -> None:
    text = """\
model:
  name: reset18
  stem: small
data:
  name: digits
  image_sizes: 16
training:
  epochs: "5"
  batch_size: 0
  optimizer: {lr: yes, beta: 1}
  deterministic: 1
epochs: 3
split:
  base: true
split:
  head: 1
snapshots: {budget: lots}
resources: {slots: many}
"""
    assert problems_of(tmp_path, text, "training.clip=-1", "nonsense") == [
        "line 2: model.name: reset18: must be 'resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', "
        "'wide_resnet50_2' or 'resnext50_32x4d'; did you mean 'resnet18'?",
        "line 6: data.image_sizes: unknown key; did you mean image_size?",
        "line 8: training.epochs: 5: must be a valid integer; write 5 without quotes",
        "line 9: training.batch_size: 0: must be greater than or equal to 1",
        "line 10: training.optimizer.lr: yes: must be a valid number",
        "line 10: training.optimizer.beta: unknown key; did you mean betas?",
        "line 11: training.deterministic: 1: must be true or false",
        "line 12: epochs: unknown key; did you mean training.epochs?",
        "line 14: split.base: true: must be a valid integer",
        "line 15: split: duplicate key, first set on line 13",
        "line 17: snapshots.budget: lots: must be bytes as a whole number, or text such as 20GB or 32MiB",
        "line 18: resources.slots: many: must be 'auto' or must be a valid integer",
        "override nonsense: must have the form key.subkey=value",
        "override training.clip=-1: training.clip: -1: must be greater than 0",
    ]


def test_missing_sections_and_wrong_shapes(tmp_path: Path) -> None:
    assert problems_of(tmp_path, "data: 3\n") == [
        "line 1: data: 3: must be a section with keys of its own",
        "model: is required",
    ]
    assert problems_of(tmp_path, "model: {stem: small}\ndata: {name: digits}\n") == [
        "line 1: model.name: is required; one of resnet18, resnet34, resnet50, resnet101, resnet152, "
        "wide_resnet50_2, resnext50_32x4d"
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lr=1e-3", "training.lr: unknown key; did you mean training.optimizer.lr?"),
        (
            "regimes.e2e.training.lr=1e-3",
            "regimes.e2e.training.lr: unknown key; did you mean regimes.e2e.training.optimizer.lr?",
        ),
        ("training.rank=4", "training.rank: unknown key; did you mean training.lora.rank?"),
        ("training.num_epochs=3", "training.num_epochs: unknown key; here it is training.epochs"),
        ("learning_rate=1", "learning_rate: unknown key; here it is training.optimizer.lr"),
        (
            'training.optimizer.lr="1e-3"',
            "training.optimizer.lr: 1e-3: must be a valid number; write 1e-3 without quotes",
        ),
        (
            "training.schedule=cosine",
            "training.schedule: cosine: must be a section with keys of its own; write {name: cosine}",
        ),
        (
            "training.optimizer=adam",
            "training.optimizer: adam: must be a section with keys of its own; write {name: adamw}",
        ),
        (
            "training.optimizer=rmsprop",
            "training.optimizer: rmsprop: must be a section with keys of its own; write {name: …}, one of adamw, sgd, "
            "adamw8bit, adamw4bit",
        ),
        ("data.flip=no", "data.flip: no: must be true or false"),
        (
            "regimes=segprob",
            "regimes.segprob.kind: is required; one of e2e, lw, segprop, badam, lisa; did you mean 'segprop'?",
        ),
    ],
)
def test_a_habit_from_elsewhere_is_told_how_it_is_said_here(tmp_path: Path, override: str, message: str) -> None:
    assert problems_of(tmp_path, BASE, override) == [f"override {override}: {message}"]


def test_words_of_other_programs_name_keys_that_exist() -> None:
    known = {".".join(map(str, key)) for key in _all_keys(Config)} | {
        "model.path",
        "data.sequence_length",
        "data.validation",
    }
    assert {text.split(",")[0] for text in WORDS_ELSEWHERE.values()} <= known


def test_one_regime_needs_no_list(tmp_path: Path) -> None:
    alone, listed = (load(write(tmp_path, BASE), [f"regimes={text}"]).regimes for text in ("lw", "[lw]"))
    assert alone == listed


def test_overrides_with_problems_name_themselves(tmp_path: Path) -> None:
    assert problems_of(
        tmp_path, BASE, "training.epoch=3", "model.name.x=1", "training.optimizer=[1", "=3", "seed=-1"
    ) == [
        "override model.name.x=1: model.name.x: model.name is 'resnet18', which has no keys",
        "override training.optimizer=[1: training.optimizer: line 1: not valid YAML: while parsing "
        "a flow sequence expected ',' or ']', but got '<stream end>'",
        "override =3: must have the form key.subkey=value",
        "override seed=-1: seed: -1: must be greater than or equal to 0",
        "override training.epoch=3: training.epoch: unknown key; did you mean epochs?",
    ]


def test_regimes_are_checked_with_their_overrides(tmp_path: Path) -> None:
    text = (
        BASE
        + """\
regimes:
  e2e: {training: {epochs: 0}}
  mine: {}
  sp:
    kind: segprob
  segprop:
    training: {optimiser: {lr: 1}}
    stages:
      stage2-seg9: {epochs: 2}
      segments: {batch_size: -4}
    split: {base: 9}
  two: {kind: segprop, head_convs: 3}
"""
    )
    assert problems_of(tmp_path, text) == [
        "line 8: regimes.e2e.training.epochs: 0: must be greater than or equal to 1",
        "line 9: regimes.mine.kind: is required; one of e2e, lw, segprop, badam, lisa",
        "line 11: regimes.sp.kind: segprob: must be 'e2e', 'lw', 'segprop', 'badam' or 'lisa'; did you mean 'segprop'?",
        "line 13: regimes.segprop.training.optimiser: unknown key; did you mean optimizer?",
        "line 16: regimes.segprop.stages.segments.batch_size: -4: must be greater than or equal to 1",
        "line 17: regimes.segprop.split.base: 9: base + head may not exceed the 4 blocks of the chain; "
        "with split.head 0 at most 4",
        "line 18: regimes.two.head_convs: 3, but the last block of resnet18 has 2 convolutions; allowed: 1-2",
    ]


def test_what_an_override_says_of_a_whole_regime_is_found_where_it_was_said(tmp_path: Path) -> None:
    override = "regimes={segprop: {split: {base: 9}, stages: {segments: {accumulate: 3}}}}"
    said = [line.removeprefix(f"override {override}: ") for line in problems_of(tmp_path, BASE, override)]
    assert said == [
        "regimes.segprop.split.base: 9: base + head may not exceed the 4 blocks of the chain; with split.head 0 at "
        "most 4",
        "regimes.segprop.stages.segments.accumulate: 3: must divide the batch_size, which is 256",
    ]


def test_an_unknown_family_is_one_problem_among_all(tmp_path: Path) -> None:
    text = "model: {family: resnets, nam: x}\ndata: {name: digits, size: 3}\ntraining: {epochs: 0}\n"
    assert problems_of(tmp_path, text) == [
        "line 1: model.family: 'resnets' is not known; did you mean 'resnet'?; "
        "allowed: causal_lm, hf_image, hf_text, python, resnet, timm, torchvision, vgg, vit",
        "line 3: training.epochs: 0: must be greater than or equal to 1",
    ]


@pytest.mark.parametrize(("said", "seconds"), [("2h", 7200.0), ("1.5d", 129600.0), ("90", 90.0), ("90s", 90.0)])
def test_how_often_a_slot_is_interrupted_is_a_time(tmp_path: Path, said: str, seconds: float) -> None:
    config = load(write(tmp_path, BASE), [f"resources.interruptions_every={said}"])
    assert config.resources.interruptions_every == seconds
    assert load(write(tmp_path, BASE)).training.checkpoint_every_s == "auto"


@pytest.mark.parametrize("said", ["often", "0", "-2h", "0s", ".inf"])
def test_other_times_between_interruptions_are_refused(tmp_path: Path, said: str) -> None:
    (problem,) = problems_of(tmp_path, BASE, f"resources.interruptions_every={said}")
    assert "resources.interruptions_every: " in problem


def test_an_unknown_stage_lists_those_there_are(tmp_path: Path) -> None:
    text = BASE + "regimes:\n  segprop:\n    stages:\n      stage2-seg9: {epochs: 2}\n"
    assert problems_of(tmp_path, text) == [
        "line 10: regimes.segprop.stages.stage2-seg9: unknown stage; did you mean 'stage2-seg2'?; allowed: "
        "base, segments, stage1-base, stage2-seg2, stage3-seg3, stage4-seg4"
    ]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"split": {"base": 3, "head": 2}},
            "split.head: 2: base + head may not exceed the 4 blocks of the chain",
        ),
        (
            {"split": {"base": 2, "base_segment_size": 1, "train_base": False}},
            "split.base_segment_size: 1: split.train_base false takes the base as it comes",
        ),
        ({"split": {"base_segment_size": 0}}, "split.base_segment_size: 0: must be greater than or equal to 1"),
        ({"split": {"base": 5}}, "split.base: 5: base + head may not exceed the 4 blocks of the chain"),
        ({"model.head_convs": 3}, "model.head_convs: 3, but the last block of resnet18 has 2 convolutions"),
        ({"model.segments": [["stem", "layer9"]]}, "model.segments"),
        ({"training.accumulate": 3}, "training.accumulate: 3: must divide the batch_size, which is 64"),
        ({"training.optimizer": {"betas": [0.9, 1.0]}}, "training.optimizer.betas"),
        ({"training.optimizer": {"betas": [0.9]}}, "training.optimizer.betas"),
        ({"training.optimizer": {"nesterov": True}}, "training.optimizer.nesterov: true: needs sgd"),
        (
            {"training.precision": "fp16", "resources.device": "cpu"},
            "training.precision: fp16: not available on resources.device cpu",
        ),
        ({"data.resize": 12}, "data.resize: 12: must be at least data.image_size, which is 16"),
        ({"data.validation": 1.5}, "data.validation: 1.5: must be a fraction below 1 or a whole number"),
        ({"data.path": "x"}, "data.path: digits come with scikit-learn"),
        ({"data.image_size": 2}, "data.image_size: 2"),
        (
            {"regimes": {"segprop": {"variant": "mapped"}}},
            "regimes.segprop.variant: mapped: is for lw, segprop is segprop; allowed here: leave it out",
        ),
        (
            {"regimes": {"lw": {"variant": "maped"}}},
            "regimes.lw.variant: maped: must be 'published' or 'mapped'; did you mean 'mapped'?",
        ),
        (
            {"regimes": {"lw": {"head_convs": 2}}},
            "regimes.lw.head_convs: 2: with variant published the head of lw has no convolutions; "
            "allowed: leave it out, or variant: mapped",
        ),
        ({"regimes": {"lw": {"head_convs": 0, "variant": "mapped"}}}, "regimes.lw.head_convs: 0: must be greater"),
        (
            {"regimes": {"e2e": {"blocks": {"steps": 5}}}},
            "regimes.e2e.blocks: is for badam, lisa, e2e is e2e; allowed here: leave it out",
        ),
        (
            {"regimes": {"lisa": {"blocks": {"order": "random"}}}},
            "regimes.lisa.blocks.order: random: lisa draws its layers; allowed here: leave it out",
        ),
        (
            {"regimes": {"badam": {"blocks": {"count": 1}}}},
            "regimes.badam.blocks.count: 1: badam trains one block at a time; allowed here: leave it out",
        ),
        ({"regimes": {"badam": {"blocks": {"steps": 0}}}}, "regimes.badam.blocks.steps: 0: must be greater than"),
        ({"regimes": {"badam": {"blocks": {"step": 5}}}}, "regimes.badam.blocks.step: unknown key; did you mean"),
        (
            {"regimes": {"badam": {"blocks": {"order": "asending"}}}},
            "regimes.badam.blocks.order: asending: must be 'ascending', 'descending' or 'random'; did you mean",
        ),
        (
            {"regimes": {"lisa": {"blocks": {"count": 5}}}},
            "regimes.lisa.blocks.count: 5 blocks at one time: lisa has 4 to draw from; allowed: blocks.count 1 to 4",
        ),
        (
            {"regimes": {"mine": {"kind": "badam", "stages": {"badam": {"compile": True}}}}},
            "regimes.mine.stages.badam.compile: true: not where parts take turns, each of which would be compiled anew",
        ),
        (
            {"regimes": ["lisa"], "resources": {"runner": "ray", "gang": {"size": 2}}},
            "resources.gang.size: 2: not with regimes whose parts take turns (lisa is lisa)",
        ),
        ({"regimes": {"a b": {"kind": "e2e"}}}, "regimes.a b: a regime's name has letters"),
        ({"regimes": ["e2e", "e2e"]}, "regimes[1]: 'e2e' is listed twice"),
        ({"regimes": [3]}, "regimes[0]: 3: must be a regime's name"),
        ({"regimes": {}}, "regimes"),
        ({"run": "../up"}, "run: ../up: must start with a letter or digit"),
        ({"seed": 1 << 63}, "seed"),
        (
            {"snapshots.shuffle": "window", "snapshots.window": 4, "resources.snapshot_memory": "100MiB"},
            "resources.snapshot_memory: 104857600: 4 shards open at a time and 2 read ahead, of 33554432 bytes each",
        ),
    ],
)
def test_rules_across_keys(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    found = problems_of(tmp_path, yaml.safe_dump(merged(SMALL, changes), sort_keys=False))
    assert any(problem in line for line in found), found


def test_rules_across_keys_are_checked_beside_other_problems(tmp_path: Path) -> None:
    changes = {"split": {"base": 5}, "training.accumulate": 3, "training.epochs": -1, "wrong": 1}
    found = problems_of(tmp_path, yaml.safe_dump(merged(SMALL, changes)))
    assert [line.split(": ")[1] for line in found] == [
        "split.base",
        "training.accumulate",
        "training.epochs",
        "wrong",
    ]


# -- prepare ------------------------------------------------------------------------------------------------


def test_data_problems_are_reported_with_the_others(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        f"model: {{name: resnet18}}\ndata:\n  name: cifar10\n  path: {tmp_path / 'none'}\nepoch: 1\n",
    )
    with pytest.raises(ConfigError) as caught:
        prepare(path)
    assert "line 4: data.path: " in caught.value.message
    assert "line 5: epoch: unknown key" in caught.value.message
    with pytest.raises(DataError, match=r"1 problem\n  line 4: data\.path: "):
        prepare(write(tmp_path, path.read_text().replace("epoch: 1\n", "")))


def test_a_missing_weights_file_and_too_large_a_validation_split(tmp_path: Path) -> None:
    text = BASE.replace("  stem: small\n", "  weights: absent.safetensors\n") + "  validation: 50000\n"
    with pytest.raises(ConfigError) as caught:
        prepare(write(tmp_path, text), inspect=lambda data, seed: CIFAR)
    assert "model.weights: absent.safetensors: No such file" in caught.value.message
    assert "data.validation: 50000: of 50000 training samples, leaves none to train on" in caught.value.message


@pytest.mark.parametrize(
    ("training", "rows", "size", "problem"),
    [
        ({"batch_size": 16, "drop_last": False}, 97, 8, "training.drop_last: false: of a batch of 1 samples in"),
        ({"batch_size": 16, "drop_last": False}, 97, 16, None),  # maps of 2 by 2 pixels
        ({"batch_size": 16, "drop_last": False}, 98, 8, None),
        ({"batch_size": 16, "drop_last": True}, 97, 8, None),
        ({"batch_size": 16, "micro_batch": 5}, 96, 8, "training.batch_size: 16: of a batch of 16 samples in"),
        (
            {"batch_size": 16, "micro_batch": 4, "drop_last": False},
            101,
            8,
            "training.drop_last: false: of a batch of 5",
        ),
        ({"batch_size": 1}, 97, 8, "training.batch_size: 1: of a batch of 1 samples in micro-batches of 1 one sample"),
        ({"batch_size": 128}, 1, 8, "training.batch_size: 128: of a batch of 1 samples"),
        ({"batch_size": 16, "drop_last": False, "exit": {"steps": 6}}, 97, 8, None),  # never reaches the last batch
        ({"batch_size": 16, "drop_last": False, "exit": {"steps": 7}}, 97, 8, "training.drop_last"),
    ],
)
def test_batch_normalization_of_one_pixel_is_refused_a_sample_alone(
    training: dict[str, Any], rows: int, size: int, problem: str | None, tmp_path: Path
) -> None:
    changes = {"training": {"epochs": 1, **training}, "data.image_size": size, "data.validation": 10}
    path = write(tmp_path, yaml.safe_dump(merged(SMALL, changes), sort_keys=False))
    data = dataclasses.replace(CIFAR, train_rows=rows + 10)
    if problem is None:
        prepare(path, inspect=lambda *_: data)
        return
    with pytest.raises(ConfigError) as caught:
        prepare(path, inspect=lambda *_: data)
    assert problem in caught.value.message


def test_a_sample_alone_is_refused_where_the_stage_says_so(tmp_path: Path) -> None:
    """Of a regime one stage alone has drop_last: false; its adapter leads to the head's grid of one pixel."""
    changes = {
        "training": {"epochs": 1, "batch_size": 16},
        "data.image_size": 8,
        "data.validation": 10,
        "regimes": {"segprop": {"stages": {"stage2-seg2": {"drop_last": False}}}},
    }
    path = write(tmp_path, yaml.safe_dump(merged(SMALL, changes), sort_keys=False))
    with pytest.raises(ConfigError, match=r"regimes\.segprop\.stages\.stage2-seg2\.drop_last: false: .*stage2-seg2"):
        prepare(path, inspect=lambda *_: dataclasses.replace(CIFAR, train_rows=107))


def test_insisting_on_snapshots_beyond_the_budget_names_the_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, BASE + "snapshots:\n  mode: always\n  budget: 1MB\n")
    with pytest.raises(ConfigError, match=r"line 9: snapshots.budget: snapshots need .* the budget allows 500.0 kB"):
        prepare(path, inspect=lambda data, seed: CIFAR)


def test_the_weights_file_is_part_of_the_plan(tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    text = BASE.replace("  stem: small\n", f"  weights: {weights}\n")
    ids = []
    for content in (b"a", b"b"):
        weights.write_bytes(content)
        ids.append(prepare(write(tmp_path, text), inspect=lambda data, seed: CIFAR).plan.targets)
    assert not set(ids[0]) & set(ids[1])


def test_measured_speed_changes_times_only(tmp_path: Path) -> None:
    config = small_config(tmp_path, {"resources.gflops": 123.5})
    assert config.rates() == Rates.measured(123.5)


# -- run directories ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "conflicts"),
    [
        ({}, []),
        ({"resources.slots": 3, "evaluation.batch_size": 7, "run": "other", "run_dir": "moved"}, []),
        ({"snapshots": {"mode": "never", "budget": "1GB"}, "training.checkpoint_every_s": 5}, []),
        ({"regimes": {"e2e": {}, "lw": {}, "segprop": {}, "more": {"kind": "lw"}}}, []),
        ({"seed": 1}, ["seed"]),
        ({"data.views": 3}, ["data.views"]),
        ({"model.dropout": 0.1}, ["model.dropout"]),
        ({"training.epochs": 9}, [f"regimes.{name}.training.epochs" for name in ("e2e", "lw", "segprop")]),
        (
            {"snapshots.dtype": "float32"},
            [f"regimes.{name}.snapshots.dtype" for name in ("e2e", "lw", "segprop")],
        ),
        ({"regimes": ["e2e", "lw"]}, ["regimes.segprop (left out)"]),
        (
            {
                "regimes": {
                    "e2e": {},
                    "lw": {"stages": {"head": {"epochs": 2}}},
                    "segprop": {"split": {"base": 2}},
                }
            },
            ["regimes.lw.stages.head", "regimes.segprop.split.base"],
        ),
        ({"store": "elsewhere"}, ["store"]),
    ],
)
def test_a_run_directory_may_grow_but_not_change(tmp_path: Path, changes: dict[str, Any], conflicts: list[str]) -> None:
    old = small_config(tmp_path).resolved()
    assert compatible(old, small_config(tmp_path, changes).resolved()) == conflicts


def test_what_decides_the_views_that_stages_see_may_not_change(tmp_path: Path) -> None:
    old = small_config(tmp_path, {"data.views": "auto"}).resolved()
    for key, value in (("mode", "never"), ("costs", "measured"), ("budget", "1GB"), ("retention", "keep")):
        new = small_config(tmp_path, {"data.views": "auto", f"snapshots.{key}": value}).resolved()
        assert compatible(old, new) == [f"regimes.{name}.snapshots.{key}" for name in ("e2e", "lw", "segprop")]
    new = small_config(tmp_path, {"data.views": "auto", "snapshots.shard_bytes": 1 << 20}).resolved()
    assert compatible(old, new) == []


def test_run_directories_of_before_encodings_hold_plain_snapshots(tmp_path: Path) -> None:
    old = small_config(tmp_path).resolved()
    for section in (old, *old["regimes"].values()):
        del section["snapshots"]["encoding"]
        del section["snapshots"]["costs"]
    assert compatible(old, small_config(tmp_path, {"snapshots.costs": "measured"}).resolved()) == []
    changed = small_config(tmp_path, {"regimes": {"segprop": {"snapshots": {"encoding": "int8"}}, "e2e": {}, "lw": {}}})
    assert compatible(old, changed.resolved()) == ["regimes.segprop.snapshots.encoding"]


def test_run_directories_of_before_variants_hold_mapped_layer_wise_stages(tmp_path: Path) -> None:
    regimes = {"lw": {"variant": "mapped"}, "e2e": {}}
    old = small_config(tmp_path, {"regimes": regimes}).resolved()
    del old["regimes"]["lw"]["variant"]
    assert compatible(old, small_config(tmp_path, {"regimes": regimes}).resolved()) == []
    published = small_config(tmp_path, {"regimes": ["lw", "e2e"]}).resolved()
    assert "regimes.lw.variant" in compatible(old, published)


def test_images_have_no_fp8_and_encodings_no_other_name(tmp_path: Path) -> None:
    assert problems_of(tmp_path, BASE + "snapshots: {encoding: fp8}\n") == [
        "line 7: snapshots.encoding: fp8: is for language models; allowed for images: plain, lossless, int8"
    ]
    (problem,) = problems_of(tmp_path, BASE + "snapshots: {encoding: in8}\n")
    assert problem.startswith("line 7: snapshots.encoding: in8: must be 'plain', 'lossless', 'int8' or 'fp8'")
    (problem,) = problems_of(tmp_path, BASE + "snapshots: {costs: guessed}\n")
    assert problem.startswith("line 7: snapshots.costs: guessed: must be 'counted' or 'measured'")


def test_a_store_in_memory_is_for_one_process(tmp_path: Path) -> None:
    assert problems_of(tmp_path, BASE, "store=memory://x") == [
        "override store=memory://x: store: memory://x: is the memory of one process, which workers on Ray do not see; "
        "allowed with it: resources.runner local"
    ]
    load(write(tmp_path, BASE), ["store=memory://x", "resources.runner=local"])


def test_claiming_a_run_directory(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "x"
    path = write(tmp_path, BASE + f"run_dir: {run_dir}\n")
    claim_run_dir(prepare(path, inspect=lambda data, seed: CIFAR))
    first = (run_dir / "config.yaml").read_text()
    claim_run_dir(prepare(path, ["resources.slots=1"], inspect=lambda data, seed: CIFAR))
    second = (run_dir / "config.yaml").read_text()
    assert yaml.safe_load(second)["resources"]["slots"] == 1
    assert yaml.safe_load(first)["resources"]["slots"] == "auto"
    with pytest.raises(ConfigError, match=r"another configuration.*\n  seed"):
        claim_run_dir(prepare(path, ["seed=4"], inspect=lambda data, seed: CIFAR))
    assert (run_dir / "config.yaml").read_text() == second
    assert sorted(item.name for item in run_dir.iterdir()) == ["config.yaml", "plan.json"]


def test_a_run_that_names_no_directory_has_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(
        tmp_path, "model: {name: resnet18, stem: small}\ndata: {name: digits, image_size: 32}\nregimes: [e2e]\n"
    )

    def placed(*overrides: str) -> str:
        document = read_document(path, overrides)
        prepared = in_own_dir(document, prepare_document(document))
        assert Path(prepared.config.store) == prepared.run_dir / "store"
        claim_run_dir(prepared)
        return str(prepared.run_dir)

    usual = f"runs/{path.stem}"
    assert [placed(), placed("seed=1"), placed("seed=2"), placed("training.epochs=3")] == [
        usual,
        f"{usual}-2",
        f"{usual}-3",
        f"{usual}-4",
    ]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == (f"segprop: {usual} holds another configuration (differs in seed): this run is in {usual}-2")
    assert len(told) == 3
    # The same command goes on where it was, grown or not.
    assert [placed("seed=2"), placed(), placed("seed=1", "regimes=[e2e, lw]")] == [f"{usual}-3", usual, f"{usual}-2"]
    # One that is named, or damaged, is not gone around.
    with pytest.raises(ConfigError, match="another configuration"):
        placed("seed=3", f"run_dir={usual}")
    Path(usual, "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"config.yaml: line 1: not valid YAML"):
        placed()


def test_a_run_directory_that_is_a_file_or_has_no_room_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    path = write(tmp_path, BASE + f"run_dir: {tmp_path / 'file'}\n")
    with pytest.raises(ConfigError, match="run_dir"):
        claim_run_dir(prepare(path, inspect=lambda data, seed: CIFAR))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    path = write(tmp_path, BASE + f"run_dir: {tmp_path / 'new'}\ntraining: {{epochs: 9}}\n")
    with pytest.raises(ConfigError, match=r"need about .* 1.0 kB free"):
        check_run_dir(prepare(path, inspect=lambda data, seed: CIFAR))
    assert not (tmp_path / "new").exists()


def test_an_adapter_that_cannot_reach_the_grid_is_reported_with_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(source: Any, target: Any) -> int:
        raise ConfigError("no stride takes a 1x1 convolution from a grid of 5x5 to 4x4")

    monkeypatch.setattr("workers.models.outline.stride_between", unreachable)
    found = problems_of(tmp_path, BASE + "regimes: [segprop]\n")
    assert found[0] == (
        "line 6: data.image_size: stage1-base of segprop: no stride takes a 1x1 convolution from a grid of 5x5 to 4x4"
    )
    assert len(found) == 3
