"""Report grids, cross-validation folds and learning curves: on the screen, in files, in MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.data.catalog import Catalog
from arrowhead.examine import figures
from arrowhead.features.store import Store
from arrowhead.reporting import recording
from arrowhead.reporting.run_context import RunContext
from arrowhead.training import folds_file, grid
from arrowhead.training.config import TrainConfig
from arrowhead.training.study import OutOfFold, Study, StudyResult
from arrowhead.training.trainer import TrainedHead
from arrowhead.wording import pluralize

MAX_SETTINGS_SHOWN = 5


def report_grid(
    store: Store, study: Study, result: StudyResult, folder: Path, context: RunContext
) -> dict[str, Any]:
    """Show the ranked settings of a grid, write them to `folder`/grid.csv, and record each head as
    a child run. Returns the ranking (see `grid.summary`).
    """
    overrides, heads, ranking = study.overrides, result.heads, result.ranking
    assert ranking is not None
    p_text = "; p: p-value of the difference from the first row" if ranking["test"] else ""
    context.screen.print(
        f"{pluralize(len(heads), 'head')}, {pluralize(len(ranking['settings']), 'setting')}, by"
        f" {ranking['figure']}{p_text}:"
    )
    for setting in ranking["settings"][:MAX_SETTINGS_SHOWN]:
        std = "" if setting["spread"] is None else f" ± {setting['spread']:.4f}"
        context.screen.print(
            f"  {setting['mean']:.4f}{std}  loss {setting['valid_loss']:.4f}"
            f"  {grid.format_setting(setting['knobs'])}{_remark(setting)}"
        )
    if len(ranking["settings"]) > MAX_SETTINGS_SHOWN:
        context.screen.print(
            f"  … the best {MAX_SETTINGS_SHOWN}; all of them are in report/grid.csv"
        )
    if len(heads) > len(ranking["settings"]):
        context.screen.print(_winner_text(ranking, heads[ranking["best"]]))
    context.screen.print(ranking["words"])
    table = figures.grid_csv(ranking, folder / "grid.csv")
    if context.run:
        context.run.log_artifact(table, "grid")
        context.run.tags({"grid.verdict": ranking["words"]})
        context.run.children(
            [grid.format_setting(one) for one in overrides],
            [{f"train.{name}": value for name, value in one.items()} for one in overrides],
            [_metric_series(head) for head in heads],
            {
                "part": "grid",
                "dataset": recording.dataset_name(Catalog(**store.read_catalog())),
                "body": store.recipe.body,
                "recipe": store.recipe.fingerprint,
            },
        )
    return ranking


def _winner_text(ranking: dict[str, Any], winner: TrainedHead) -> str:
    """Why the bundle's metric is not the mean in the first row: it is that of one seed."""
    best = ranking["settings"][0]
    seed = best["seeds"][best["heads"].index(ranking["best"])]
    value = winner.epochs[winner.epoch][ranking["figure"]]
    return (
        f"rows: the mean ± standard deviation over {pluralize(len(best['seeds']), 'seed')}; the"
        f" bundle is the best head of the first row: seed {seed}, {ranking['figure']} {value:.4f}"
    )


def _remark(setting: dict[str, Any]) -> str:
    """When a setting was stopped, or the p-value of its difference from the best."""
    if setting["stopped"]:
        return f"  (stopped after {pluralize(setting['epochs'], 'epoch')})"
    return "" if setting["p"] is None else f"  p = {setting['p']:.2g}"


def _metric_series(head: TrainedHead) -> dict[str, list[tuple[int, float]]]:
    """A head's metrics as (epoch, value), and as kept.* those of the epoch that was kept."""
    names = [name for name in head.epochs[0] if name != "epoch"]
    series = {name: [(int(line["epoch"]), line[name]) for line in head.epochs] for name in names}
    kept = head.epochs[head.epoch]
    return series | {f"kept.{name}": [(head.epoch, kept[name])] for name in names}


def report_folds(
    store: Store, config: TrainConfig, folds: OutOfFold, folder: Path, context: RunContext
) -> dict[str, Any]:
    """Write out-of-fold probabilities to `folder`/folds.arrow; show and record mean and standard
    deviation of the folds' metrics. Returns what --json shows of the folds.
    """
    path = folder / "folds.arrow"
    _write_folds(store, config, folds, path)
    table = {
        name: {"mean": float(np.mean(values)), "spread": float(np.std(values, ddof=1))}
        for name in folds.last[0]
        if name not in ("epoch", "train_loss")
        for values in [[line[name] for line in folds.last]]
    }
    metrics = " · ".join(f"{k} {v['mean']:.4f} ± {v['spread']:.4f}" for k, v in table.items())
    epochs = "" if config.head == "logistic" else f", {pluralize(folds.epochs, 'epoch')} each"
    context.screen.print(f"{len(folds.last)} folds{epochs}: {metrics}")
    if folds.not_held_out:
        names = ", ".join(f"{name} ({count})" for name, count in folds.not_held_out.items())
        context.screen.print(
            "classes with too few different images to hold out (images): "
            f"{names}. They are trained on in every fold and get no probability."
        )
    context.screen.print(
        f"{path.name}: a probability for every image, from a head that was not trained on it"
    )
    if context.run:
        context.run.record(
            {f"folds.{k}.{kind}": v for k, pair in table.items() for kind, v in pair.items()}
        )
        context.run.log_artifact(path, "folds")
    return {
        "figures": table,
        "folds": folds.last,
        "epochs": folds.epochs,
        "not_held_out": folds.not_held_out,
        "file": path.name,
    }


def _write_folds(store: Store, config: TrainConfig, folds: OutOfFold, path: Path) -> None:
    catalog, manifest = store.read_catalog(), store.manifest()
    folds_file.write_folds(
        path,
        {
            "path": [catalog["paths"][row] for row in folds.row],
            "labels": [catalog["labels"][row] for row in folds.row],
            "fold": folds.fold,
            "probability": _uncalibrated_probabilities(folds.logit, folds.multi),
        },
        {
            "classes": manifest["classes"],
            "recipe": store.recipe.fingerprint,
            "catalog": manifest["catalog"]["sha256"],
            "training": config.parameters(),
        },
    )


def _uncalibrated_probabilities(logit_NC: NDArray[np.float32], multi: bool) -> NDArray[np.float32]:
    import torch

    logits = torch.from_numpy(logit_NC)
    prob_NC: NDArray[np.float32] = (logits.sigmoid() if multi else logits.softmax(1)).numpy()
    return prob_NC


def report_learning_curve(curve: dict[str, Any], folder: Path, context: RunContext) -> None:
    """Show and record a learning curve; write its figure and table to `folder`."""
    for point in curve["points"]:
        std = "" if point["spread"] is None else f" ± {point['spread']:.4f}"
        share = f"{100 * point['share']:.0f} %"
        context.screen.print(f"{share:>6} {point['images']:>8} images  {point['mean']:.4f}{std}")
    context.screen.print(curve["words"])
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
