"""The result of a search as a page with pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from arrowhead import __version__
from arrowhead.data.catalog import Catalog
from arrowhead.examine import page, search, thumbnails
from arrowhead.examine.cards import Card
from arrowhead.examine.originals import Originals
from arrowhead.examine.thumbnails import Thumbnail
from arrowhead.features.store import Store
from arrowhead.wording import pluralize

SIDE = 320  # pixels of the longer side of a picture


def write_page(path: Path, result: Mapping[str, Any]) -> Path:
    """Write the result of `search.search` as one HTML file; returns its path.

    Only the images that it shows are read; one that is gone or has changed is shown as unreadable.
    """
    store = Store(Path(result["store"]))
    answered = [one for one in result["queries"] if not one["fault"]]
    paths = {similar["path"] for one in answered for similar in one["similar"]}
    paths |= {one["path"] for one in answered if one["path"]}
    rows = sorted(store.find_paths(sorted(paths)).values())
    row_M = np.array(rows, np.int64)
    images = Catalog(**store.read_catalog(row_M))
    made = Originals(images, store.image_ids()[row_M, 0]).map(
        range(len(images)), lambda data: thumbnails.make_thumbnail(data, SIDE)
    )
    picture = {name: made[at] for at, name in enumerate(images.paths)}
    total = sum(shard["files"] - shard["faults"] for shard in store.manifest()["shards"])
    content = {
        "subtitle": f"{pluralize(total, 'image')} in {result['store']}, the most similar first",
        "queries": [_section(query, picture) for query in result["queries"]],
        "version": __version__,
    }
    return page.write(path, "search.html.j2", content)


def _section(query: Mapping[str, Any], picture: Mapping[str, Thumbnail | None]) -> dict[str, Any]:
    """What the template shows of one query."""
    if query["fault"]:
        return {"name": query["query"], "fault": query["fault"]}
    own = picture[query["path"]] if query["path"] else _thumbnail_of_file(query["query"])
    return {
        "name": query["query"],
        "fault": None,
        "card": Card(path=query["path"] or query["query"], thumbnail=own),
        "similar": [
            Card(path=one["path"], thumbnail=picture[one["path"]], note=_note(one))
            for one in query["similar"]
        ],
    }


def _note(similar: Mapping[str, Any]) -> str:
    """What is known of an image that was found."""
    labels = f"label {', '.join(similar['labels'])}" if similar["labels"] else ""
    parts = [f"{similar['similarity']:.3f}", labels, similar["split"]]
    parts += ["exact copy"] if similar["exact_copy"] else []
    return " · ".join(filter(None, parts))


def _thumbnail_of_file(name: str) -> Thumbnail | None:
    """The thumbnail of a query that is a file outside the store."""
    data, fault = search.read_located(search.locate(name))
    return None if fault else thumbnails.make_thumbnail(data, SIDE)
