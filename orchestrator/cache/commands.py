"""`segprop cache …`: look at, check and clear what a store holds.

Exit codes: 0 done, 1 failed (or damage found that was not repaired), 2 bad input.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from cache_store.errors import UserError
from orchestrator.units import seconds_of

app = typer.Typer(help="Look at, check and clear the snapshots of a store.", no_args_is_help=True)

StoreArgument = Annotated[
    str, typer.Argument(metavar="STORE", help="A run directory, a configuration, or a store: a folder or URI.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def ls(store: StoreArgument, as_json: JsonOption = False) -> None:
    """The sets in a store: kind, run and label where known, boundary, rows, size, shards and age."""
    from orchestrator.cache.contents import open_store, sets_of, store_facts
    from orchestrator.units import human_age, human_bytes

    storage = open_store(store)
    sets = sets_of(storage, store_facts(storage))
    if as_json:
        print(json.dumps([dataclasses.asdict(item) for item in sets], indent=1))
        return
    for item in sets:
        shards = f"{item.shards_present}/{item.shards} shards"
        after = f"after {item.boundary}" if item.boundary else ""
        name = "  ".join(part for part in (after, item.run, item.label) if part)
        age = human_age(item.age_s)
        size = human_bytes(item.bytes)
        print(f"{item.id}  {item.kind:<9}  {item.rows:>9} rows  {size:>9}  {shards:>16}  {age:>7}  {name}".rstrip())
    print(f"{len(sets)} sets, {human_bytes(sum(item.bytes for item in sets))}")


@app.command()
def du(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Bytes and files by kind."""
    from orchestrator.cache.contents import open_store, store_facts
    from orchestrator.cache.inventory import Pile
    from orchestrator.units import human_bytes

    facts = store_facts(open_store(store))
    totals: dict[str, Pile] = {}
    for set_id, files in facts.survey.sets.items():
        kind = facts.kinds.get(set_id) or "damaged"
        totals.setdefault(f"{kind} sets", Pile()).merge(files.all)
    for node in facts.survey.nodes.values():
        totals.setdefault("nodes", Pile()).merge(node.all)
    for pile in (*facts.survey.plans.values(), *facts.survey.probes.values(), facts.survey.other):
        totals.setdefault("other", Pile()).merge(pile)
    if as_json:
        print(json.dumps({kind: {"bytes": pile.bytes, "files": pile.files} for kind, pile in totals.items()}, indent=1))
        return
    for kind, pile in sorted(totals.items(), key=lambda item: -item[1].bytes):
        print(f"{human_bytes(pile.bytes):>9}  {pile.files:>7} files  {kind}")
    print(f"{human_bytes(sum(pile.bytes for pile in totals.values())):>9}  in all")


@app.command()
def verify(
    store: StoreArgument,
    repair: Annotated[
        bool, typer.Option("--repair", help="Move what is damaged to quarantine: the next run makes it again.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read everything and compare it with its SHA-256. Exit code 1 when damage is found and left."""
    from cache_store.audit import Audit
    from orchestrator.cache.contents import open_store
    from orchestrator.units import human_bytes

    audit = Audit(open_store(store, repair=repair))
    findings: list[dict[str, Any]] = []
    for finding in audit.run():
        if repair:
            finding.repair()
        findings.append({"kind": finding.kind, "owner": finding.owner, "path": finding.path, "reason": finding.reason})
        if not as_json:
            print(f"{'moved aside' if repair else 'damaged'}: {finding.path}: {finding.reason}")
    tally = dataclasses.asdict(audit.tally)
    if as_json:
        print(json.dumps({"checked": tally, "damaged": findings, "repaired": repair}, indent=1))
    else:
        checked = f"{tally['files']} files, {human_bytes(tally['bytes'])}, {tally['records']} records"
        print(f"checked {checked}: {len(findings)} damaged{' and moved aside' if repair and findings else ''}")
    if findings and not repair:
        raise typer.Exit(1)


@app.command()
def gc(
    store: StoreArgument,
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="AGE", help="Leave alone what is younger, such as 90m, 12h, 7d.")
    ] = "7d",
    keep: Annotated[
        list[Path] | None,
        typer.Option("--keep", metavar="RUN", help="Also delete finished work that none of these runs has."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete what no committed or running plan needs: sets, attempts that lost or never committed, quarantine; with
    --keep also weights, data and scores that belong to none of the runs named.

    Ages go by the store's own clock. A plan that nothing was written of for longer than AGE counts as abandoned."""
    from orchestrator.cache.contents import nodes_of_run, open_store, store_facts
    from orchestrator.cache.garbage import Waste, collect, delete
    from orchestrator.units import human_age, human_bytes

    limit = age(older_than)
    storage = open_store(store)
    wanted = None if not keep else frozenset[str]().union(*(nodes_of_run(storage, run) for run in keep))
    waste: list[Waste] = collect(store_facts(storage), limit, wanted)
    if not dry_run:
        for item in waste:
            delete(storage, item)
    if as_json:
        print(json.dumps({"deleted": not dry_run, "items": [dataclasses.asdict(item) for item in waste]}, indent=1))
        return
    for item in waste:
        print(f"{human_bytes(item.bytes):>9}  {human_age(item.age_s):>7}  {item.kind:<10}  {item.path}: {item.reason}")
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(item.kind for item in waste).items()))
    total = human_bytes(sum(item.bytes for item in waste))
    print(f"{'would delete' if dry_run else 'deleted'} {total}{f' ({counts})' if counts else ''}")


@app.command()
def rm(
    store: StoreArgument,
    set_ids: Annotated[list[str], typer.Argument(metavar="SET...", help="Ids as `ls` shows them.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete sets. A run that still needs one makes it again; decoded data only if its data node runs again."""
    from orchestrator.cache.contents import drop_set, open_store, store_facts
    from orchestrator.units import human_bytes

    storage = open_store(store)
    facts = store_facts(storage)
    unknown = [set_id for set_id in set_ids if set_id not in facts.survey.sets]
    if unknown:
        raise UserError(f"no such set: {', '.join(unknown)}; `segprop cache ls` shows them")
    chosen = list(dict.fromkeys(set_ids))
    for set_id in chosen:
        print(f"{set_id}  {facts.kinds.get(set_id) or 'damaged'}  {human_bytes(facts.survey.sets[set_id].all.bytes)}")
    if not yes and not typer.confirm(f"Delete {_count(chosen, 'set')}?"):
        raise typer.Exit(1)
    for set_id in chosen:
        drop_set(storage, set_id)
    print(f"deleted {_count(chosen, 'set')}")


def age(text: str) -> float:
    """Read an age such as 90m or 7d as seconds. UserError when it is none."""
    seconds = seconds_of(text)
    if seconds is None:
        raise UserError(f"--older-than: {text!r}: write a number and s, m, h, d or w, such as 12h or 7d")
    return seconds


def _count(items: Iterable[object], what: str) -> str:
    number = len(list(items))
    return f"{number} {what}{'' if number == 1 else 's'}"
