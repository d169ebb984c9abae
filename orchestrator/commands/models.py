"""Commands for the models that runs leave: `export`, `push`, `judge`, `generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cache_store.errors import UserError
from orchestrator.commands.given import document_of, names_in, prepared_of, recorded_of


def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run, such as runs/quickstart.")],
    regime: Annotated[str | None, typer.Option(help="Only this regime; default: all.")] = None,
    stage: Annotated[
        str | None, typer.Option(help="The whole network as it was after this stage: its number, from 1, or its name.")
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="The low-rank adapters alone, as a folder for PEFT: adapter/REGIME.")
    ] = False,
    gguf: Annotated[
        Path | None,
        typer.Option(
            metavar="CONVERTER",
            help="Also gguf/REGIME.gguf, by llama.cpp's converter: a checkout, or convert_hf_to_gguf.py. It is run.",
        ),
    ] = None,
    gguf_type: Annotated[str, typer.Option(help="What that holds: auto, f32, f16, bf16, q8_0.")] = "auto",
) -> None:
    """Write each regime's final weights again, as a folder that torchvision or transformers loads; with --stage those
    after a stage, below stages/ in the run directory. Neither the data set nor the original model is needed: everything
    is in the store."""
    recorded = recorded_of(run_dir)
    if regime is not None and regime not in recorded.plan.regimes:
        known = ", ".join(recorded.plan.regimes)
        raise UserError(f"--regime: {regime} is not in this run; it has {known}")
    from orchestrator.exports import gguf as making
    from orchestrator.runs import results

    regimes = [regime] if regime is not None else list(recorded.plan.regimes)
    if adapter and gguf is not None:
        raise UserError("--gguf: is for whole models; leave --adapter out")
    script = None if gguf is None else making.converter(gguf, gguf_type)
    if adapter:
        results.export_adapters(recorded, regimes, stage)
        return
    folders = results.export(recorded, regimes) if stage is None else results.export_stage(recorded, regimes, stage)
    if script is None:
        return
    for folder in folders:
        name = "-".join(folder.relative_to(run_dir).parts[1:])
        target = run_dir / "gguf" / f"{name}.gguf"
        making.convert(script, folder, target, gguf_type)
        print(target)


def push(
    place: Annotated[Path, typer.Argument(metavar="RUN|FOLDER", help="A run, or a folder that export wrote.")],
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub; made if it is not there.")],
    regime: Annotated[str | None, typer.Option(help="Of a run with several: which one.")] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a run: the low-rank adapters that export --adapter wrote.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Only you and those you let may see it.")] = False,
) -> None:
    """Upload an exported model with its card to the Hugging Face Hub, by the token in HF_TOKEN.

    The folder is first compared with what was written, and nothing is sent where something is missing."""
    from orchestrator.exports import hub
    from orchestrator.runs.results import ADAPTERS, MODELS
    from orchestrator.runs.run_dir import CONFIG_FILE

    folder = hub.exported_folder(place, ADAPTERS if adapter else MODELS, regime, CONFIG_FILE)
    print(hub.push(folder, name, private=private))


def judge(
    context: typer.Context,
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="Model folders, such as runs/x/model/segprop; or one run, runs/x."),
    ],
    tasks: Annotated[str, typer.Option(help="mmlu, winogrande, humaneval, humaneval_plus.")] = "mmlu,winogrande",
    data: Annotated[Path | None, typer.Option(help="Folder with mmlu/, winogrande/, humaneval/; else the hub.")] = None,
    shots: Annotated[int, typer.Option(help="Example answers before a question.")] = 5,
    limit: Annotated[int | None, typer.Option(help="Questions a task, for MMLU a subject.")] = None,
    subjects: Annotated[str | None, typer.Option(help="Only these MMLU subjects.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences at once.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto (the model's own), float32, bfloat16, float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Chooses WinoGrande's examples.")] = 1234,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run code that the models write (HumanEval), in a jail.")
    ] = False,
    allow_unisolated: Annotated[
        bool, typer.Option("--allow-unisolated", help="Run it even where the machine has no way to isolate it.")
    ] = False,
    allow_contaminated: Annotated[
        bool, typer.Option("--allow-contaminated", help="Judge by questions trained on, too, and mark the score.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")] = False,
) -> None:
    """Score language models by public benchmarks, side by side: the original, E2E, SegProp.

    Of a run: the original, every stage and regime that is there, as its evaluation.judge says but for the options
    given. What was judged before is reused; summary and report are written again. Trains nothing."""
    from orchestrator import judging
    from orchestrator.runs.run_dir import CONFIG_FILE
    from workers.judge.judges import JudgeSettings

    runs = [folder for folder in folders if (folder / CONFIG_FILE).is_file()]
    if runs:
        if len(folders) > 1:
            raise UserError(f"{runs[0]}: is a run, which is judged alone; name model folders, or this run")
        raise typer.Exit(_judge_run(runs[0], context, quiet=quiet))
    settings = JudgeSettings(
        tasks=names_in(tasks),
        data=data,
        shots=shots,
        limit=limit,
        subjects=None if subjects is None else names_in(subjects),
        batch_size=batch_size,
        device=device,
        dtype=judging.dtype(dtype),
        seed=seed,
        allow_code_execution=allow_code_execution,
        allow_unisolated=allow_unisolated,
        allow_contaminated=allow_contaminated,
    )
    judging.table(judging.judge(folders, settings, out=out, quiet=quiet))


def _judge_run(run_dir: Path, context: typer.Context, *, quiet: bool) -> int:
    """Judge the networks of a run; what the command line says stands in for what the run's configuration says."""
    from orchestrator.config.schema import JudgeConfig
    from orchestrator.runs import session

    given = {
        name: value
        for name, value in context.params.items()
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }
    elsewhere = {"device": "resources.device says where", "out": "summary.json has the scores"}
    for name, words in elsewhere.items():
        if name in given:
            raise UserError(f"--{name}: is for model folders; of a run {words}")
    values = {name: given[name] for name in JudgeConfig.model_fields if name in given}
    for name in {"tasks", "subjects"} & values.keys():
        values[name] = list(names_in(values[name]))
    overrides = [f"evaluation.judge.{name}={json.dumps(value, default=str)}" for name, value in values.items()]
    document = document_of(run_dir, overrides)
    if not (document.data.get("evaluation") or {}).get("judge"):
        raise UserError(f"{run_dir}: its evaluation.judge asks nothing; say what to ask, such as --data DIR")
    return session.judge(prepared_of(document, run_dir), quiet=quiet)


def generate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Model folder, or a run that has one model.")],
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="What to answer; without it, every line of the input.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt of the conversation.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is; no chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Decides what is drawn at a temperature above 0.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto (the model's own), float32, bfloat16, float16.")] = "auto",
) -> None:
    """Try a trained language model: answer a prompt, or a conversation line by line.

    segprop generate runs/x/model/segprop "What is a segment?"
    """
    from orchestrator import generating
    from workers.judge.answering import Sampling

    sampling = Sampling(max_tokens, temperature, seed)
    generating.generate(folder, prompt, sampling, system=system, raw=raw, device=device, dtype=dtype)
