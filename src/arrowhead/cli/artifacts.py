"""The commands that inspect stores and scores."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from arrowhead import arrow_io
from arrowhead.cli.app import (
    print_result,
    program,
)
from arrowhead.cli.options import (
    Out,
    Output,
    StorePath,
)
from arrowhead.cli.screen import Screen
from arrowhead.data import remote_folder
from arrowhead.wording import pluralize, shell_command

# ---------------------------------------------------------------------------- features


def info(store: StorePath, *, output: Out = Output()) -> int:
    """Show a store's images by class and split, faults by kind, recipe and size.

    Example: arrowhead features info out/store
    """
    from arrowhead.features import inspect

    facts = inspect.info(store := _opened(store))
    if output.json:
        print_result(facts)
        return 0
    screen = Screen(to_stderr=False)
    faults = sum(facts["faults"].values())
    screen.print(
        f"{store}: {pluralize(facts['images'], 'image')} ="
        f" {pluralize(facts['features'], 'feature')} + {pluralize(faults, 'fault')} ·"
        f" {pluralize(facts['distinct'], 'different content')} ·"
        f" {pluralize(facts['shards'], 'shard')} ·"
        f" {facts['bytes'] / 1e6:.1f} MB"
    )
    recipe = " · ".join(f"{name} {value}" for name, value in facts["recipe"].items())
    screen.print(f"recipe {facts['fingerprint']}: {recipe}")
    if origin := facts["weights"]:
        screen.print(f"weights: {origin['source']}, license {origin['license']}")
    splits = sorted({split for counts in facts["by_class"].values() for split in counts})
    width = max([5, *map(len, facts["by_class"])])
    screen.print(f"{'class':<{width}}" + "".join(f"{split:>9}" for split in splits))
    for name, counts in facts["by_class"].items():
        screen.print(f"{name:<{width}}" + "".join(f"{counts.get(split, 0):>9}" for split in splits))
    for kind, count in facts["faults"].items():
        screen.print(f"fault: {kind} {count}")
    if changes := facts["corrections"]["changes"]:
        labels = pluralize(facts["corrections"]["labels"], "label")
        history = shell_command([program(), "relabel", store, "--history"])
        screen.print(f"corrections: {labels} in {pluralize(len(changes), 'change')} ({history})")
    return 0


def verify(store: StorePath, *, output: Out = Output()) -> int:
    """Check a whole store: hashes, schema, row counts, duplicates, classes.

    The exit code is 4 if the store is damaged. Nothing is repaired.

    Example: arrowhead features verify out/store
    """
    from arrowhead.features import inspect

    findings = inspect.verify(store := _opened(store))
    _show_findings(findings, output)
    damaged = any(finding.damage for finding in findings)
    if not output.json:
        Screen(to_stderr=False).print(f"{store} {'is DAMAGED' if damaged else 'is complete'}")
    return 4 if damaged else 0


def gc(
    store: StorePath,
    *,
    yes: Annotated[bool, Parameter(help="Remove the files instead of listing them.")] = False,
    output: Out = Output(),
) -> int:
    """List files that are no longer used: drafts, and shards and catalogs of earlier runs.

    Shards of an earlier catalog can save work: if their images come back, they are not decoded
    again. Keep such shards if you expect that.

    Example: arrowhead features gc out/store --yes
    """
    from arrowhead.features import inspect

    findings = inspect.gc(_opened(store), remove=yes)
    _show_findings(findings, output)
    if not output.json:
        files = pluralize(len(findings), "file")
        them = "it" if len(findings) == 1 else "them"
        summary = f"{files} removed" if yes else f"{files} found; --yes removes {them}"
        Screen(to_stderr=False).print(summary if findings else "nothing to remove")
    return 0


def _opened(store: Path) -> Path:
    """The local folder of a store. A path that is none is refused before pyarrow is imported."""
    from arrowhead.features.store import Store

    store = Store(remote_folder.local(store)).path
    arrow_io.leave_out_pandas()
    return store


def _show_findings(findings: list[Any], output: Output) -> None:
    if output.json:
        print_result({"findings": [{**asdict(one), "damage": one.damage} for one in findings]})
        return
    for finding in findings:
        Screen(to_stderr=False).print(f"{finding.kind}: {finding.path}: {finding.words}")


# ------------------------------------------------------------------------------ scores


def scores_verify(
    out: Annotated[Path, Parameter(help="Scores: a folder written by `score`.")],
    *,
    output: Out = Output(),
) -> int:
    """Check scores: the hash of every part, its rows and their order.

    The exit code is 4 if the scores are damaged. Nothing is repaired: run the same score command
    again to replace damaged parts. `arrowhead score verify OUT` does the same.

    Example: arrowhead scores verify scores/
    """
    from arrowhead.inference import verify as inference_verify

    arrow_io.leave_out_pandas()
    out = remote_folder.local(out)
    remote_folder.of(out).fetch_all(again=True)
    result = inference_verify.verify(out)
    if output.json:
        print_result(result)
    else:
        screen = Screen(to_stderr=False)
        for problem in result["problems"]:
            screen.print(problem)
        screen.print(
            f"{out}: {pluralize(result['parts'], 'part')} · {pluralize(result['rows'], 'row')} ·"
            f" {result['bytes'] / 1e6:.1f} MB:"
            f" {'unchanged' if not result['problems'] else 'DAMAGED'}"
        )
    return 4 if result["problems"] else 0
