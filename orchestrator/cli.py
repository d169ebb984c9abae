"""The segprop program: parses the command line and wires the parts together.

Exit codes: 0 done, 1 failed, 2 bad input. Only errors of `cache_store.errors` are expected; they are printed
plainly. Everything heavy is imported inside the command that needs it, so help and dry runs are quick.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache_store.errors import SegpropError, UserError
from orchestrator.cache import commands
from orchestrator.env_file import load_env_file

if TYPE_CHECKING:
    from orchestrator.config.devices import Device
    from orchestrator.config.yaml_loader import Document
    from orchestrator.runs.prepare import Prepared
    from orchestrator.runs.recorded import Recorded

app = typer.Typer(
    name="segprop",
    help="Train networks segment by segment on Ray: SegProp, end-to-end and layer-wise, side by side.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(commands.app, name="cache")
data_app = typer.Typer(help="Look at the data of a configuration.", no_args_is_help=True)
app.add_typer(data_app, name="data")

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml.")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings that replace those of the file: training.epochs=3 'regimes=[e2e, segprop]'.",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="The same as KEY=VALUE behind CONFIG; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def run(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    settings: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; train nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")] = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Also from another driver that works on this run; it stops.")
    ] = False,
) -> None:
    """Run everything a configuration asks for, or go on where it stopped.

    Finished work is never done again: run the same command after an interruption, or with more regimes.
    Paths in the configuration are relative to the current directory."""
    from orchestrator.config.load import read_document
    from orchestrator.runs.prepare import foresee_data, prepare_document
    from orchestrator.runs.run_dir import check_run_dir, in_own_dir
    from orchestrator.sweeps.prepare import is_sweep

    document = read_document(config, _given(overrides, settings))
    if is_sweep(document):
        _run_sweep(document, dry_run=dry_run, quiet=quiet, take_over=take_over)
    prepared = prepare_document(document, inspect=foresee_data if dry_run else None)
    if dry_run:
        from orchestrator.runs.dry_run import print_plan

        print_plan(prepared)
        return
    prepared = in_own_dir(document, prepared)
    check_run_dir(prepared)
    from orchestrator.runs import session

    raise typer.Exit(session.execute(prepared, quiet=quiet, take_over=take_over))


@app.command()
def sweep(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    settings: SetOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the trials and what they share; run nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")] = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Also from another driver that works on this sweep; it stops.")
    ] = False,
) -> None:
    """Run a configuration many times with other settings, as its `sweep` section says, or go on where it stopped.

    The trials share one store: what several of them need runs once. `segprop run` does the same with such a file."""
    from orchestrator.config.load import read_document

    _run_sweep(read_document(config, _given(overrides, settings)), dry_run=dry_run, quiet=quiet, take_over=take_over)


def _run_sweep(document: Document, *, dry_run: bool, quiet: bool, take_over: bool) -> None:
    """Run or print a sweep, and end the command."""
    from orchestrator.sweeps.prepare import check_sweep_dir, prepare_sweep_document

    prepared = prepare_sweep_document(document)
    if dry_run:
        from orchestrator.sweeps.dry_run import print_sweep

        print_sweep(prepared)
        raise typer.Exit
    check_sweep_dir(prepared)
    from orchestrator.sweeps import session

    raise typer.Exit(session.execute(prepared, quiet=quiet, take_over=take_over))


@app.command()
def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="Also say what fits this accelerator and what to change: l4, a10g, rtx4090, a100-80, h100, …"
        ),
    ] = None,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Also trace real steps, of tensors without bytes."),
    ] = False,
) -> None:
    """Print the stages with parameters, memory, snapshot bytes and time; train nothing."""
    from orchestrator.config.load import read_document
    from orchestrator.runs.prepare import foresee_data, prepare_document
    from orchestrator.sweeps.prepare import is_sweep

    document = read_document(config, _given(overrides, settings))
    if is_sweep(document):
        _plan_sweep(document, as_json=as_json)
        return
    from orchestrator.config.devices import device_called

    known = None if device is None else device_called(device)
    prepared = prepare_document(document, inspect=foresee_data, device=known)
    _answer(
        prepared, known, ["segprop", "run", str(config), *_given(overrides, settings)], as_json=as_json, trace=trace
    )


def _answer(prepared: Prepared, device: Device | None, command: list[str], *, as_json: bool, trace: bool) -> None:
    """Print a plan, and what was asked about it."""
    from orchestrator.runs import fit
    from orchestrator.runs import trace as tracing
    from orchestrator.runs.dry_run import print_plan, print_wide

    fits = None if device is None else fit.fit_of(prepared, device)
    stages = tracing.traced(prepared) if trace else None
    if as_json:
        found: dict[str, object] = {"config": prepared.config.resolved(), "plan": prepared.plan.to_json()}
        if fits is not None:
            found["device"] = fits.to_json()
        if stages is not None:
            found["trace"] = [stage.to_json() for stage in stages]
        print(json.dumps(found, indent=1))
        return
    print_plan(prepared)
    if fits is not None:
        print()
        print_wide(fit.render(fits, shlex.join(command)))
    if stages is not None:
        print()
        print_wide(tracing.render(stages))


def _plan_sweep(document: Document, *, as_json: bool) -> None:
    from orchestrator.sweeps.dry_run import print_sweep
    from orchestrator.sweeps.prepare import prepare_sweep_document

    prepared = prepare_sweep_document(document)
    if not as_json:
        print_sweep(prepared)
        return
    trials = [
        {"name": trial.name, "parameters": trial.parameters, "config": trial.prepared.config.resolved()}
        for trial in prepared.trials
    ]
    print(json.dumps({"trials": trials, "plan": prepared.plan.to_json()}, indent=1))


@app.command()
def profile(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    settings: SetOption = None,
    stage: Annotated[
        str | None,
        typer.Option(help="Its name or number, such as stage2-seg2 or 2; the first one by default.", metavar="STAGE"),
    ] = None,
    regime: Annotated[
        str | None, typer.Option(help="The regime it is of; by default the first one that has it.", metavar="REGIME")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps to count, behind a few to warm up.", min=1, max=100_000)] = 20,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the trace and the tables; default: profiles/RUN-REGIME-STAGE.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show where the time of a stage's steps goes: on the clock and in processor seconds, by phase and by operator.

    Runs the first steps of one stage in this process, without Ray. Writes trace.json, which https://ui.perfetto.dev
    and chrome://tracing open, profile.txt (the tables) and profile.json. The run directory stays as it is: what its
    store has is used, and initial weights stand in for stages that are not trained yet."""
    from orchestrator import profiling
    from orchestrator.config.load import read_document

    prepared = _single(read_document(config, _given(overrides, settings)), config)
    found = profiling.find_stage(prepared.plan, stage, regime)
    taken, folder = profiling.profile(prepared, found, steps, out)
    if as_json:
        print(json.dumps({"regime": found.regime, **taken.to_json()}, indent=1))
        return
    profiling.show(taken, found.regime)
    print(f"\nwritten to {folder}: {profiling.TRACE} (ui.perfetto.dev), {profiling.TABLES}, {profiling.FIGURES}")


@app.command()
def status(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Folder of a run, a configuration file, or a folder that holds runs."),
    ] = Path("runs"),
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again and again until the run has ended.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.2)] = 2.0,
    as_json: JsonOption = False,
) -> None:
    """How far a run is, from its store alone: whether a driver is at work or not, from any machine that sees it.

    Of a folder that holds runs, such as runs (the default): each with its state, size and scores.
    With --watch --json one object a line."""
    from orchestrator.status import listing, view
    from orchestrator.status.observe import observe

    if listing.is_listed(run):
        if watch:
            raise UserError(f"--watch: {run} is no run; name one of those in it")
        found_runs = listing.list_runs(run)
        if as_json:
            print(json.dumps([found.to_json() for found in found_runs], indent=1))
        else:
            listing.show_runs(found_runs, run)
        return
    observer = observe(str(run))
    if not as_json:
        if watch:
            view.watch(observer, every)
        else:
            view.show(observer.look())
        return
    while True:
        found = observer.look()
        print(json.dumps(dataclasses.asdict(found), indent=None if watch else 1), flush=True)
        if not watch or found.ended:
            return
        time.sleep(every)


@app.command()
def ui(
    place: Annotated[
        Path, typer.Argument(metavar="[RUN_OR_FOLDER]", help="Folder of a run, or a folder that holds runs.")
    ] = Path("runs"),
    host: Annotated[
        str, typer.Option(help="Address to listen at; any but this machine's own asks visitors for a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.", min=0, max=65535)] = 8420,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File that only you may read, with the token in its first line; else one is made."),
    ] = None,
) -> None:
    """Show runs in the browser, live: stages, curves, memory, log; compare runs, filter sweeps, plan, stop.

    Reads what runs leave behind, and loads nothing from the network."""
    from orchestrator.ui.server import Listening, serve

    serve(place, Listening(host, port, token_file))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Folders of runs, two or more.")],
    same: Annotated[bool, typer.Option("--all", help="Also settings that are the same; * marks the others.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Put runs side by side: the settings in which they differ, defaults included, and what each came to."""
    from orchestrator.status import compare as comparing

    found = comparing.compare(runs)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        comparing.show(found, same=same)


@app.command()
def clean(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or folders that hold runs, such as runs.")
    ],
    store: Annotated[
        bool,
        typer.Option("--store", help="Remove the whole store of finished runs; results and models stay."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be freed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before --store.")] = False,
) -> None:
    """Free the disk of what finished runs no longer need.

    That is work of an earlier state of their data, snapshots, attempts that lost, and checkpoints. Runs under way or
    unfinished, and stores outside run directories, are left alone. With --store nothing can be trained further from a
    run, and no report or export be written again; summary.json, report.html and model/ stay."""
    from orchestrator.status.clean import clean as clean_runs
    from orchestrator.units import human_bytes

    if store and not dry_run and not yes:
        typer.confirm(f"Remove the stores of the finished runs in {', '.join(map(str, runs))}?", abort=True)
    total = 0
    for cleaned in clean_runs(runs, store=store, dry_run=dry_run):
        total += cleaned.bytes
        print(
            f"{human_bytes(cleaned.bytes):>9}  {cleaned.path}{f': left alone: {cleaned.left}' if cleaned.left else ''}"
        )
    print(f"{'would free' if dry_run else 'freed'} {human_bytes(total)}")


@app.command()
def why(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or a configuration file.")],
    stage: Annotated[
        str,
        typer.Argument(metavar="STAGE", help="As `segprop status` shows it, such as segprop/stage2-seg2; or data."),
    ],
    overrides: OverridesArgument = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """What the identity of a stage (or another node) is made of, and for one that will run again, what differs from the
    nearest finished one in the store."""
    from orchestrator.config.load import read_document
    from orchestrator.runs.why import look_at, why_text

    if run.is_file():
        document = read_document(run, _given(overrides, settings))
        place = Path(str(document.data.get("run_dir") or "RUN_DIR"))
    else:
        document, place = _document(run, _given(overrides, settings)), run
    found = look_at(_single(document, place), stage)
    print(json.dumps(found.to_json(), indent=1) if as_json else why_text(found))


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run, such as runs/quickstart.")],
) -> None:
    """Write summary.json (of a sweep sweep.json) and report.html again, from what the store holds.

    Also while the run is under way. Of a run, neither the data set nor the original model is needed."""
    document = _document(run_dir)
    from orchestrator.sweeps.prepare import is_sweep

    if is_sweep(document):
        from orchestrator.sweeps import session
        from orchestrator.sweeps.prepare import prepare_sweep_document

        session.report(prepare_sweep_document(document))
        return
    from orchestrator.runs import results

    results.report(_recorded(run_dir))


@app.command()
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
    recorded = _recorded(run_dir)
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


@app.command()
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


@app.command()
def init(
    config: Annotated[
        Path, typer.Argument(metavar="[FILE]", help="Where to write the configuration; not one that is there.")
    ] = Path("segprop.yaml"),
    model: Annotated[
        str | None, typer.Option(help="resnet18, swin_t, … (any of torchvision or timm), or a folder or hub id.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A folder of images or texts, a file of chats or labelled rows, or digits, …."),
    ] = None,
    regimes: Annotated[str, typer.Option(help="What to compare.")] = "e2e,segprop",
    device: Annotated[str | None, typer.Option(help="A card to plan for: l4, rtx4090, a100-80, h100, ….")] = None,
) -> None:
    """Write a commented configuration for a model, data and a card, and check it by planning; trains nothing.

    Asks in a terminal for what the options leave out. Beside it lies the schema by which editors complete keys."""
    from orchestrator.config.devices import device_called
    from orchestrator.config.load import read_document
    from orchestrator.runs import starter
    from orchestrator.runs.prepare import foresee_data, prepare_document

    known = None if device is None else device_called(device)
    wanted = starter.Wanted(
        _asked("--model", model, "Model (resnet18, swin_t, …, or a folder or hub id)"),
        _asked("--data", data, "Data (a folder, a file, or digits, cifar10, …)"),
        _names(regimes),
        device,
    )
    starter.write(config, starter.configuration(wanted), _schema())
    try:
        prepared = prepare_document(read_document(config), inspect=foresee_data, device=known)
    except UserError:
        config.unlink()
        raise
    _answer(prepared, known, ["segprop", "run", str(config)], as_json=False, trace=False)
    print(f"\nwritten to {config}. Next:\n  " + "\n  ".join(starter.next_steps(config)))


def _asked(option: str, given: str | None, question: str) -> str:
    """Return what was given, or else what somebody in a terminal answers. UserError where nobody can be asked."""
    if given is not None:
        return given
    if not sys.stdin.isatty():
        raise UserError(f"{option}: is missing, and there is no terminal to ask in")
    return str(typer.prompt(question)).strip()


def _schema() -> bytes:
    from orchestrator.runs.json_schema import json_schema

    return (json.dumps(json_schema(), indent=1) + "\n").encode()


@app.command()
def schema() -> None:
    """Print the JSON schema of configurations, by which editors complete keys and mark mistakes.

    segprop schema > segprop.schema.json, and in the first line of a configuration:
    # yaml-language-server: $schema=segprop.schema.json"""
    sys.stdout.write(_schema().decode())


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where results will go.")] = Path("runs"),
    store: Annotated[str | None, typer.Option(help="Also try a store: a folder or URI.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What this machine has of what runs need, and how to get what is missing. Exit code 1 where something is wrong.

    Looks at versions, optional packages, GPUs, memory, the disk and its speed, and which tokens are set."""
    from orchestrator.runs import doctor as examining

    findings = examining.examine(folder, store)
    if as_json:
        seen = list(findings)
        print(json.dumps([dataclasses.asdict(found) for found in seen], indent=1))
    else:
        seen = examining.show(findings)
    if any(found.state == examining.PROBLEM for found in seen):
        raise typer.Exit(1)


@app.command()
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
        tasks=_names(tasks),
        data=data,
        shots=shots,
        limit=limit,
        subjects=None if subjects is None else _names(subjects),
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
        values[name] = list(_names(values[name]))
    overrides = [f"evaluation.judge.{name}={json.dumps(value, default=str)}" for name, value in values.items()]
    document = _document(run_dir, overrides)
    if not (document.data.get("evaluation") or {}).get("judge"):
        raise UserError(f"{run_dir}: its evaluation.judge asks nothing; say what to ask, such as --data DIR")
    return session.judge(_single(document, run_dir), quiet=quiet)


@app.command()
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


@data_app.command()
def show(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    settings: SetOption = None,
    rows: Annotated[int, typer.Option(help="Documents to show.", min=1, max=10_000)] = 3,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    tokens: Annotated[bool, typer.Option("--tokens", help="Also list the numbers of the tokens.")] = False,
) -> None:
    """Print the first samples as training will see them: text, tokens, and which of them the loss counts.

    Trains nothing and needs no store: segprop data show configs/smollm2_segprop.yaml data.path=chats.jsonl --rows 5"""
    from orchestrator.config.load import read_document
    from orchestrator.runs import data_show

    found = data_show.preview(read_document(config, _given(overrides, settings)), split, rows)
    data_show.show(found, split, tokens=tokens)


def _given(overrides: Sequence[str] | None, settings: Sequence[str] | None) -> list[str]:
    """Return the settings of the command line: those behind CONFIG, then those of --set."""
    return [*(overrides or ()), *(settings or ())]


def _names(text: str) -> tuple[str, ...]:
    """Split names at commas, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _document(run_dir: Path, overrides: Sequence[str] = ()) -> Document:
    """Read the resolved configuration that a run directory holds."""
    from orchestrator.config.load import read_document
    from orchestrator.runs.run_dir import CONFIG_FILE

    source = run_dir / CONFIG_FILE
    if not source.is_file():
        raise UserError(f"{run_dir}: not a run directory, it has no {CONFIG_FILE}")
    return read_document(source, [f"run_dir={json.dumps(str(run_dir))}", *overrides])


def _recorded(run_dir: Path) -> Recorded:
    """Read what the results of a run are written from; of a directory without a record of it, plan again."""
    from orchestrator.runs.recorded import Recorded, read_recorded
    from orchestrator.sweeps.prepare import is_sweep

    document = _document(run_dir)
    found = None if is_sweep(document) else read_recorded(run_dir, str(document.data["store"]))
    return found or Recorded.of(_single(document, run_dir))


def _single(document: Document, place: Path) -> Prepared:
    """Prepare a run that is no sweep. `place`: where its trials are."""
    from orchestrator.runs.prepare import prepare_document
    from orchestrator.sweeps.prepare import is_sweep

    if is_sweep(document):
        raise UserError(f"{place}: a sweep; name one of its trials, such as {place / 'trials' / '...'}")
    return prepare_document(document)


def main(arguments: Sequence[str] | None = None, program: str = "segprop") -> int:
    """Run the program and return its exit code."""
    load_env_file(Path())
    try:
        app(args=None if arguments is None else list(arguments), prog_name=program)
    except SegpropError as error:
        print(f"segprop: {error.message}", file=sys.stderr)
        return error.exit_code
    except (MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        print(
            "segprop: this machine has no memory left; the same command goes on where this one ended", file=sys.stderr
        )
        return 1
    except SystemExit as stop:  # how typer ends every command, also after usage errors (2)
        return stop.code if isinstance(stop.code, int) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
