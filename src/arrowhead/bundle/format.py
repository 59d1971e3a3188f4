"""The bundle, a directory with everything that scoring needs: save, load and check it.

    bundle/
      bundle.json          format, task, recipe, classes, head, temperature, thresholds, metrics,
                           novelty, lineage, hashes; sealed
      weights.safetensors  body.*, head.* and novelty.*
      images.safetensors   train, valid: 8 bytes of the hash of each training and validation image
      golden/              a few images, with the features and probabilities they gave on the
                           machine that built the bundle
      report/              figures and tables for people; not hashed, and never read back

A bundle holds no code. It is written atomically, and its hashes are checked when it is loaded.
"""

from __future__ import annotations

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
from arrowhead.data import remote_folder
from arrowhead.errors import ConfigError, DataError
from arrowhead.evaluation.novelty import NoveltyDetector
from arrowhead.features import store_format
from arrowhead.features.backbone import Body
from arrowhead.features.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn


FORMAT = 3
REPORT_FOLDER = "report"
KNOWN_IMAGES_FILE = "images.safetensors"
BUNDLE_SCHEMA = {
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
GOLDEN_SCHEMA = [{"name": str, "feature": [float], "probabilities": [float]}]
TENSOR_GROUPS = {"body", "head", "novelty"}
REPAIR = "copy the bundle again from where it was made, or train again."
TASKS = {
    "single-label": "An image is given the class with the largest softmax(logits / temperature).",
    "multi-label": "An image is given every label whose sigmoid(logit / temperature) is at or above"
    " its threshold; that may be none.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenImage:
    """An image to check other machines with.

    name: of the file in golden/; data: the encoded image; feature: float32 (D,); probabilities:
    float32 (C,), calibrated.
    """

    name: str
    data: bytes
    feature: NDArray[np.float32]
    probabilities: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A classifier: a recipe for pixels and features, the weights of body and head, calibration."""

    recipe: Recipe
    classes: list[str]
    head: str
    """linear or lesson."""
    temperature: float
    """The logits are divided by it before the softmax or sigmoid."""
    multi: bool = False
    """Whether an image may have several labels, or none."""
    thresholds: list[float] | None = None
    """Multi-label only: each of `classes` is predicted from this probability on (None: 0.5)."""
    body_state: Mapping[str, torch.Tensor]
    head_state: Mapping[str, torch.Tensor]
    metrics: dict[str, Any]
    lineage: dict[str, Any]
    """Arrowhead's version, the MLflow run id, a digest of the data, and so on."""
    novelty: NoveltyDetector | None = None
    known_images: KnownImages | None = None
    """The training and validation images; None in bundles of version 0.1.0."""
    golden: Sequence[GoldenImage] = ()

    def __post_init__(self) -> None:
        assert self.thresholds is None or (
            self.multi and len(self.thresholds) == len(self.classes)
        ), "only a multi-label bundle has thresholds, one for every class"

    @property
    def weights_sentence(self) -> str:
        """Where the body's weights come from, and their license."""
        origin = self.lineage.get("weights") or {}
        source, license = origin.get("source", "not recorded"), origin.get("license", "unknown")
        return f"{source}, license {license}"

    def predict_labels(self, probability_NC: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Decide on labels, bool (N, C).

        One label: the class with the highest probability. Multi-label: every class whose
        probability reaches its threshold. A row of NaN gets no label.
        """
        if self.multi:
            reached_NC: NDArray[np.bool_] = probability_NC >= self._threshold_C()
            return reached_NC
        best_N1 = probability_NC.argmax(1)[:, None]
        is_best_NC: NDArray[np.bool_] = np.arange(len(self.classes)) == best_N1
        return is_best_NC & ~np.isnan(probability_NC)

    def margin(self, probability_NC: NDArray[np.float32]) -> NDArray[np.float64]:
        """How far the probabilities are from a change of label, float64 (N,).

        One label: between the two most probable classes. Multi-label: to the nearest threshold.
        """
        if self.multi:
            nearest_N: NDArray[np.float64] = np.abs(probability_NC - self._threshold_C()).min(1)
            return nearest_N
        best_N2 = np.sort(probability_NC.astype(np.float64), 1)[:, -2:]
        margin_N: NDArray[np.float64] = best_N2[:, 1] - best_N2[:, 0]
        return margin_N

    def _threshold_C(self) -> NDArray[np.float64]:
        return np.array(self.thresholds or [0.5] * len(self.classes))

    def make_head(self, device: str = "cpu") -> nn.Module:
        """The head, ready for inference: float32 (B, D) to logits (B, C)."""
        from arrowhead.training import heads

        with _shape_errors_as_damage("head"):
            head = heads.restore_head(
                self.head, self.recipe.width, len(self.classes), self.head_state
            )
        return head.to(device)

    def make_body(self, device: str = "cpu") -> Body:
        """The body, ready for inference."""
        recipe = self.recipe
        with _shape_errors_as_damage("body"):
            body = Body(
                recipe.body,
                self.body_state,
                pool=recipe.pool,
                mean=recipe.mean,
                std=recipe.std,
                size=recipe.size,
                precision=recipe.body_precision,
                device=device,
            )
        if body.width != recipe.width:
            raise _damaged(
                f"the features of its body have {body.width} numbers, its recipe says"
                f" {recipe.width}"
            )
        return body


@contextmanager
def _shape_errors_as_damage(part: str) -> Iterator[None]:
    """Raise DataError if tensors do not have the names and shapes that bundle.json implies."""
    try:
        yield
    except RuntimeError as error:  # what `load_state_dict` raises for both
        message = " ".join(str(error).split())[:300]
        raise _damaged(f"the tensors of the {part} do not fit: {message}") from error


def _damaged(reason: str) -> DataError:
    return DataError(
        f"The bundle is damaged: {reason}.",
        "a bundle that `arrowhead fit` or `arrowhead train` wrote.",
        REPAIR,
    )


def probabilities(
    head: nn.Module, feature: NDArray[Any], temperature: float, *, multi: bool = False
) -> NDArray[np.float32]:
    """Calibrated probabilities of the classes, float32 (N, C).

    Args:
        head: From float32 features (N, D) to logits (N, C).
        feature: Features (N, D) of any float type, or (N, V, D) to average the logits of V views.
        temperature: Divides the logits.
        multi: Sigmoid instead of softmax.
    """
    import torch

    device = next(head.parameters()).device
    with torch.inference_mode(), single_thread():
        rows = torch.from_numpy(feature.astype(np.float32)).to(device)
        logit = head(rows.flatten(0, -2)) / temperature
        logit_NC = logit.unflatten(0, rows.shape[:2]).mean(1) if rows.dim() == 3 else logit
        prob_NC = logit_NC.sigmoid() if multi else logit_NC.softmax(1)
        array_NC: NDArray[np.float32] = prob_NC.cpu().numpy()
    return array_NC


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch on one CPU thread, so that the last bits do not depend on the number of cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -------------------------------------------------------------------------------- saving


def check_replaceable(path: Path) -> None:
    """Raise ConfigError if `path` holds something other than a bundle."""
    if path.exists() and not (path / "bundle.json").is_file():
        if path.is_dir():
            # In the working directory, files of MLflow and Arrowhead may lie beside a bundle's.
            here = fileio.is_working_directory(path)
            if all(here and output_paths.is_ignored_entry(one.name) for one in path.iterdir()):
                return
        raise ConfigError(
            f"{path} holds files that do not belong to a bundle."
            if path.is_dir()
            else f"{path} is a file.",
            "a new or empty folder, or an older bundle to replace.",
            "give another folder.",
        )


@contextmanager
def draft(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Give a temporary folder to `write` a bundle into; it becomes `path` at a normal exit.

    Figures and tables for people go into its REPORT_FOLDER, which is not hashed. A bundle that
    already exists is replaced.

    Args:
        path: Where the bundle will be.
        previous: Where the bundle that is replaced is moved; None deletes it.

    Raises:
        ConfigError: If `path` holds something other than a bundle, or the disk is full.
    """
    check_replaceable(path)
    replaces = previous if (path / "bundle.json").is_file() else None
    with fileio.atomic_folder(path, previous) as folder:
        (folder / REPORT_FOLDER).mkdir()
        yield folder
        if not any((folder / REPORT_FOLDER).iterdir()):
            (folder / REPORT_FOLDER).rmdir()
        if not (folder / "bundle.json").is_file():
            raise AssertionError("no bundle was written")
    for one in (replaces, path):
        if one is not None and (files := remote_folder.of(one)).is_remote:
            content = read_bundle_json(one / "bundle.json", str(one))
            files.publish("bundle.json", content["sha256"])


def save(bundle: Bundle, path: Path, previous: Path | None = None) -> str:
    """Write the bundle to `path`, without a report; return its fingerprint (see `draft`)."""
    with draft(path, previous) as folder:
        write(bundle, folder)
    return fingerprint(path)


def write(bundle: Bundle, folder: Path) -> None:
    """Write the bundle's files into the folder that `draft` gave."""
    import safetensors.numpy
    import safetensors.torch

    (folder / "golden").mkdir()
    tensors = {f"body.{name}": t.contiguous() for name, t in bundle.body_state.items()}
    tensors |= {f"head.{name}": t.contiguous() for name, t in bundle.head_state.items()}
    if bundle.novelty:
        novelty = bundle.novelty.tensors().items()
        tensors |= {f"novelty.{name}": t.contiguous() for name, t in novelty}
    files = [folder / "weights.safetensors"]
    files[0].write_bytes(safetensors.torch.save(tensors))
    if bundle.known_images:
        files.append(folder / KNOWN_IMAGES_FILE)
        files[1].write_bytes(safetensors.numpy.save(bundle.known_images.tensors()))
    for image in bundle.golden:
        (folder / "golden" / image.name).write_bytes(image.data)
    fileio.write_json(folder / "golden" / "golden.json", [_as_json(one) for one in bundle.golden])
    files += sorted((folder / "golden").iterdir())
    content = {
        "format": FORMAT,
        "task": (task := "multi-label" if bundle.multi else "single-label"),
        "decision": TASKS[task],
        "recipe": bundle.recipe.to_dict(),
        "recipe_fingerprint": bundle.recipe.fingerprint,
        "classes": bundle.classes,
        "head": bundle.head,
        "temperature": bundle.temperature,
        "thresholds": _thresholds_by_class(bundle),
        "novelty": bundle.novelty and bundle.novelty.summary(),
        "metrics": bundle.metrics,
        "lineage": bundle.lineage,
        "sha256": {str(file.relative_to(folder)): fileio.sha256(file) for file in files},
    }
    fileio.write_sealed(folder / "bundle.json", content)


def _thresholds_by_class(bundle: Bundle) -> dict[str, float] | None:
    if not bundle.multi:
        return None
    thresholds = bundle.thresholds or [0.5] * len(bundle.classes)
    return dict(zip(bundle.classes, thresholds, strict=True))


def _as_json(image: GoldenImage) -> dict[str, Any]:
    return {
        "name": image.name,
        "feature": image.feature.tolist(),
        "probabilities": image.probabilities.tolist(),
    }


def fingerprint(path: Path) -> str:
    """16 hex digits that identify the bundle: bundle.json has the hashes of all other files."""
    return fileio.sha256(path / "bundle.json")[:16]


# ------------------------------------------------------------------------------- loading


def read(path: Path) -> dict[str, Any]:
    """Read bundle.json and check every file that it names against its hash.

    Raises:
        ConfigError: If there is no bundle.
        DataError: If the bundle is damaged or of another format.
    """
    fileio.recover_folder(path)
    if not (path / "bundle.json").is_file():
        raise no_bundle_error(str(path))
    output_paths.check_utf8(path)
    content = read_bundle_json(path / "bundle.json", str(path))
    for name, digest in content["sha256"].items():
        check_sha256(path / name, digest, f"{path / name}")
    return content


def no_bundle_error(address: str) -> ConfigError:
    """The error for an address without a bundle."""
    return ConfigError(
        f"{address} is not a bundle: it has no bundle.json.",
        "a folder that `arrowhead fit` or `arrowhead train` wrote.",
        "check the path (fit writes OUT/bundle).",
    )


def read_bundle_json(file: Path, address: str) -> dict[str, Any]:
    """Read and check bundle.json alone. address: the bundle's name in messages."""
    name_in_messages = f"{address}/bundle.json"
    content = fileio.read_sealed(
        file, FORMAT, upgrade="train again", repair=REPAIR, name=name_in_messages
    )
    fileio.check_schema(content, BUNDLE_SCHEMA, name_in_messages, REPAIR)
    for name, digest in content["sha256"].items():
        fileio.check_schema(digest, store_format.SHA256, name_in_messages, REPAIR)
        if not _is_inside(name):
            raise DataError(
                f"{address} names a file outside its folder: {name!r}.",
                "names of files in the bundle's own folder.",
                "do not use this bundle; check where it comes from.",
            )
    return content


def check_sha256(file: Path, digest: str, address: str) -> None:
    """Raise DataError unless the file has this sha256. address: its name in messages."""
    fileio.check_sha256(file, digest, recorded_in="bundle.json", repair=REPAIR, name=address)


def _is_inside(name: str) -> bool:
    """Whether `write` could have used this name: it cannot point out of the bundle's folder."""
    folder, _, leaf = name.rpartition("/")
    is_plain = name.isprintable() and "\\" not in name
    return is_plain and folder in ("", "golden") and leaf not in ("", ".", "..")


def load(path: Path) -> Bundle:
    """Load the bundle at `path`; checks it as `read` does, and that its parts fit together."""
    import safetensors.torch
    from safetensors import SafetensorError

    content = read(path)
    try:
        tensors = safetensors.torch.load_file(path / "weights.safetensors")
    except (OSError, SafetensorError) as error:
        raise _damaged(f"{path / 'weights.safetensors'} cannot be read: {error}") from error
    groups: dict[str, dict[str, torch.Tensor]] = {name: {} for name in TENSOR_GROUPS}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        if group not in TENSOR_GROUPS:
            raise _damaged(f"weights.safetensors holds {name!r}, which no part of a bundle uses")
        groups[group][rest] = tensor
    recipe = Recipe.from_dict(content["recipe"], str(path))
    classes, multi = content["classes"], content["task"] == "multi-label"
    if content["task"] not in TASKS or (multi and content["thresholds"].keys() != set(classes)):
        raise _damaged(
            f"{path / 'bundle.json'} has a task that this version does not know, or lacks"
            " thresholds"
        )
    return Bundle(
        recipe=recipe,
        classes=classes,
        head=content["head"],
        temperature=content["temperature"],
        multi=multi,
        thresholds=[content["thresholds"][name] for name in classes] if multi else None,
        body_state=groups["body"],
        head_state=groups["head"],
        metrics=content["metrics"],
        lineage=content["lineage"],
        novelty=_load_novelty(groups["novelty"], recipe.width),
        known_images=_load_known_images(path) if KNOWN_IMAGES_FILE in content["sha256"] else None,
        golden=list(_load_golden(path, content["sha256"], recipe.width, len(classes))),
    )


def _load_known_images(path: Path) -> KnownImages:
    import safetensors.numpy
    from safetensors import SafetensorError

    try:
        return KnownImages.from_tensors(safetensors.numpy.load_file(path / KNOWN_IMAGES_FILE))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _damaged(f"{path / KNOWN_IMAGES_FILE} cannot be read: {error}") from error


def _load_novelty(tensors: Mapping[str, torch.Tensor], width: int) -> NoveltyDetector | None:
    if not tensors:
        return None
    try:
        detector = NoveltyDetector.from_tensors(tensors)
    except KeyError as error:
        raise _damaged(f"it lacks novelty.{error.args[0]}") from error
    shapes = [tuple(one.shape) for one in (detector.mean, detector.deviation, detector.bank[:1])]
    if shapes != [(width,), (width,), (1, width)] or detector.known.dim() != 1:
        raise _damaged(f"the tensors of novelty are not for features of {width} numbers")
    return detector


def _load_golden(
    path: Path, hashed: Mapping[str, str], width: int, class_count: int
) -> Iterator[GoldenImage]:
    for entry in _read_golden_json(path):
        name = entry["name"]
        if f"golden/{name}" not in hashed:
            raise _damaged(f"golden.json names {name!r}, which is not one of its images")
        feature = np.array(entry["feature"], np.float32)
        probabilities = np.array(entry["probabilities"], np.float32)
        if (feature.shape, probabilities.shape) != ((width,), (class_count,)):
            raise _damaged("golden.json is of another recipe or other classes")
        data = (path / "golden" / name).read_bytes()
        yield GoldenImage(name=name, data=data, feature=feature, probabilities=probabilities)


def _read_golden_json(path: Path) -> list[dict[str, Any]]:
    file = path / "golden" / "golden.json"
    entries: list[dict[str, Any]] = fileio.read_json(file)
    fileio.check_schema(entries, GOLDEN_SCHEMA, str(file), REPAIR)
    return entries


def info(path: Path) -> dict[str, Any]:
    """Describe a bundle: bundle.json without its hashes, the fingerprint and the size."""
    content = read(path)
    names = ["bundle.json", *content.pop("sha256")]
    return content | {
        "bundle": str(path),
        "fingerprint": fingerprint(path),
        "bytes": sum((path / name).stat().st_size for name in names),
        "golden_images": len(_read_golden_json(path)),
    }
