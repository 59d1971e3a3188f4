"""Grids, folds and learning curves: shown and recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from arrowhead.data.catalog import Catalog
from arrowhead.examine import figures
from arrowhead.features.store import Store
from arrowhead.reporting import recording
from arrowhead.reporting.run_context import RunContext
from arrowhead.training import folds_file, grid
from arrowhead.training.config import TrainConfig
from arrowhead.training.study import OutOfFold, Study, StudyResult
from arrowhead.training.trainer import TrainedHead
from arrowhead.wording import counted

SHOWN_SETTINGS = 5  # on the screen


def show_grid(
    store: Store, asked: Study, made: StudyResult, folder: Path, context: RunContext
) -> dict[str, Any]:
    """The ranked heads of a grid: on the screen, as a table, each as a child run."""
    overrides, heads, ranked = asked.overrides, made.heads, made.ranking
    assert ranked is not None
    context.screen.say(
        f"{counted(len(heads), 'head')}, {counted(len(ranked['settings']), 'setting')}, by"
        f" {ranked['figure']}:"
    )
    for setting in ranked["settings"][:SHOWN_SETTINGS]:
        spread = "" if setting["spread"] is None else f" ± {setting['spread']:.4f}"
        context.screen.say(
            f"  {setting['mean']:.4f}{spread}  loss {setting['valid_loss']:.4f}"
            f"  {grid.format_setting(setting['knobs'])}{_p_value(setting)}"
        )
    if len(ranked["settings"]) > SHOWN_SETTINGS:
        context.screen.say(f"  … the best {SHOWN_SETTINGS}; all of them are in report/grid.csv")
    context.screen.say(ranked["words"])
    table = figures.grid_csv(ranked, folder / "grid.csv")
    if context.run:
        context.run.log_artifact(table, "grid")
        context.run.tags({"grid.verdict": ranked["words"]})
        context.run.children(
            [grid.format_setting(one) for one in overrides],
            [{f"train.{name}": value for name, value in one.items()} for one in overrides],
            [_by_epoch(one) for one in heads],
            {"part": "grid", "dataset": recording.dataset_name(Catalog(**store.read_catalog()))}
            | {"body": store.recipe.body, "recipe": store.recipe.fingerprint},
        )
    return ranked


def _p_value(setting: dict[str, Any]) -> str:
    """Whether a setting differs from the best, after its name."""
    if setting["stopped"]:
        return f"  (stopped after {counted(setting['epochs'], 'epoch')})"
    return "" if setting["p"] is None else f"  p {setting['p']:.2g}"


def _by_epoch(head: TrainedHead) -> dict[str, list[tuple[int, float]]]:
    """A head's figures as MLflow wants them, those of the epoch that was kept last."""
    names = [name for name in head.epochs[0] if name != "epoch"]
    made = {name: [(int(line["epoch"]), line[name]) for line in head.epochs] for name in names}
    kept = head.epochs[head.epoch]
    return made | {f"kept.{name}": [(head.epoch, kept[name])] for name in names}


def show_folds(
    store: Store, config: TrainConfig, found: OutOfFold, folder: Path, context: RunContext
) -> dict[str, Any]:
    """Out-of-fold probabilities into `folder`; mean and spread of the folds' figures."""
    catalog = store.read_catalog()
    target = folder / "folds.arrow"
    classes = store.manifest()["classes"]
    folds_file.write_folds(
        target,
        {
            "path": [catalog["paths"][at] for at in found.row],
            "labels": [catalog["labels"][at] for at in found.row],
            "fold": found.fold,
            "probability": _p_values(found.logit, found.multi),
        },
        {
            "classes": classes,
            "recipe": store.recipe.fingerprint,
            "catalog": store.manifest()["catalog"]["sha256"],
            "training": config.parameters(),
        },
    )
    table = {
        name: {"mean": float(np.mean(values)), "spread": float(np.std(values, ddof=1))}
        for name in found.last[0]
        if name not in ("epoch", "train_loss")
        for values in [[line[name] for line in found.last]]
    }
    shown = " · ".join(f"{k} {v['mean']:.4f} ± {v['spread']:.4f}" for k, v in table.items())
    long = "" if config.head == "logistic" else f", {counted(found.epochs, 'epoch')} each"
    context.screen.say(f"{len(found.last)} folds{long}: {shown}")
    if found.not_held_out:
        names = ", ".join(f"{name} ({count})" for name, count in found.not_held_out.items())
        context.screen.say(
            "classes with too few different images to hold out (images): "
            f"{names}. They are trained on in every fold and get no probability."
        )
    context.screen.say(
        f"{target.name}: a probability for every image, from a head that has not seen it"
    )
    if context.run:
        context.run.record(
            {f"folds.{k}.{kind}": v for k, pair in table.items() for kind, v in pair.items()}
        )
        context.run.log_artifact(target, "folds")
    return {
        "figures": table,
        "folds": found.last,
        "epochs": found.epochs,
        "not_held_out": found.not_held_out,
        "file": target.name,
    }


def _p_values(logit_NC: Any, multi: bool) -> Any:
    """Probabilities, float32 (N, C), uncalibrated."""
    import torch

    logit = torch.from_numpy(logit_NC)
    return (logit.sigmoid() if multi else logit.softmax(1)).numpy()


def show_shares(curve: dict[str, Any], folder: Path, context: RunContext) -> None:
    """The learning curve: on the screen, as figure and table."""
    for point in curve["points"]:
        spread = "" if point["spread"] is None else f" ± {point['spread']:.4f}"
        share = f"{100 * point['share']:.0f} %"
        context.screen.say(f"{share:>6} {point['images']:>8} images  {point['mean']:.4f}{spread}")
    context.screen.say(curve["words"])
    stem = folder / "learning_curve"
    picture = figures.save(figures.learning_figure(curve), stem.with_suffix(".png"))
    table = figures.learning_csv(curve, stem.with_suffix(".csv"))
    if context.run:
        context.run.log_artifact(picture, "learning_curve")
        context.run.log_artifact(table, "learning_curve")
        context.run.tags({"learning_curve.verdict": curve["words"]})
        for point in curve["points"]:
            context.run.record(
                {f"learning_curve.{curve['figure']}": point["mean"]}, point["images"]
            )
