"""All that scoring needs, in one directory.

    bundle/
      bundle.json          format, task, recipe, classes, head, temperature, thresholds, metrics,
                           lineage, hashes
      weights.safetensors  body.* and head.*
      golden/              a few images, and the probabilities they gave where the bundle was made

Nothing in it can execute. It is saved whole or not at all, and checked when it is loaded.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import ConfigError, DataError, extract, shards
from arrowhead.decode import Pixels
from arrowhead.guard import GuardedDecoder
from arrowhead.model import Body
from arrowhead.shards import Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn

FORMAT = 2
TASKS = {
    "single-label": "An image is given the class with the largest softmax(logits / temperature).",
    "multi-label": "An image is given every label whose sigmoid(logit / temperature) is at or above"
    " its threshold; that may be none.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """One image kept for checking: its name in golden/, its bytes, its image id, what it gave."""

    name: str
    data: bytes
    feature: NDArray[np.float32]
    probabilities: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A classifier: how pixels are made (recipe), what sees them (body), what decides (head)."""

    recipe: Recipe
    classes: list[str]
    head: str
    """linear or lesson."""
    temperature: float
    """Logits are divided by it before the softmax or sigmoid."""
    multi: bool = False
    """Whether an image may have several labels, or none."""
    thresholds: list[float] | None = None
    """Of a multi-label bundle: the probability at which each of `classes` is given (None: 0.5)."""
    body_state: Mapping[str, torch.Tensor]
    head_state: Mapping[str, torch.Tensor]
    metrics: dict[str, Any]
    lineage: dict[str, Any]
    """Arrowhead's version, MLflow run id, digest of the data, and the like."""
    golden: Sequence[Golden] = ()

    def __post_init__(self) -> None:
        assert self.thresholds is None or (
            self.multi and len(self.thresholds) == len(self.classes)
        ), "a threshold for every label, and only where an image may have several"

    def given(self, probability_NC: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which labels these probabilities give each image, bool (N, C): one, or where it may have
        several those that reach their thresholds. A row that is not numbers is given none.
        """
        if self.multi:
            cut_C = np.array(self.thresholds or [0.5] * len(self.classes))
            several_NC: NDArray[np.bool_] = probability_NC >= cut_C
            return several_NC
        best_N1 = probability_NC.argmax(1)[:, None]
        one_NC: NDArray[np.bool_] = np.arange(len(self.classes)) == best_N1
        return one_NC & ~np.isnan(probability_NC)

    def make_head(self, device: str = "cpu") -> nn.Module:
        """The head, ready for inference: float32 (B, D) to logits (B, C)."""
        from arrowhead import heads

        head = heads.restore(self.head, self.recipe.width, len(self.classes), self.head_state)
        return head.to(device)

    def make_body(self, device: str = "cpu") -> Body:
        """The body, ready for inference."""
        recipe = self.recipe
        return Body(
            recipe.body,
            self.body_state,
            pool=recipe.pool,
            mean=recipe.mean,
            std=recipe.std,
            size=recipe.size,
            device=device,
        )


def probabilities(
    head: nn.Module, feature_ND: NDArray[Any], temperature: float, *, multi: bool = False
) -> NDArray[np.float32]:
    """float32 (N, C) from features of any float type: softmax(head(feature) / temperature), or its
    sigmoid where an image may have several labels.
    """
    import torch

    device = next(head.parameters()).device
    with torch.inference_mode(), one_thread():
        logits = head(torch.from_numpy(feature_ND.astype(np.float32)).to(device))
        cooled = logits / temperature
        chances = cooled.sigmoid() if multi else cooled.softmax(1)
        made: NDArray[np.float32] = chances.cpu().numpy()
    return made


@contextmanager
def one_thread() -> Iterator[None]:
    """A small matrix product whose last bits do not depend on how many threads share it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -------------------------------------------------------------------------------- saving


def save(bundle: Bundle, path: Path) -> str:
    """Write the bundle to `path`, whole or absent, in place of the bundle there; its fingerprint.

    Raises ConfigError if `path` holds something else.
    """
    import safetensors.torch

    if path.exists() and not (path / "bundle.json").is_file() and any(path.iterdir()):
        raise ConfigError(
            f"{path} holds files that are not a bundle's.",
            "a new or empty folder, or an older bundle to replace.",
            "give another folder.",
        )
    sketch = path.with_name(f".{path.name}.{os.getpid()}.draft")
    shutil.rmtree(sketch, ignore_errors=True)
    (sketch / "golden").mkdir(parents=True)
    tensors = {f"body.{name}": t.contiguous() for name, t in bundle.body_state.items()}
    tensors |= {f"head.{name}": t.contiguous() for name, t in bundle.head_state.items()}
    (sketch / "weights.safetensors").write_bytes(safetensors.torch.save(tensors))
    for golden in bundle.golden:
        (sketch / "golden" / golden.name).write_bytes(golden.data)
    shards.write_json(sketch / "golden" / "golden.json", [_plain(one) for one in bundle.golden])
    files = sorted(file for file in sketch.rglob("*") if file.is_file())
    content = {
        "format": FORMAT,
        "task": (task := "multi-label" if bundle.multi else "single-label"),
        "decision": TASKS[task],
        "recipe": dataclasses.asdict(bundle.recipe),
        "recipe_fingerprint": bundle.recipe.fingerprint,
        "classes": bundle.classes,
        "head": bundle.head,
        "temperature": bundle.temperature,
        "thresholds": _by_label(bundle),
        "metrics": bundle.metrics,
        "lineage": bundle.lineage,
        "sha256": {str(file.relative_to(sketch)): shards.sha256(file) for file in files},
    }
    shards.write_json(sketch / "bundle.json", content)
    _replace(sketch, path)
    return fingerprint(path)


def _by_label(bundle: Bundle) -> dict[str, float] | None:
    """The thresholds as a person reads them."""
    if not bundle.multi:
        return None
    cuts = bundle.thresholds or [0.5] * len(bundle.classes)
    return dict(zip(bundle.classes, cuts, strict=True))


def _plain(golden: Golden) -> dict[str, Any]:
    return {
        "name": golden.name,
        "feature": golden.feature.tolist(),
        "probabilities": golden.probabilities.tolist(),
    }


def _replace(sketch: Path, path: Path) -> None:
    """Put a finished directory in the place of another; the old one goes only afterwards."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        os.replace(path, old)
    os.replace(sketch, path)
    shutil.rmtree(old, ignore_errors=True)


def fingerprint(path: Path) -> str:
    """16 hex digits that stand for everything in the bundle."""
    return shards.sha256(path / "bundle.json")[:16]


# ------------------------------------------------------------------------------- loading


def load(path: Path) -> Bundle:
    """The bundle at `path`, every file compared with its hash.

    Raises ConfigError if there is no bundle, DataError if it is torn or of another format.
    """
    import safetensors.torch

    if not (path / "bundle.json").is_file():
        raise ConfigError(
            f"{path} is not a bundle: it has no bundle.json.",
            "a folder written by `arrowhead fit` or `arrowhead train`.",
            "check the path (fit writes OUT/bundle).",
        )
    content = shards.read_json(path / "bundle.json")
    if content.get("format") != FORMAT:
        raise DataError(
            f"{path} is a bundle of format {content.get('format')}.",
            f"format {FORMAT}.",
            "use the Arrowhead version that wrote it, or train again.",
        )
    for name, digest in content["sha256"].items():
        if not (path / name).is_file() or shards.sha256(path / name) != digest:
            raise DataError(
                f"{path / name} is not the file this bundle was saved with.",
                f"the bytes whose sha256 is {digest}.",
                "copy the bundle again from where it was made, or train again.",
            )
    tensors = safetensors.torch.load_file(path / "weights.safetensors")
    parts: dict[str, dict[str, torch.Tensor]] = {"body": {}, "head": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    classes, multi = content["classes"], content["task"] == "multi-label"
    return Bundle(
        recipe=Recipe.from_dict(content["recipe"], str(path)),
        classes=classes,
        head=content["head"],
        temperature=content["temperature"],
        multi=multi,
        thresholds=[content["thresholds"][name] for name in classes] if multi else None,
        body_state=parts["body"],
        head_state=parts["head"],
        metrics=content["metrics"],
        lineage=content["lineage"],
        golden=[_golden(path, one) for one in shards.read_json(path / "golden" / "golden.json")],
    )


def _golden(path: Path, one: Mapping[str, Any]) -> Golden:
    return Golden(
        name=one["name"],
        data=(path / "golden" / one["name"]).read_bytes(),
        feature=np.array(one["feature"], np.float32),
        probabilities=np.array(one["probabilities"], np.float32),
    )


# -------------------------------------------------------------------------------- golden


@dataclass(frozen=True, slots=True)
class Drift:
    """How far this machine is from the one that made the bundle.

    images: golden images replayed; feature: largest cosine distance of a feature (0: none);
    probability: largest change of a probability; changed: images whose labels differ.
    """

    images: int
    feature: float
    probability: float
    changed: int


def replay(bundle: Bundle, body: Body, head: nn.Module, device: str, threads: int) -> Drift:
    """Decode and score the golden images here and compare with what they gave at first."""
    if not bundle.golden:
        return Drift(0, 0.0, 0.0, 0)
    feature_ND = features(bundle.recipe, body, [one.data for one in bundle.golden], device, threads)
    before_ND = np.stack([one.feature for one in bundle.golden])
    before_NC = np.stack([one.probabilities for one in bundle.golden])
    now_NC = probabilities(head, feature_ND, bundle.temperature, multi=bundle.multi)
    norms = np.linalg.norm(feature_ND, axis=1) * np.linalg.norm(before_ND, axis=1)
    cosine = (feature_ND * before_ND).sum(1) / np.maximum(norms, 1e-12)
    # An image that cannot be decoded here is as far away as can be.
    lost = np.isnan(feature_ND).any(1)
    cosine[lost], now_NC[lost] = -1, 1 - before_NC[lost]
    changed = lost | (bundle.given(now_NC) != bundle.given(before_NC)).any(1)
    return Drift(
        images=len(bundle.golden),
        feature=float(max(0.0, 1 - cosine.min())),
        probability=float(np.abs(now_NC - before_NC).max()),
        changed=int(changed.sum()),
    )


def features(
    recipe: Recipe, body: Body, images: Sequence[bytes], device: str, threads: int
) -> NDArray[np.float32]:
    """float32 (N, D): clean features of a few images, NaN where one cannot be decoded."""
    with decoder(recipe, device, threads, max(16, len(images))) as decode:
        return seen(body, decode(images, [bytes(16)] * len(images)))


def decoder(recipe: Recipe, device: str, threads: int, batch_size: int) -> GuardedDecoder:
    """What makes the clean view of images, whatever views the recipe trained on."""
    clean = dataclasses.replace(recipe, views=1, augment="none", augment_seed=0)
    number = int(device.partition(":")[2] or 0) if "cuda" in device else None
    return GuardedDecoder(
        extract.pixels_of(clean), batch_size=batch_size, threads=threads, device=number
    )


def seen(body: Body, pixels: Pixels) -> NDArray[np.float32]:
    """float32 (N, D): the features of decoded images, NaN where there is a fault."""
    import torch

    view = torch.from_numpy(pixels.views[0]).permute(0, 3, 1, 2)
    out = body(view)[: len(pixels.faults)].cpu().numpy().astype(np.float16).astype(np.float32)
    out[[fault is not None for fault in pixels.faults]] = np.nan
    return out
