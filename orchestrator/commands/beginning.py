"""Commands to begin with: `init`, `schema`, `doctor`, `data show`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cache_store.errors import UserError
from orchestrator.commands.given import ConfigArgument, JsonOption, OverridesArgument, SetOption, names_in, overrides_of
from orchestrator.commands.running import answer


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
        names_in(regimes),
        device,
    )
    starter.write(config, starter.configuration(wanted), _schema())
    try:
        prepared = prepare_document(read_document(config), inspect=foresee_data, device=known)
    except UserError:
        config.unlink()
        raise
    answer(prepared, known, ["segprop", "run", str(config)], as_json=False, trace=False)
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


def schema() -> None:
    """Print the JSON schema of configurations, by which editors complete keys and mark mistakes.

    segprop schema > segprop.schema.json, and in the first line of a configuration:
    # yaml-language-server: $schema=segprop.schema.json"""
    sys.stdout.write(_schema().decode())


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

    found = data_show.preview(read_document(config, overrides_of(overrides, settings)), split, rows)
    data_show.show(found, split, tokens=tokens)
