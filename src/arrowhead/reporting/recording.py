"""What made a model, written to its MLflow run: settings, data sets, figures beside the model.

    settings_asked   at the start: what is settled by then; the rest as it was asked
    settings_used    after the training: what it settled (rate, epochs, the winner of a grid)
    datasets         training, validation and test images: name, source, digest, counts by class
    trained_model    the bundle as a model, with the figures that it can be ranked by

MLflow never changes a parameter that a run has. So one that the training itself settles is
recorded when it is known, and what was asked under another name.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from arrowhead.data.catalog import Catalog
from arrowhead.tracking.run import Run
from arrowhead.training.config import TrainConfig

USES = {"train": "training", "valid": "validation", "test": "testing"}
"""MLflow's word for what a split is for."""
# As MLflow writes it of a table: what a row is.
SCHEMA = {
    "mlflow_colspec": [
        {"name": "image", "type": "binary", "required": True},
        {"name": "labels", "type": "string", "required": True},
    ]
}


def dataset_name(catalog: Catalog) -> str:
    """What a data set is called: its table's name, or the last part of where its images lie."""
    if catalog.source:
        name = catalog.source.rstrip("/").rpartition("/")[2]
        return name.rpartition(".")[0] or name
    return catalog.root.rstrip("/").rpartition("/")[2] or catalog.root


def settings_asked(run: Run, config: TrainConfig, searched: Collection[str]) -> None:
    """Params `train.<field>`; of a field that the training settles, `train.<field>_asked`.

    searched: fields that a grid tries several values of.
    """
    for name, value in config.parameters().items():
        if name in searched:
            run.params({f"train.{name}_asked": "grid"})
        elif value == "auto" or (name == "warmup" and value is None):
            run.params({f"train.{name}_asked": "auto"})
        else:
            run.params({f"train.{name}": value})


def settings_used(run: Run, config: TrainConfig) -> None:
    """Params `train.<field>`, those included that were not known before the training."""
    run.params({f"train.{name}": value for name, value in config.parameters().items()})


def datasets(run: Run, catalog: Catalog) -> None:
    """The images of each split as an input of the run, and the tag `dataset`."""
    name, source = dataset_name(catalog), catalog.source or catalog.root
    for split, use in USES.items():
        rows = [row for row, its in enumerate(catalog.splits) if its == split]
        if not rows:
            continue
        counts = Counter(label for row in rows for label in catalog.labels[row])
        digest = hashlib.blake2b(digest_size=6)  # short: people read it
        for row in rows:
            mark = (catalog.paths[row], int(catalog.sizes[row]), catalog.labels[row])
            digest.update(repr(mark).encode())
        profile = {"num_rows": len(rows), "images_by_class": dict(sorted(counts.items()))}
        run.dataset(name, digest.hexdigest(), source, use, profile=profile, schema=SCHEMA)
    run.tags({"dataset": name})


def trained_model(run: Run, bundle: Path, figures: Mapping[str, Any]) -> None:
    """Log the bundle as the run's model, and its figures on both, each with its data set."""
    content = json.loads((bundle / "bundle.json").read_bytes())
    run.tags({"task": content["task"]})
    model = run.model(bundle)
    numbers = {name: value for name, value in figures.items() if isinstance(value, float)}
    tested = {name: numbers.pop(name) for name in list(numbers) if name.startswith("test_")}
    run.record(numbers, model=model, dataset=USES["valid"])
    if tested:
        run.record(tested, model=model, dataset=USES["test"])
    if model is None and run.logs_models:  # it could not be logged: the run keeps the files
        run.log_artifact(bundle, "bundle")
