"""All that scoring needs, in one directory.

    bundle/
      bundle.json          format, task, recipe, classes, head, temperature, thresholds, metrics,
                           novelty, lineage, hashes; sealed
      weights.safetensors  body.*, head.* and novelty.*
      images.safetensors   train, valid: which images it was made of, 8 bytes of a hash of each
      golden/              a few images, and the probabilities they gave where the bundle was made
      report/              figures and tables for people; no hash covers them, nothing reads them

Nothing in it can execute. It is saved whole or not at all, and checked when it is loaded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import fileio, output_paths
from arrowhead.bundle.known_images import KnownImages
from arrowhead.errors import ConfigError, DataError
from arrowhead.evaluation.novelty import NoveltyDetector
from arrowhead.features import store_format
from arrowhead.features.backbone import Body
from arrowhead.features.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn


FORMAT = 3
REPORT = "report"
IMAGES = "images.safetensors"
BUNDLE_SHAPE = {
    "task": str,
    "recipe": dict,
    "classes": [str],
    "head": str,
    "temperature": lambda value: isinstance(value, int | float) and 0 < value < math.inf,
    "thresholds": ({str: float}, None),
    "metrics": dict,
    "lineage": dict,
    "sha256": {
        "weights.safetensors": store_format.SHA256,
        "golden/golden.json": store_format.SHA256,
    },
}
GOLDEN = [{"name": str, "feature": [float], "probabilities": [float]}]
PARTS = {"body", "head", "novelty"}
MEND = "copy the bundle again from where it was made, or train again."
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
    novelty: NoveltyDetector | None = None
    images: KnownImages | None = None
    """Which images it was trained on and validated with; None where it does not say (0.1.0)."""
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
            threshold_C = np.array(self.thresholds or [0.5] * len(self.classes))
            several_NC: NDArray[np.bool_] = probability_NC >= threshold_C
            return several_NC
        best_N1 = probability_NC.argmax(1)[:, None]
        one_NC: NDArray[np.bool_] = np.arange(len(self.classes)) == best_N1
        return one_NC & ~np.isnan(probability_NC)

    def margin(self, probability_NC: NDArray[np.float32]) -> NDArray[np.float64]:
        """How far these probabilities are from giving other labels, (N,)."""
        if self.multi:
            threshold_C = np.array(self.thresholds or [0.5] * len(self.classes))
            nearest_N: NDArray[np.float64] = np.abs(probability_NC - threshold_C).min(1)
            return nearest_N
        best_N2 = np.sort(probability_NC.astype(np.float64), 1)[:, -2:]
        ahead_N: NDArray[np.float64] = best_N2[:, 1] - best_N2[:, 0]
        return ahead_N

    def make_head(self, device: str = "cpu") -> nn.Module:
        """The head, ready for inference: float32 (B, D) to logits (B, C)."""
        from arrowhead.training import heads

        with _fitting("head"):
            head = heads.restore(self.head, self.recipe.width, len(self.classes), self.head_state)
        return head.to(device)

    def make_body(self, device: str = "cpu") -> Body:
        """The body, ready for inference."""
        recipe = self.recipe
        with _fitting("body"):
            body = Body(
                recipe.body,
                self.body_state,
                pool=recipe.pool,
                mean=recipe.mean,
                std=recipe.std,
                size=recipe.size,
                device=device,
            )
        if body.width != recipe.width:
            raise _torn(f"the body gives {body.width} numbers, its recipe says {recipe.width}")
        return body


@contextmanager
def _fitting(part: str) -> Iterator[None]:
    """Tensors of other names or shapes than bundle.json speaks of are damage."""
    try:
        yield
    except RuntimeError as error:  # torch's word for both
        words = " ".join(str(error).split())[:300]
        raise _torn(f"the tensors of the {part} do not fit it: {words}") from error


def _torn(what: str) -> DataError:
    return DataError(
        f"The bundle is not whole: {what}.",
        "a bundle as `arrowhead fit` or `arrowhead train` writes it.",
        MEND,
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
        probability_counts = cooled.sigmoid() if multi else cooled.softmax(1)
        made: NDArray[np.float32] = probability_counts.cpu().numpy()
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


def must_be_replaceable(path: Path) -> None:
    """ConfigError if a bundle cannot be saved to `path`, because it holds something else."""
    if path.exists() and not (path / "bundle.json").is_file():
        if path.is_dir():
            here = fileio.is_here(path)  # it is filled, and what MLflow and we keep in it stays
            if all(here and output_paths.unasked(one.name) for one in path.iterdir()):
                return
        raise ConfigError(
            f"{path} holds files that are not a bundle's."
            if path.is_dir()
            else f"{path} is a file.",
            "a new or empty folder, or an older bundle to replace.",
            "give another folder.",
        )


@contextmanager
def saving(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """A folder to `write` a bundle into, which becomes `path` at the end, or nothing does.

    What a person should find beside the bundle goes into its folder REPORT: no hash covers that.
    The bundle that is there is replaced; it becomes `previous`, if that is given. Raises
    ConfigError if `path` holds something else, or when the disk is full.
    """
    must_be_replaceable(path)
    with fileio.draft_folder(path, previous) as folder:
        (folder / REPORT).mkdir()
        yield folder
        if not any((folder / REPORT).iterdir()):
            (folder / REPORT).rmdir()
        if not (folder / "bundle.json").is_file():
            raise AssertionError("no bundle was written")


def save(bundle: Bundle, path: Path, previous: Path | None = None) -> str:
    """Write the bundle to `path` as `saving` does, with nothing beside it; its fingerprint."""
    with saving(path, previous) as folder:
        write(bundle, folder)
    return fingerprint(path)


def write(bundle: Bundle, folder: Path) -> None:
    """Write the bundle's files into a folder of `saving`."""
    import safetensors.numpy
    import safetensors.torch

    (folder / "golden").mkdir()
    tensors = {f"body.{name}": t.contiguous() for name, t in bundle.body_state.items()}
    tensors |= {f"head.{name}": t.contiguous() for name, t in bundle.head_state.items()}
    if bundle.novelty:
        kept = bundle.novelty.tensors().items()
        tensors |= {f"novelty.{name}": t.contiguous() for name, t in kept}
    (folder / "weights.safetensors").write_bytes(safetensors.torch.save(tensors))
    listed = []
    if bundle.images:
        listed = [folder / IMAGES]
        listed[0].write_bytes(safetensors.numpy.save(bundle.images.tensors()))
    for golden in bundle.golden:
        (folder / "golden" / golden.name).write_bytes(golden.data)
    fileio.write_json(folder / "golden" / "golden.json", [_plain(one) for one in bundle.golden])
    files = [folder / "weights.safetensors", *listed, *sorted((folder / "golden").iterdir())]
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
        "novelty": bundle.novelty and bundle.novelty.summary(),
        "metrics": bundle.metrics,
        "lineage": bundle.lineage,
        "sha256": {str(file.relative_to(folder)): fileio.sha256(file) for file in files},
    }
    fileio.write_sealed(folder / "bundle.json", content)


def _by_label(bundle: Bundle) -> dict[str, float] | None:
    """The thresholds as a person reads them."""
    if not bundle.multi:
        return None
    thresholds = bundle.thresholds or [0.5] * len(bundle.classes)
    return dict(zip(bundle.classes, thresholds, strict=True))


def _plain(golden: Golden) -> dict[str, Any]:
    return {
        "name": golden.name,
        "feature": golden.feature.tolist(),
        "probabilities": golden.probabilities.tolist(),
    }


def fingerprint(path: Path) -> str:
    """16 hex digits that stand for everything in the bundle."""
    return fileio.sha256(path / "bundle.json")[:16]


# ------------------------------------------------------------------------------- loading


def read(path: Path) -> dict[str, Any]:
    """What bundle.json says, every file it names compared with its hash.

    Raises ConfigError if there is no bundle, DataError if it is torn or of another format.
    """
    fileio.recover(path)
    if not (path / "bundle.json").is_file():
        raise no_bundle(str(path))
    output_paths.must_be_text(path)
    content = read_content(path / "bundle.json", str(path))
    for name, digest in content["sha256"].items():
        must_be_file(path / name, digest, f"{path / name}")
    return content


def no_bundle(where: str) -> ConfigError:
    """The refusal where there is no bundle."""
    return ConfigError(
        f"{where} is not a bundle: it has no bundle.json.",
        "a folder written by `arrowhead fit` or `arrowhead train`.",
        "check the path (fit writes OUT/bundle).",
    )


def read_content(file: Path, where: str) -> dict[str, Any]:
    """What bundle.json says. where: the bundle, in words."""
    content = fileio.read_sealed(
        file, FORMAT, upgrade="train again", repair=MEND, name=f"{where}/bundle.json"
    )
    fileio.must_fit(content, BUNDLE_SHAPE, f"{where}/bundle.json", MEND)
    for name, digest in content["sha256"].items():
        fileio.must_fit(digest, store_format.SHA256, f"{where}/bundle.json", MEND)
        if not _inside(name):
            raise DataError(
                f"{where} names a file outside of itself: {name!r}.",
                "names of files in the bundle's own folder.",
                "do not use it; ask where it comes from.",
            )
    return content


def must_be_file(file: Path, digest: str, where: str) -> None:
    """DataError unless the file has this sha256."""
    if not file.is_file() or fileio.sha256(file) != digest:
        raise DataError(
            f"{where} is not the file this bundle was saved with.",
            f"the bytes whose sha256 is {digest}.",
            MEND,
        )


def _inside(name: str) -> bool:
    """Whether a name that a bundle gives is one that `save` gives: no way out of the folder."""
    folder, _, leaf = name.rpartition("/")
    fine = name.isprintable() and "\\" not in name
    return fine and folder in ("", "golden") and leaf not in ("", ".", "..")


def load(path: Path) -> Bundle:
    """The bundle at `path`, checked as `read` does, and that its parts are of one piece."""
    import safetensors.torch
    from safetensors import SafetensorError

    content = read(path)
    try:
        tensors = safetensors.torch.load_file(path / "weights.safetensors")
    except (OSError, SafetensorError) as error:
        raise _torn(f"{path / 'weights.safetensors'} cannot be read: {error}") from error
    parts: dict[str, dict[str, torch.Tensor]] = {name: {} for name in PARTS}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part not in PARTS:
            raise _torn(f"weights.safetensors holds {name!r}, which belongs to no part of it")
        parts[part][rest] = tensor
    recipe = Recipe.from_dict(content["recipe"], str(path))
    classes, multi = content["classes"], content["task"] == "multi-label"
    if content["task"] not in TASKS or (multi and content["thresholds"].keys() != set(classes)):
        raise _torn(f"{path / 'bundle.json'} is of no task this version knows, or lacks thresholds")
    return Bundle(
        recipe=recipe,
        classes=classes,
        head=content["head"],
        temperature=content["temperature"],
        multi=multi,
        thresholds=[content["thresholds"][name] for name in classes] if multi else None,
        body_state=parts["body"],
        head_state=parts["head"],
        metrics=content["metrics"],
        lineage=content["lineage"],
        novelty=_novelty(parts["novelty"], recipe.width),
        images=_images(path) if IMAGES in content["sha256"] else None,
        golden=list(_golden(path, recipe.width, len(classes))),
    )


def _images(path: Path) -> KnownImages:
    import safetensors.numpy
    from safetensors import SafetensorError

    try:
        return KnownImages.from_tensors(safetensors.numpy.load_file(path / IMAGES))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _torn(f"{path / IMAGES} cannot be read: {error}") from error


def _novelty(tensors: Mapping[str, torch.Tensor], width: int) -> NoveltyDetector | None:
    if not tensors:
        return None
    try:
        found = NoveltyDetector.from_tensors(tensors)
    except KeyError as error:
        raise _torn(f"it lacks novelty.{error.args[0]}") from error
    sizes = [tuple(one.shape) for one in (found.mean, found.deviation, found.bank[:1])]
    if sizes != [(width,), (width,), (1, width)] or found.known.dim() != 1:
        raise _torn(f"the tensors of novelty are not of features of {width} numbers")
    return found


def _golden(path: Path, width: int, classes: int) -> Iterator[Golden]:
    kept, named = _golden_document(path), read_content(path / "bundle.json", str(path))["sha256"]
    for one in kept:
        if f"golden/{one['name']}" not in named:
            raise _torn(f"golden.json names {one['name']!r}, which is not one of its images")
        feature = np.array(one["feature"], np.float32)
        chance = np.array(one["probabilities"], np.float32)
        if (feature.shape, chance.shape) != ((width,), (classes,)):
            raise _torn("golden.json is of another recipe or other classes")
        data = (path / "golden" / one["name"]).read_bytes()
        yield Golden(name=one["name"], data=data, feature=feature, probabilities=chance)


def _golden_document(path: Path) -> list[dict[str, Any]]:
    file = path / "golden" / "golden.json"
    kept: list[dict[str, Any]] = fileio.read_json(file)
    fileio.must_fit(kept, GOLDEN, str(file), MEND)
    return kept


def info(path: Path) -> dict[str, Any]:
    """What a bundle is, for a person: bundle.json without its hashes, its fingerprint and size."""
    content = read(path)
    names = ["bundle.json", *content.pop("sha256")]
    return content | {
        "bundle": str(path),
        "fingerprint": fingerprint(path),
        "bytes": sum((path / name).stat().st_size for name in names),
        "golden_images": len(_golden_document(path)),
    }
