"""Log to MLflow what made a model: settings, data sets, and metrics with the model.

    log_requested_settings   at the start: fixed settings; the others as they were requested
    log_final_settings       after training: also those that training chose (learning rate, epochs,
                             the winner of a grid)
    log_datasets             training, validation and test images: name, source, digest, counts
    log_model                the bundle as a model, with the metrics to rank it by

MLflow params cannot be changed. So a setting that training chooses is logged once it is known, and
its requested value under another name.
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

DATASET_CONTEXTS = {"train": "training", "valid": "validation", "test": "testing"}
"""What MLflow calls our splits."""
# The columns of a data set, in MLflow's notation.
DATASET_SCHEMA = {
    "mlflow_colspec": [
        {"name": "image", "type": "binary", "required": True},
        {"name": "labels", "type": "string", "required": True},
    ]
}


def dataset_name(catalog: Catalog) -> str:
    """The name of the table, or the last part of the path of the images."""
    if catalog.source:
        name = catalog.source.rstrip("/").rpartition("/")[2]
        return name.rpartition(".")[0] or name
    return catalog.root.rstrip("/").rpartition("/")[2] or catalog.root


def log_requested_settings(run: Run, config: TrainConfig, grid_fields: Collection[str]) -> None:
    """Log params `train.<field>`, or `train.<field>_asked` for fields that training chooses.

    grid_fields: fields for which a grid tries several values.
    """
    for name, value in config.parameters().items():
        if name in grid_fields:
            run.params({f"train.{name}_asked": "grid"})
        elif value == "auto" or (name == "warmup" and value is None):
            run.params({f"train.{name}_asked": "auto"})
        else:
            run.params({f"train.{name}": value})


def log_final_settings(run: Run, config: TrainConfig) -> None:
    """Log all params `train.<field>`, including those that training chose."""
    run.params({f"train.{name}": value for name, value in config.parameters().items()})


def log_datasets(run: Run, catalog: Catalog) -> None:
    """Log the images of each split as an input of the run, and set the tag `dataset`."""
    name, source = dataset_name(catalog), catalog.source or catalog.root
    for split, context in DATASET_CONTEXTS.items():
        rows = [row for row, row_split in enumerate(catalog.splits) if row_split == split]
        if not rows:
            continue
        counts = Counter(label for row in rows for label in catalog.labels[row])
        digest = hashlib.blake2b(digest_size=6)  # short, because people read it
        for row in rows:
            image = (catalog.paths[row], int(catalog.sizes[row]), catalog.labels[row])
            digest.update(repr(image).encode())
        profile = {"num_rows": len(rows), "images_by_class": dict(sorted(counts.items()))}
        run.dataset(
            name, digest.hexdigest(), source, context, profile=profile, schema=DATASET_SCHEMA
        )
    run.tags({"dataset": name})


def log_model(run: Run, bundle: Path, metrics: Mapping[str, Any]) -> None:
    """Log the bundle as the run's model, and its metrics on both, each with its data set.

    If the model cannot be logged, the bundle's files are logged as artifacts.
    """
    content = json.loads((bundle / "bundle.json").read_bytes())
    run.tags({"task": content["task"]})
    model = run.model(bundle)
    valid = {name: value for name, value in metrics.items() if isinstance(value, float)}
    test = {name: valid.pop(name) for name in list(valid) if name.startswith("test_")}
    run.record(valid, model=model, dataset=DATASET_CONTEXTS["valid"])
    if test:
        run.record(test, model=model, dataset=DATASET_CONTEXTS["test"])
    if model is None and run.logs_models:
        run.log_artifact(bundle, "bundle")
