"""Fine-tuning: layer groups, the steps of a training, its restart, and the bundle that it gives."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from arrowhead.bundle import format as bundle_format
from arrowhead.cli.main import main
from arrowhead.errors import ConfigError
from arrowhead.features import backbone, networks
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.store import Store
from arrowhead.finetuning import global_batch, network
from arrowhead.finetuning import run as finetuning_run
from arrowhead.finetuning.augmentation import AugmentConfig
from arrowhead.finetuning.config import FinetuneConfig
from arrowhead.finetuning.global_batch import GlobalRows
from arrowhead.finetuning.network import BODY, HEAD, FinetuneNetwork
from arrowhead.finetuning.pixel_cache import PixelCache
from arrowhead.finetuning.run import Request
from arrowhead.finetuning.trainer import Finetuning, Plan, Samples
from arrowhead.runtime.worker import Worker
from arrowhead.training import comparison, heads
from arrowhead.training.batches import DistributedContext

BODY_FLAGS = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64"]
WIDTH = 1024  # of shufflenet_v2_x0_5


def start_tensors(body: str = "shufflenet_v2_x0_5", width: int = WIDTH) -> dict[str, torch.Tensor]:
    state = backbone.load(BodyConfig(body=body, weights="random"), 64).state
    head = heads.build_head("linear", width, 3).state_dict()
    return {f"{BODY}{n}": t for n, t in state.items()} | {f"{HEAD}{n}": t for n, t in head.items()}


def build(body: str = "shufflenet_v2_x0_5", width: int = WIDTH) -> FinetuneNetwork:
    recipe = {"body": body, "pool": "avg", "size": 64, "width": width}
    return FinetuneNetwork(recipe, "linear", 3, start_tensors(body, width), "cpu")


def samples(train: int, valid: int = 6) -> Samples:
    label = torch.arange(train + valid) % 3
    rows = np.arange(train + valid)
    return Samples(label=label, train=rows[:train], valid=rows[train:], classes=["a", "b", "c"])


# ----------------------------------------------------------------------------- the network


@pytest.mark.parametrize(
    ("body", "width", "first", "last"),
    [
        ("shufflenet_v2_x0_5", 1024, "conv1.0.weight", "conv5.1.bias"),
        ("resnet18", 512, "conv1.weight", "layer4.1.bn2.bias"),
        ("mobilenet_v2", 1280, "features.0.0.weight", "features.18.1.bias"),
    ],
)
def test_every_weight_is_in_one_group_from_the_first_layer_to_the_head(body, width, first, last):
    tuned = build(body, width)
    groups = tuned.layer_groups(3)
    names = tuned.names()
    listed = [[names[id(p)] for block in group for p in block.parameters] for group in groups]
    assert sorted(itertools.chain(*listed)) == sorted(names.values())
    assert listed[0][0] == BODY + first
    assert listed[1][-1] == BODY + last
    assert listed[2] == [f"{HEAD}2.weight", f"{HEAD}2.bias"]
    assert all(len(group) >= 3 for group in groups[:2])


def test_the_untrained_network_gives_the_logits_of_the_folded_body_and_its_head():
    tuned, tensors = build(), start_tensors()
    state = {n.removeprefix(BODY): t for n, t in tensors.items() if n.startswith(BODY)}
    body = backbone.Body(
        "shufflenet_v2_x0_5", state, pool="avg", mean=(0.0,) * 3, std=(1.0,) * 3, size=64
    )
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        logit = tuned.module(pixels.float() / 255)
        torch.testing.assert_close(logit, tuned.head(body(pixels)), rtol=1e-4, atol=1e-4)
    assert {n.removeprefix(BODY) for n in tuned.tensors() if n.startswith(BODY)} == state.keys()


def test_frozen_groups_keep_weights_and_statistics():
    tuned, config = build(), FinetuneConfig(epochs=1, freeze_to=1, batch_norm="train")
    before = {name: t.clone() for name, t in tuned.tensors().items()}
    groups = network.prepare(tuned, config)
    network.set_training(tuned, config)
    optimizer = torch.optim.SGD([{"params": one.parameters, "lr": 0.1} for one in groups])
    tuned.module(torch.rand(4, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    changed = {n for n, t in tuned.tensors().items() if not torch.equal(t, before[n])}
    assert not any(name.startswith(f"{BODY}conv1") for name in changed)
    assert f"{BODY}conv5.0.weight" in changed
    assert f"{BODY}conv5.1.running_mean" in changed
    assert f"{HEAD}2.weight" in changed


def test_rates_fall_from_the_head_to_the_first_layer_by_the_layer_decay():
    tuned = build()
    groups = network.prepare(tuned, FinetuneConfig(rates="1e-3,1e-2", layer_decay=0.5))
    rates = [group.lr for group in groups]
    assert rates[-1] == 1e-2
    body = sorted({group.lr for group in groups[:-2]})
    assert body[-1] == 1e-3
    np.testing.assert_allclose(np.array(body[1:]) / body[:-1], 2)
    assert {group.weight_decay for group in groups} == {0.0, 0.01}


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"rates": "1e-3,-1"}, "--rates"),
        ({"rates": "fast"}, "--rates"),
        ({"freeze_to": 3}, "--freeze-to"),
        ({"ema": 1.0}, "--ema"),
        ({"micro_batch": 1}, "--micro-batch"),
        ({"schedule": "cosine", "cycle_len": 2, "epochs": 3}, "--epochs"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_their_flag(settings, flag):
    with pytest.raises(ConfigError, match=flag):
        FinetuneConfig(**settings)


# -------------------------------------------------------------------------------- the steps


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("micro", [None, 10])
def test_every_image_is_in_one_step_of_an_epoch_on_one_worker(workers, micro):
    config = FinetuneConfig(batch_size=32, micro_batch=micro, epochs=2)
    alone = Plan(samples(101), config, DistributedContext())
    expected = [part.rows for part in alone.parts(1, 0)]
    plans = [Plan(samples(101), config, DistributedContext(r, workers)) for r in range(workers)]
    parts = [list(plan.parts(1, 0)) for plan in plans]
    assert len({len(one) for one in parts}) == 1
    assert sorted(np.concatenate(expected).tolist()) == list(range(101))
    by_step: dict[int, list[int]] = {}
    for ranks in zip(*parts, strict=True):
        together = np.concatenate([part.rows for part in ranks])
        assert sum(part.seen.count for part in ranks) == ranks[0].seen.total == len(together)
        assert all(part.first % 2 == 0 and part.seen.count for part in ranks)
        by_step.setdefault(ranks[0].step, []).extend(together.tolist())
    steps: dict[int, list[int]] = {}
    for part in alone.parts(1, 0):
        steps.setdefault(part.step, []).extend(part.rows.tolist())
    assert by_step == steps
    assert [part.step for part in plans[0].parts(1, 2)] == [
        part.step for part in parts[0] if part.step >= 2 + plans[0].steps_per_epoch
    ]


def test_workers_drop_what_one_worker_drops():
    x = torch.ones(10, 7)
    layers = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.2)).train()
    with global_batch.seen_by_layers(GlobalRows((1, 2), 0, 10, 10, 1)):
        whole = layers(x)
    halves = []
    for first, count in ((0, 6), (6, 4)):
        with global_batch.seen_by_layers(GlobalRows((1, 2), first, count, 10, 2)):
            halves.append(layers(x[first : first + count]))
    assert torch.equal(torch.cat(halves), whole)
    with global_batch.seen_by_layers(GlobalRows((1, 3), 0, 10, 10, 1)):
        assert not torch.equal(layers(x), whole)
    assert set(whole.unique().tolist()) == {0.0, 2.5}


# ---------------------------------------------------------------------------- the training


@pytest.fixture(scope="module")
def finetuned(image_folder, add_mlflow_db, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The folder of a command that fine-tuned a small network on drawn images, and its result."""
    folder = add_mlflow_db(tmp_path_factory.mktemp("finetuned"))
    return folder, run(folder, result_words(image_folder, folder))


def result_words(image_folder: Path, folder: Path) -> list[str]:
    """The command of `finetuned`."""
    words = ["finetune", str(image_folder), str(folder / "out"), *BODY_FLAGS, "--epochs", "2"]
    words += ["--rates", "1e-6,1e-5,1e-3", "--batch-size", "16", "--ema", "0.9"]
    return [*words, "--views", "2", "--no-report"]


def run(folder: Path, words: list[str]) -> dict[str, Any]:
    """The result of a command, run in a folder."""
    import contextlib
    import io
    import os

    out, before = io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit_info:
            main([*words, "--json"])
    finally:
        os.chdir(before)
    assert exit_info.value.code == 0
    result: dict[str, Any] = json.loads(out.getvalue())
    return result


def test_the_better_bundle_is_kept_and_both_figures_are_given(finetuned):
    folder, result = finetuned
    kept = bundle_format.load(folder / "out" / "bundle")
    assert kept.metrics["accuracy"] == result[result["better"]]["accuracy"]
    brier = result["brier"]
    assert brier["gain"] == pytest.approx(brier["frozen"] - brier["tuned"])
    assert (result["better"] == "tuned") == (brier["gain"] > 0 and brier["p"] < 0.05)
    tuned = bundle_format.load(Path(result["tuned_bundle"]))
    assert tuned.metrics["accuracy"] == result["tuned"]["accuracy"]
    assert tuned.lineage["training"]["rates"] == [1e-6, 1e-5, 1e-3]
    assert len(result["epochs"]) == 2
    assert not list((folder / "out" / ".bundle.training").glob("finetune-*"))


def test_the_same_command_after_success_trains_nothing(finetuned, image_folder):
    folder, result = finetuned
    weights = Path(result["body"]).stat().st_mtime_ns
    again = run(folder, result_words(image_folder, folder))
    assert again["done_before"] and again["tuned"] == result["tuned"]
    assert Path(result["body"]).stat().st_mtime_ns == weights


def test_augmented_views_of_the_tuned_body_are_calibrated_and_averaged(finetuned, image_folder):
    folder, result = finetuned
    tuned = bundle_format.load(Path(result["tuned_bundle"]))
    assert [entry["views"] for entry in tuned.lineage["tta"]] == [1]
    words = ["evaluate", result["tuned_bundle"], str(image_folder), "checked", "--tta", "1"]
    checked = run(folder, [*words, "--split", "valid"])
    expected = tuned.lineage["tta"][0]["metrics"]
    assert checked["metrics"]["accuracy"] == pytest.approx(expected["accuracy"])


def test_a_pixel_cache_that_will_not_fit_is_refused_before_a_head_is_trained(
    image_folder, tmp_path, capsys
):
    words = ["finetune", str(image_folder), str(tmp_path / "out"), *BODY_FLAGS]
    with pytest.raises(SystemExit) as exit_info:
        main([*words, "--cache-bytes", "1000"])
    assert exit_info.value.code == 2
    assert "--cache-bytes" in capsys.readouterr().err
    assert not (tmp_path / "out" / "frozen").exists()


def test_certain_gains_are_told_from_chance_image_by_image():
    label = np.arange(60) % 3
    prob = np.full((60, 3), 0.2)
    prob[np.arange(60), label] = 0.6
    better = prob.copy()
    better[np.arange(60), label] += 0.05 * np.where(np.arange(60) % 10 < 7, 1, -1)
    gain = comparison.brier_by_image(prob, label) - comparison.brier_by_image(better, label)
    assert gain.mean() > 0 and comparison.paired_p_value(gain) < 0.05
    assert comparison.paired_p_value(gain[:8]) > 0.05


@pytest.mark.slow
def test_fit_with_finetune_is_fit_and_then_finetune_in_one_run(finetuned, image_folder, tmp_path):
    folder, _ = finetuned
    words = ["fit", str(image_folder), str(tmp_path / "out"), *BODY_FLAGS, "--finetune"]
    words += ["--no-report"]
    result = run(folder, words)
    assert Path(result["tuned_store"]) == tmp_path / "out" / "store.tuned"
    assert (tmp_path / "out" / "store" / "manifest.json").is_file()
    assert bundle_format.load(tmp_path / "out" / "bundle").metrics == result["metrics"]
    assert run(folder, words)["done_before"]


def test_the_tuned_body_is_a_file_of_weights_with_its_origin(finetuned):
    folder, result = finetuned
    body = Path(result["body"])
    weights = backbone.load(BodyConfig(body="shufflenet_v2_x0_5", weights=str(body)), 64)
    frozen = bundle_format.load(folder / "out" / "frozen" / "bundle")
    store = Store(Path(result["tuned_store"]))
    assert weights.state.keys() == frozen.body_state.keys()
    assert store.recipe.weights == weights.sha256 != frozen.recipe.weights
    assert networks.read_origin(body)["base_weights"] == frozen.recipe.weights
    assert store.weights_origin["source"].startswith("fine-tuned from ")
    assert dataclasses.replace(store.recipe.single_view(), weights="") == dataclasses.replace(
        frozen.recipe, weights=""
    )


@pytest.fixture
def training(finetuned, tmp_path) -> Any:
    """A function that begins a training on the cache of the command."""
    cache = PixelCache(finetuned[0] / "out" / "pixels")
    recipe = Store(finetuned[0] / "out" / "frozen" / "store").recipe

    def begin(**settings: Any) -> Finetuning:
        augment = AugmentConfig(**settings.pop("augment", {}))
        config = FinetuneConfig(epochs=2, rates="1e-6,1e-5,1e-3", **settings)
        request = Request(
            recipe=recipe,
            architecture="linear",
            classes=tuple(cache.classes),
            config=config,
            augment=augment,
            start="",
        )
        worker = Worker(0, 1, "cpu", 2, lambda: None, lambda report: None)
        return finetuning_run.make_training(
            worker, cache, finetuning_run.load_samples(cache, request), build(), request
        )

    return begin


def written(state: Any) -> tuple[bytes, str]:
    """A state as a checkpoint holds it."""
    tensors, facts = state
    copies = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(copies), json.dumps(facts)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 16, "ema": 0.9, "best": "accuracy", "augment": {"mixup": 0.2}},
        {"batch_size": 16, "optimizer": "sgd", "batch_norm": "train", "smoothing": 0.1},
    ],
    ids=["adamw", "sgd"],
)
def test_a_training_stopped_between_two_steps_ends_with_the_same_bits(training, settings):
    states: list[Any] = []
    calm = training(**settings)
    while not calm.finished:
        calm.train(lambda one: states.append((one.step, written(one.save()))))
    for step, (data, facts) in (states[1], states[len(states) // 2], states[-2]):
        resumed = training(**settings)
        resumed.load(safetensors.torch.load(data), json.loads(facts))
        assert resumed.step == step
        while not resumed.finished:
            resumed.train(lambda one: None)
        assert resumed.history == calm.history
        expected = calm.result()
        assert all(torch.equal(t, expected[name]) for name, t in resumed.result().items())


def test_parts_of_a_step_give_its_gradient(training):
    whole, parts = training(batch_size=24, clip=0.0), training(batch_size=24, micro_batch=8)
    for one in (whole, parts):
        one.train(lambda _: None)
    assert parts.history[0] == pytest.approx(whole.history[0], rel=1e-3, abs=1e-4)


def test_a_lack_of_memory_says_which_flag_helps_or_halves_the_parts(
    finetuned, image_folder, tmp_path, monkeypatch, capsys
):
    folder, _ = finetuned
    original = FinetuneNetwork.__init__

    def with_little_memory(self: FinetuneNetwork, *args: Any) -> None:
        original(self, *args)

        def check(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            if len(inputs[0]) > 8:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        self.module.register_forward_pre_hook(check)

    monkeypatch.setattr(FinetuneNetwork, "__init__", with_little_memory)
    words = ["finetune", str(image_folder), "again", "--from", "out/frozen/bundle", "--epochs", "1"]
    words += ["--rates", "1e-5", "--no-report"]
    result = run(folder, words)
    said = capsys.readouterr().err
    assert result["micro_batch"] == 8
    assert "--micro-batch 16" in said and "--micro-batch 8" in said
    assert "steps still have 32" in said
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as exit_info:
        main([*words, "--batch-size", "16"])
    assert exit_info.value.code == 2
    assert "add --micro-batch 8" in capsys.readouterr().err


def test_labels_that_were_corrected_are_trained_on_and_recorded(
    finetuned, image_folder, tmp_path, monkeypatch, capsys
):
    folder, _ = finetuned
    monkeypatch.chdir(folder)
    frozen = tmp_path / "frozen"
    shutil.copytree(folder / "out" / "frozen", frozen)
    wrong = min(path for path in Store(frozen / "store").read_catalog()["paths"] if "beads" in path)
    (tmp_path / "fixes.csv").write_text(f"path,new_label\n{wrong},leaves\n")
    with pytest.raises(SystemExit) as exit_info:
        main(["relabel", str(frozen / "store"), str(tmp_path / "fixes.csv")])
    assert exit_info.value.code == 0
    words = ["finetune", str(image_folder), str(tmp_path / "out"), "--epochs", "1", "--no-report"]
    result = run(folder, [*words, "--from", str(frozen / "bundle")])
    assert f"corrected in {frozen / 'store'} are used" in capsys.readouterr().err
    cache = PixelCache(tmp_path / "out" / "pixels")
    catalog = Store(Path(result["tuned_store"])).read_catalog()
    row = catalog["paths"].index(wrong)
    assert catalog["labels"][row] == ("leaves",)
    assert cache.classes[cache.label[cache.rows.tolist().index(row)]] == "leaves"
    tuned = bundle_format.load(Path(result["tuned_bundle"]))
    assert tuned.lineage["corrections"] == [1]


def test_other_classes_are_refused_before_anything_is_decoded(finetuned, image_folder, tmp_path):
    folder, _ = finetuned
    rows = [
        f"{path},other {path.parent.name},{path.parent.parent.name}"
        for path in sorted(image_folder.glob("[tv]*/*/*"))
    ]
    (tmp_path / "others.csv").write_text("\n".join(["path,label,split", *rows]))
    words = ["finetune", str(tmp_path / "others.csv"), str(tmp_path / "out")]
    with pytest.raises(SystemExit) as exit_info:
        main([*words, "--from", str(folder / "out" / "frozen" / "bundle")])
    assert exit_info.value.code == 2
    assert not (tmp_path / "out" / "pixels").exists()


def test_a_training_that_diverges_is_refused_with_lower_rates(finetuned, image_folder, capsys):
    folder, _ = finetuned
    words = ["finetune", str(image_folder), str(folder / "far"), "--epochs", "1", "--rates", "900"]
    with pytest.raises(SystemExit) as exit_info:
        main([*words, "--from", str(folder / "out" / "frozen" / "bundle")])
    assert exit_info.value.code == 2
    assert "--rates 90" in capsys.readouterr().err


# ------------------------------------------------------------------------------- in Python


@pytest.mark.slow
def test_the_lessons_calls_unfreeze_and_train_by_layer_groups(image_folder, tmp_path, monkeypatch):
    from arrowhead import Images, Learner

    monkeypatch.chdir(tmp_path)
    images = Images.from_folder(image_folder)
    learn = Learner("shufflenet_v2_x0_5", images, head="linear", weights="random", size=64)
    learn.fit(0.01, 1)
    frozen = learn.store.recipe.weights
    learn.unfreeze()
    before = {name: value.copy() for name, value in learn._trained.state.items()}
    curve = learn.lr_find(steps=20, seeds=1, high=1e-2)
    assert np.isfinite(curve.losses[0, :5]).all()
    assert learn.store.recipe.weights == frozen
    assert all(np.array_equal(value, before[n]) for n, value in learn._trained.state.items())
    learn.freeze_to(1)
    history = learn.fit([1e-6, 1e-5, 1e-4], 2, cycle_len=1, cycle_mult=2)
    assert [one["epoch"] for one in history] == [0, 1, 2]
    assert learn.store.recipe.weights != frozen
    assert learn.predict().shape == (18, 3)
    assert learn.save("bundle")["images"] == 18
    learn.freeze()
    assert len(learn.fit(0.01, 2)) == 2
