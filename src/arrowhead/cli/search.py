"""The commands that find images in a store: search and suggest."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Annotated, Any

from cyclopts import Parameter

from arrowhead.cli.app import finish, local_bundle, program, show_next_commands, show_written
from arrowhead.cli.options import BundleAddress, Models, Out, Output, StorePath, TrackingStore
from arrowhead.cli.screen import Screen
from arrowhead.cli.stage_options import Search, Suggest
from arrowhead.data import path_text, remote_folder
from arrowhead.errors import ConfigError
from arrowhead.examine.search import SearchConfig
from arrowhead.examine.suggest import SuggestConfig
from arrowhead.features.feature_config import recipe_flags
from arrowhead.features.store import Store
from arrowhead.wording import pluralize


def search(
    store: StorePath,
    *images: Annotated[
        str,
        Parameter(
            help="Images to find similar ones for: files, or paths of images in the store, as"
            " `features` and the CSV files show them."
        ),
    ],
    search: Search = SearchConfig(),
    output: Out = Output(),
) -> int:
    """Find the images of a store that are most similar to given images.

    Similarity is the cosine of standardized features, from -1 to 1. Images of the store need no
    decoding; other files are decoded with the store's recipe. Exact copies are marked. The exit
    code is 3 if one of the given images cannot be read; the others are answered.

    Example: arrowhead search out/store photo.jpg --top 20
    """
    from arrowhead.examine import search as examine_search
    from arrowhead.examine import search_page

    csv, page = (
        file and remote_folder.check_output_file(file) for file in (search.csv, search.out)
    )
    search = replace(search, csv=csv, out=page)
    if csv and csv.suffix.lower() not in (".csv", ".tsv"):
        raise ConfigError(
            f"--csv {csv} does not end in .csv.", "a table to write.", "give e.g. similar.csv."
        )
    screen = Screen(to_stderr=output.json)
    result = examine_search.search(remote_folder.local(store), images, search)
    for note in result["notes"]:
        screen.print(note)
    for query in result["queries"]:
        _show_query(screen, query)
    if page:
        search_page.write_page(page, result)
    if files := [file for file in (csv, page) if file]:
        remote_folder.send_files(files)
        result["files"] = show_written(screen, files)
    finish(result, output)
    counts = result["counts"]
    if not counts["faults"]:
        return 0
    inputs = pluralize(counts["inputs"], "image")
    Screen(to_stderr=True).print(f"arrowhead: {counts['faults']} of {inputs} could not be used.")
    return 3


def _show_query(screen: Screen, query: dict[str, Any]) -> None:
    """Show the images found for one query as a table, or why there are none."""
    if query["fault"]:
        screen.print(f"{query['query']}: {query['fault']}")
        return
    screen.print(f"most similar to {query['query']}:")
    rows = [("rank", "similarity", "path", "label", "split", "")]
    rows += [
        (
            str(one["rank"]),
            f"{one['similarity']:.4f}",
            one["path"],
            ", ".join(one["labels"]) or "-",
            one["split"],
            "exact copy" if one["exact_copy"] else "",
        )
        for one in query["similar"]
    ]
    path_width, label_width = (max(len(row[i]) for row in rows) for i in (2, 3))
    for rank, similarity, path, label, split, copy in rows:
        line = f"{rank:>4}  {similarity:>10}  {path:<{path_width}}  {label:<{label_width}}"
        screen.print(f"{line}  {split:<5}  {copy}".rstrip())


def suggest(
    store: StorePath,
    bundle: BundleAddress | None = None,
    *,
    suggest: Suggest = SuggestConfig(),
    tracking: Models = TrackingStore(),
    output: Out = Output(),
) -> int:
    """Suggest which unlabelled images of a store to label next.

    With a bundle: images that it is uncertain about and that are unlike each other. Without one:
    images that together are typical of the store, to begin with. Make the store with `precompute
    --unlabelled`. Images that the bundle was made from, and copies, are never suggested. Fill in
    the column new_label of the table, and run `fit` on it.

    Example: arrowhead suggest pool out/bundle --count 20
    """
    from arrowhead.bundle import resolve
    from arrowhead.examine import suggest as examine_suggest

    suggest = replace(suggest, out=remote_folder.check_output_file(suggest.out))
    store = remote_folder.local(store)
    Store(store)
    screen = Screen(to_stderr=output.json)
    if bundle:
        resolve.check_exists(bundle)
        with local_bundle(bundle, tracking) as folder:
            result = examine_suggest.suggest(store, folder, suggest) | {"bundle": bundle}
    else:
        result = examine_suggest.suggest(store, None, suggest)
    _show_suggestions(screen, result)
    if not result["counts"]["suggested"]:
        return finish(result, output)
    remote_folder.send_files([suggest.out])
    result["files"] = show_written(screen, [suggest.out])
    root = os.fsdecode(path_text.unescape_path(result["root"]))
    table = [program(), "fit", suggest.out, "OUT", "--images", root, "--label-column", "new_label"]
    table += ["--multi-label"] if result["multi_label"] else []
    screen.print("fill in the column new_label (delete the rows that you cannot label), then")
    show_next_commands(screen, [[*table, *recipe_flags(Store(store))]])
    return finish(result, output)


def _show_suggestions(screen: Screen, result: dict[str, Any]) -> None:
    """Show the images to label as a table, with what there was to choose from."""
    counts = result["counts"]
    screen.print(
        f"{pluralize(counts['suggested'], 'image')} suggested of {counts['candidates']}:"
        f" {counts['unlabelled']} without a label, minus known ones and copies"
    )
    for note in result["notes"]:
        screen.print(note)
    if counts["kept"]:
        screen.print(f"{pluralize(counts['kept'], 'row')} with a new_label kept in {result['out']}")
    width = max((len(one["path"]) for one in result["suggestions"]), default=0)
    for one in result["suggestions"]:
        screen.print(f"  {one['path']:<{width}}  {one['why']}")
