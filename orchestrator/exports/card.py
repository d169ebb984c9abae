"""Write the README.md of an exported folder: a Hugging Face model card, made from the run's record alone.

Texts of users (names, paths, labels) are escaped: they are shown, never obeyed. Folders of this machine are named by
their last part. The same record gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestrator.plan.graph import Plan
from orchestrator.reports.quality import Quality, loss_text, perplexity_text, quality_of
from orchestrator.reports.records import Metrics, RegimeSummary, StageSummary, Summary
from orchestrator.reports.tables import benchmarks
from orchestrator.reports.words import data_lines, of_kind, titles
from orchestrator.units import percent_text
from workers.models.registry import family_of
from workers.specs.experiment import Experiment

#: A name on the hub.
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
#: What means something in Markdown, inside a line or a cell of a table.
_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~&$])")
#: What the hub calls libraries, where that is not their own name.
_LIBRARIES = {"torch": "pytorch"}

#: What settings are called here, where that is not how the report calls them.
_SETTINGS = {"epochs": "Epochs of a stage"}
#: Whose versions are named.
_PACKAGES = ("segprop", "torch", "transformers")

#: What a model of transformers does, in the hub's words -> the class that loads it.
_CLASSES = {"text-generation": "AutoModelForCausalLM", "text-classification": "AutoModelForSequenceClassification"}

_FOLDER = 'FOLDER = "."  # where this file lies'
_TRANSFORMERS = """from transformers import {loader}

{folder}
model = {loader}.from_pretrained(FOLDER)"""
_ADAPTER = """from peft import PeftModel
from transformers import {loader}

{folder}
base = {loader}.from_pretrained({base})
model = PeftModel.from_pretrained(base, FOLDER)"""
_ROUNDED = """import json

from peft import PeftModel
from transformers import {loader}, BitsAndBytesConfig

{folder}
how = json.load(open(f"{{FOLDER}}/segprop.json"))["base"]["quantization"]
base = {loader}.from_pretrained({base}, quantization_config=BitsAndBytesConfig(**how))
model = PeftModel.from_pretrained(base, FOLDER)"""
_LOADER = """import runpy

{folder}
model = runpy.run_path(f"{{FOLDER}}/load_model.py")["load"]()"""


@dataclass(frozen=True)
class Exported:
    """One exported folder. `stage`: after which it was exported; None: after the last one. `files`: names in it."""

    regime: str
    stage: str | None
    adapter: bool
    files: frozenset[str]


def card(summary: Summary, plan: Plan, experiment: Experiment, exported: Exported) -> str:
    """Return the card of an exported folder, of the run that `summary` and `plan` are of."""
    regime = summary.regimes[exported.regime]
    lines = ["---", yaml.safe_dump(_metadata(plan, experiment, regime, exported), sort_keys=False).strip(), "---", ""]
    lines += [f"# {plain(summary.run)}: {plain(titles(summary.regimes)[exported.regime])}", ""]
    lines += [" ".join(_sentences(regime, exported)), ""]
    lines += _table(("", ""), list(_facts(summary, plan, exported)))
    lines += ["## Scores", "", *_scores(summary, exported)]
    lines += ["## Stages", "", *_stages(summary, regime)]
    lines += ["## Use", "", *_use(plan, experiment, exported)]
    return "\n".join(lines) + "\n"


def plain(text: object) -> str:
    """Return a text as Markdown that shows it and means nothing, in one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def _metadata(plan: Plan, experiment: Experiment, regime: RegimeSummary, exported: Exported) -> dict[str, Any]:
    """Return the front matter. No license: nobody has said one."""
    family, base = family_of(experiment.model), _on_hub(_started_from(plan))
    library = "peft" if exported.adapter else family.libraries[-1]
    found: dict[str, Any] = {}
    if base is not None:
        found |= {"base_model": base, "base_model_relation": "adapter" if exported.adapter else "finetune"}
    found["library_name"] = _LIBRARIES.get(library, library)
    if family.traits.pipeline is not None:
        found["pipeline_tag"] = family.traits.pipeline
    data = _on_hub(_data_task(plan)["data"].get("path"))
    if data is not None:
        found["datasets"] = [data]
    found["tags"] = list(dict.fromkeys(("segprop", regime.kind, *(("lora",) if _adapted(regime) else ()))))
    return found


def _adapted(regime: RegimeSummary) -> bool:
    return "LoRA rank" in (regime.settings or {})


def _started_from(plan: Plan) -> str | None:
    """Return the path or hub id of the weights that training started from; None: random ones, or the library's."""
    model = next(node.task["model"] for node in plan.nodes if node.initializes)
    path: str | None = model.get("path")
    return path


def _data_task(plan: Plan) -> Mapping[str, Any]:
    return next(node.task for node in plan.nodes if node.prepares)


def _on_hub(place: str | None) -> str | None:
    """Return a name on the hub as it is; None for what is, or looks like, a place of this machine."""
    if place is None or not _HUB_ID.fullmatch(place) or place.startswith(".") or Path(place).exists():
        return None
    return place


def _shown(place: str) -> str:
    """A name on the hub, or the last part of a path: a card is for sharing."""
    return f"`{_code(place)}`" if _on_hub(place) else f"a local folder, `{_code(Path(place).name)}`"


def _code(text: str) -> str:
    return " ".join(text.split()).replace("`", "'").replace("|", "/")


def _sentences(regime: RegimeSummary, exported: Exported) -> Iterator[str]:
    what = "Low-rank adapters" if exported.adapter else "A network"
    yield f"{what} trained by segprop: {plain(of_kind(regime.kind).words)}."
    if exported.stage is not None:
        yield f"As it was after the stage {plain(exported.stage)}."


def _facts(summary: Summary, plan: Plan, exported: Exported) -> Iterator[tuple[str, str]]:
    """Yield what was trained, on what and how, a row each."""
    regime, about = summary.regimes[exported.regime], summary.about
    base = _started_from(plan)
    if base is not None:
        yield "Started from", _shown(base)
    elif about is not None:
        yield "Model", plain(about.model)
    task = _data_task(plan)
    data, place = task["data"], task["data"].get("path")
    yield "Data", plain(data["name"]) + ("" if place is None else f", {_shown(str(place))}")
    yield "Data digest", f"`{_code(task['fingerprint'])}`"
    for line in [] if summary.data is None else data_lines(summary.data):
        yield "Samples", plain(line)
    yield "Regime", f"{plain(exported.regime)} ({plain(regime.kind)})"
    stages = _until(regime, exported.stage)
    steps = sum(stage.steps or 0 for stage in stages)
    epochs = sum(stage.epochs for stage in stages)
    yield "Training", f"{_count(len(stages), 'stage')}, {_count(epochs, 'epoch')}, {_count(steps, 'step')}"
    for key, value in (regime.settings or {}).items():
        yield _SETTINGS.get(key, plain(key[:1].upper() + key[1:])), plain(value)
    if about is not None:
        yield "Seed", str(about.seed)
    versions = summary.environment.packages
    yield "Versions", ", ".join(f"{name} {versions[name]}" for name in _PACKAGES if name in versions)
    command = f"segprop run {about.source}" if about is not None and about.source else "segprop run config.yaml"
    yield "Command", f"`{_code(command)}`"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _until(regime: RegimeSummary, stage: str | None) -> Sequence[StageSummary]:
    names = [each.name for each in regime.stages]
    return regime.stages if stage is None else regime.stages[: names.index(stage) + 1]


def _scores(summary: Summary, exported: Exported) -> list[str]:
    """Return a table of the model beside what it started from, and beside the run's other regimes."""
    regime = summary.regimes[exported.regime]
    rows = []
    if exported.stage is not None:
        stage = _until(regime, exported.stage)[-1]
        rows.append(("this model", "validation", stage.assembled, stage.judged))
    else:
        rows.append(("this model", "test", regime.final.metrics, regime.judged))
        rows.append(("this model", "validation", regime.final.validation, None))
        rows += [("as it came", split, summary.original.get(split, {}), summary.judged) for split in ("test",)]
        others = [name for name in summary.regimes if name != exported.regime]
        rows += [
            (f"regime {name}", "test", summary.regimes[name].final.metrics, summary.regimes[name].judged)
            for name in others
        ]
    rows = [row for row in rows if row[2] or row[3]]
    if not rows:
        return ["Not scored.", ""]
    asked = benchmarks.asked([row[3] for row in rows])
    columns = _columns(quality_of(summary))
    heads = ("", "split", *columns, *(benchmarks.title(name) for name in asked))
    shown = [
        (
            plain(who),
            split,
            *(write(metrics) for write in columns.values()),
            *map(plain, benchmarks.cells(scores or {}, asked)),
        )
        for who, split, metrics, scores in rows
    ]
    marked = any(plain(benchmarks.MARK) in cell for row in shown for cell in row[1:])
    note = [f"{plain(benchmarks.MARK)} Some of the questions were trained on.", ""] if marked else []
    return [*_table(heads, shown), *note]


def _columns(quality: Quality) -> dict[str, Callable[[Metrics], str]]:
    """Return the columns of metrics, and what writes their cells."""
    columns: dict[str, Callable[[Metrics], str]] = {"loss": lambda metrics: loss_text(metrics.get("loss"))}
    if quality.text or quality.metric == "accuracy":
        columns["accuracy"] = lambda metrics: percent_text(metrics.get("token_accuracy", metrics.get("accuracy")), 2)
        columns["perplexity"] = perplexity_text
    elif quality.metric != "loss":
        columns[quality.row.title] = lambda metrics: quality.written(quality.value(metrics))
    return columns


def _stages(summary: Summary, regime: RegimeSummary) -> list[str]:
    quality = quality_of(summary)
    rows = [
        (
            plain(stage.name),
            plain(", ".join(stage.trained)),
            str(stage.epochs),
            quality.written(quality.value(stage.assembled)),
        )
        for stage in regime.stages
    ]
    return _table(("stage", "trained", "epochs", f"{quality.row.title} after it (validation)"), rows)


def _use(plan: Plan, experiment: Experiment, exported: Exported) -> list[str]:
    """Return a piece of Python that loads the folder."""
    loader = _CLASSES.get(family_of(experiment.model).traits.pipeline or "")
    if "load_model.py" in exported.files:
        text = _LOADER
    elif loader is None:
        return ["The weights are in `model.safetensors`.", ""]
    elif exported.adapter:
        text = _ROUNDED if _rounded(plan, exported.regime) else _ADAPTER
    else:
        text = _TRANSFORMERS
    base = _on_hub(_started_from(plan)) or "path/to/the/base"
    return ["```python", text.format(loader=loader, base=f'"{base}"', folder=_FOLDER), "```", ""]


def _rounded(plan: Plan, regime: str) -> bool:
    trained = (plan.node(node).task["train"] for node in plan.regimes[regime].stages)
    return any(train["lora"] and train.get("frozen_weights", "full") != "full" for train in trained)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table of Markdown; its cells are Markdown already."""
    lines = [heads, ["---"] * len(heads), *rows]
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]
