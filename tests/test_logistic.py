"""Logistic regression gives scikit-learn's probabilities, on any number of workers and from disk,
for any features and labels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from training_data import data_from_arrays

from arrowhead import ConfigError
from arrowhead.features.store import Store
from arrowhead.training import heads, logistic
from arrowhead.training.batches import DistributedContext
from arrowhead.training.config import TrainConfig
from arrowhead.training.dataset import Data, MemoryMappedFeatures, Trial, resolve_class_weights
from arrowhead.training.grid import SweepConfig
from arrowhead.training.out_of_fold import OutOfFold
from arrowhead.training.study import Study
from arrowhead.training.trainer import TrainedHead

Rows = NDArray[Any]

pytestmark = pytest.mark.usefixtures("one_thread")


def gaussian_clusters(
    count: int, width: int, classes: int, separation: float, seed: int = 0
) -> Data:
    """Clouds of points around the classes' centres; a quarter of them validate."""
    rng = np.random.default_rng(seed)
    label = np.arange(count) % classes
    centre = rng.normal(size=(classes, width)) * separation
    feature = (centre[label] + rng.normal(size=(count, width)) * rng.uniform(0.2, 3, width)) + 5
    split = count * 3 // 4
    rows = feature.astype(np.float16)[:, None]
    names = [f"class {one}" for one in range(classes)]
    return data_from_arrays((rows[:split], label[:split]), (rows[split:], label[split:]), names)


def multi_label_data(count: int = 240, width: int = 20) -> Data:
    """Three labels per image, of which the last is always there."""
    rng = np.random.default_rng(3)
    feature = rng.normal(size=(count, 1, width)).astype(np.float16)
    seen = feature[:, 0, :2] + rng.normal(size=(count, 2)) > 0.5
    label = np.concatenate([seen, np.ones((count, 1))], 1).astype(np.uint8)
    split = count * 3 // 4
    return data_from_arrays(
        (feature[:split], label[:split]), (feature[split:], label[split:]), ["a", "b", "always"]
    )


def fit_logistic(
    data: Data, distributed: DistributedContext = DistributedContext(), **settings: Any
) -> TrainedHead:
    config = TrainConfig(head="logistic", **settings)
    trial = Trial(config=config, lr=0.0, train=data.train, valid=data.valid)
    return logistic.train(data, [trial], distributed)[0]


def feature_of(data: Data, rows: Rows) -> Rows:
    return data.feature.take(torch.from_numpy(rows)).double().numpy()


def probabilities(data: Data, head: TrainedHead, rows: Rows) -> Rows:
    state = {name: torch.from_numpy(value) for name, value in head.state.items()}
    width, classes = data.feature.shape[2], len(data.classes)
    with torch.inference_mode():
        logit = heads.restore_head("linear", width, classes, state)(
            torch.from_numpy(feature_of(data, rows)).float()
        )
    result: Rows = (logit.sigmoid() if data.multilabel else logit.softmax(1)).numpy()
    return result


def sklearn_probabilities(data: Data, l2: float, **settings: Any) -> Rows:
    """What scikit-learn says of the validation rows, with the same standardized features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(feature_of(data, data.train))
    model = LogisticRegression(C=1 / l2, max_iter=10000, tol=1e-9, **settings)
    model.fit(scaler.transform(feature_of(data, data.train)), data.label[data.train].numpy())
    result: Rows = model.predict_proba(scaler.transform(feature_of(data, data.valid)))
    return result


@pytest.mark.parametrize("l2", [100.0, 1.0, 0.1])
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("width", [12, 400])
def test_probabilities_equal_those_of_scikit_learn_for_a_given_l2(
    l2: float, classes: int, width: int
) -> None:
    data = gaussian_clusters(160, width, classes, 0.5)
    result = probabilities(data, fit_logistic(data, l2=l2), data.valid)
    assert np.abs(result - sklearn_probabilities(data, l2)).max() < 1e-3


def test_balanced_classes_weigh_as_in_scikit_learn() -> None:
    data = gaussian_clusters(200, 12, 4, 0.4)
    rare = (data.label[data.train] != 0).numpy() | (np.arange(len(data.train)) < 40)
    data = replace(data, train=data.train[rare])
    result = probabilities(data, fit_logistic(data, l2=1.0, class_weights="balanced"), data.valid)
    assert np.abs(result - sklearn_probabilities(data, 1.0, class_weight="balanced")).max() < 1e-3


def test_each_label_of_a_multi_label_task_is_a_separate_regression() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    data = multi_label_data()
    result = probabilities(data, fit_logistic(data, l2=2.0), data.valid)
    scaler = StandardScaler().fit(feature_of(data, data.train))
    for label in range(2):
        model = LogisticRegression(C=0.5, max_iter=10000, tol=1e-9)
        wanted = data.label[data.train].numpy()[:, label]
        model.fit(scaler.transform(feature_of(data, data.train)), wanted)
        other = model.predict_proba(scaler.transform(feature_of(data, data.valid)))[:, 1]
        assert np.abs(result[:, label] - other).max() < 1e-3
    assert (result[:, 2] > 0.99).all()
    assert np.isfinite(fit_logistic(data).epochs[0]["valid_loss"])


def test_multi_label_losses_are_means_over_labels() -> None:
    from sklearn.metrics import log_loss

    data = multi_label_data()
    result = fit_logistic(data)
    line = result.epochs[0]
    for name, rows in (("train_loss", data.train), ("valid_loss", data.valid)):
        actual, there = probabilities(data, result, rows), data.label[rows].numpy()
        each = [log_loss(there[:, at], actual[:, at], labels=[0, 1]) for at in range(3)]
        assert line[name] == pytest.approx(np.mean(each), abs=1e-4), name
    assert line["cv_loss"] == pytest.approx(line["valid_loss"], abs=0.15)
    assert line["train_loss"] < line["cv_loss"] < 0.6


def test_l2_is_chosen_by_cross_validated_loss() -> None:
    weak, strong = (
        fit_logistic(gaussian_clusters(400, 30, 2, 3.0)),
        fit_logistic(gaussian_clusters(400, 30, 2, 0.0)),
    )
    assert weak.l2 is not None
    assert strong.l2 is not None
    assert strong.l2 > 100 * weak.l2
    assert weak.epochs[0]["accuracy"] == 1
    assert strong.epochs[0]["cv_loss"] == pytest.approx(np.log(2), abs=0.03)


def test_a_rare_class_does_not_lead_to_too_much_regularization() -> None:
    """One in eleven is rare: as right, and as right per class, as with the best of four strengths
    to half a point. The loss at temperature 1 alone would choose one that finds fewer of it.
    """
    rng = np.random.default_rng(0)
    label = (np.arange(2530) % 11 == 0).astype(np.int64)
    way = rng.normal(size=600)
    feature = rng.normal(size=(2530, 600)) + 5 * label[:, None] * way / np.linalg.norm(way)
    rows = feature.astype(np.float16)[:, None]
    data = data_from_arrays((rows[:330], label[:330]), (rows[330:], label[330:]), ["often", "rare"])
    result = fit_logistic(data).epochs[0]
    fixed = [fit_logistic(data, l2=l2).epochs[0] for l2 in (100.0, 10.0, 1.0, 0.1)]
    for figure in ("accuracy", "balanced_accuracy"):
        assert result[figure] >= max(one[figure] for one in fixed) - 0.005, figure


def test_random_labels_give_low_confidence() -> None:
    data = gaussian_clusters(120, 500, 2, 0.0)
    result = probabilities(data, fit_logistic(data), data.valid)
    assert np.abs(result - 0.5).max() < 0.2


def test_separable_classes_have_finite_weights() -> None:
    data = gaussian_clusters(40, 300, 3, 30.0)
    result = fit_logistic(data)
    assert all(np.isfinite(value).all() for value in result.state.values())
    assert np.abs(result.state["2.weight"]).max() < 10
    assert result.epochs[0]["accuracy"] == 1


def test_constant_features_and_classes_of_one_image_are_accepted() -> None:
    rng = np.random.default_rng(0)
    feature = np.concatenate([rng.normal(size=(31, 5)), np.full((31, 3), 7.0)], 1)
    label = np.array([0] * 15 + [1] * 15 + [2])
    rows = feature.astype(np.float16)[:, None]
    data = data_from_arrays((rows, label), (rows[:30], label[:30]), ["a", "b", "once"])
    result = fit_logistic(data)
    assert (result.state["2.weight"][:, 5:] == 0).all()
    assert all(np.isfinite(value).all() for value in result.state.values())
    flat = data_from_arrays(
        (rows[:, :, 5:], label), (rows[:30, :, 5:], label[:30]), ["a", "b", "once"]
    )
    assert np.isfinite(fit_logistic(flat).epochs[0]["valid_loss"])
    assert np.isfinite(OutOfFold(flat).head_margins().margin[:30]).all()


def test_memory_mapped_features_give_the_same_head(monkeypatch: pytest.MonkeyPatch) -> None:
    data = gaussian_clusters(200, 40, 3, 0.3)
    full = feature_of(data, np.arange(200)).astype(np.float16)[:, None]
    parts = [full[:70], full[70:71], full[71:]]
    mapped = replace(data, feature=MemoryMappedFeatures(parts, np.arange(200), torch.device("cpu")))
    held = fit_logistic(data)
    monkeypatch.setattr(logistic, "MAX_CACHED_VALUES", 0)
    monkeypatch.setattr(logistic, "BLOCK_VALUES", 1 << 10)
    result = fit_logistic(mapped)
    assert result.l2 == held.l2
    for name, value in held.state.items():
        assert np.allclose(result.state[name], value, atol=1e-6), name


def test_repeated_views_do_not_change_the_head() -> None:
    data = gaussian_clusters(80, 10, 2, 0.5)
    once = feature_of(data, np.arange(80)).astype(np.float16)
    twice = replace(data, feature=type(data.feature)(torch.from_numpy(np.stack([once] * 2, 1))))
    first, second = fit_logistic(data), fit_logistic(twice)
    assert first.l2 == second.l2
    assert np.allclose(first.state["2.weight"], second.state["2.weight"], atol=1e-5)


def _worker(rank: int, folder: Path) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    meet = f"file://{folder}/met"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    for name, data in {
        "one": gaussian_clusters(151, 60, 4, 0.3),
        "several": multi_label_data(),
    }.items():
        result = fit_logistic(data, DistributedContext(rank, 2))
        np.savez(
            folder / f"{name}-{rank}.npz",
            l2=result.l2,
            loss=result.epochs[0]["cv_loss"],
            **result.state,
        )
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_train_the_same_head_as_one(tmp_path: Path) -> None:
    import torch.multiprocessing as processes

    processes.spawn(_worker, args=(tmp_path,), nprocs=2, join=True)
    for name, data in {
        "one": gaussian_clusters(151, 60, 4, 0.3),
        "several": multi_label_data(),
    }.items():
        alone = fit_logistic(data)
        first, second = (np.load(tmp_path / f"{name}-{rank}.npz") for rank in (0, 1))
        assert float(first["l2"]) == alone.l2
        assert float(first["loss"]) == pytest.approx(alone.epochs[0]["cv_loss"], abs=1e-9)
        for part, value in alone.state.items():
            assert (first[part] == second[part]).all()
            assert np.allclose(first[part], value, atol=1e-5), part


def test_settings_of_gradient_descent_are_refused_for_logistic_regression() -> None:
    refused: list[dict[str, Any]] = [{"rate": 0.1}, {"epochs": 3}, {"schedule": "cosine"}]
    for settings in (*refused, {"best": "accuracy"}, {"checkpoint_seconds": 60.0}):
        flag = next(iter(settings)).replace("_", "-")
        with pytest.raises(ConfigError, match=f"--{flag}"):
            TrainConfig(head="logistic", **settings)
    with pytest.raises(ConfigError, match="--l2"):
        TrainConfig(head="linear", l2=1.0)
    with pytest.raises(ConfigError, match="--grid"):
        Study(head=TrainConfig(head="logistic"), sweep=SweepConfig(grid="rate=0.1,1"))


def test_class_weights_match_validation_only_if_class_shares_clearly_differ() -> None:
    rare = np.array([0] * 200 + [1] * 20)
    assert resolve_class_weights(rare, np.array([0] * 100 + [1] * 100), 2) == "validation"
    assert resolve_class_weights(rare, np.array([0] * 50 + [1] * 5), 2) == "none"
    assert resolve_class_weights(rare, np.array([0] * 48 + [1] * 7), 2) == "none"
    assert resolve_class_weights(np.eye(2, dtype=np.uint8), np.eye(2, dtype=np.uint8), 2) == "none"


def test_class_weights_help_a_class_that_is_rare_in_training_only() -> None:
    data = gaussian_clusters(400, 200, 2, 0.15, seed=5)
    rare = (data.label[data.train] == 0).numpy() | (np.arange(len(data.train)) < 30)
    data = replace(data, train=data.train[rare])
    weighted, plain = fit_logistic(data), fit_logistic(data, class_weights="none")
    assert weighted.epochs[0]["balanced_accuracy"] > plain.epochs[0]["balanced_accuracy"] + 0.05


def test_settings_of_gradient_descent_select_a_linear_head_and_this_is_reported() -> None:
    store = Store(Path(__file__).parent / "written_before" / "store")
    settled, output = Study(head=TrainConfig(epochs=10)).resolve(store)
    assert settled.head.head == "linear"
    assert any("linear" in line and "--epochs" in line and "logistic" in line for line in output)
    settled, output = Study().resolve(store)
    assert settled.head.head == "logistic"
    assert not any(line.startswith("head:") for line in output)
