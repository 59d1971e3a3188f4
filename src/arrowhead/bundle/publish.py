"""Publish a bundle: a folder as on the Hugging Face hub, and optionally a repository there.

FOLDER/
  README.md                 the model card
  model.safetensors         weights that torchvision loads; model.onnx where no network of
                            torchvision computes what the bundle computes
  config.json               architecture, classes, thresholds
  preprocessor_config.json  how images are prepared
  arrowhead.json            all metrics, what was verified; marks the folder as Arrowhead's
  bundle/                   for Arrowhead: the bundle without photos, image hashes, run ids
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from arrowhead import __version__, fileio
from arrowhead.bundle import export, library_weights, model_card, preparation
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle.export import ExportConfig
from arrowhead.bundle.format import Bundle
from arrowhead.bundle.model_card import Card
from arrowhead.errors import ConfigError
from arrowhead.features import classifiers, extract

REPO_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # the hub checks the rest
PUBLISHED_LINEAGE = ("arrowhead", "data", "training", "epoch", "rate", "weights")


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishConfig:
    """What is published, and where."""

    push: str | None = None
    """Also push the folder to this repository of the Hugging Face hub (USER/NAME), which is created
    if it does not exist. Needs `hf auth login` or the variable HF_TOKEN."""
    public: bool = False
    """Create the repository as a public one (default: private). An existing one stays as it is."""
    title: str | None = None
    """Title of the model card. Default: the name of the repository, or else of the folder."""
    license: str | None = None
    """License of the model, by the hub's identifier, such as apache-2.0 or cc-by-4.0."""
    dataset: str | None = None
    """What the training images are, in a few words for the model card."""
    photos: bool = False
    """Also publish the bundle's golden images (up to 8 of your photos) and the hashes of its
    training images. Then other machines can be checked, and training images are recognized."""

    def __post_init__(self) -> None:
        if self.push is not None and not REPO_NAME.fullmatch(self.push):
            raise ConfigError(
                f"--push {self.push} is not the name of a repository.",
                "USER/NAME or ORGANIZATION/NAME.",
                "give e.g. --push your-name/cats-or-dogs.",
            )
        if self.public and self.push is None:
            raise ConfigError(
                "--public has no effect without --push.",
                "--push USER/NAME with it.",
                "add --push, or leave --public out.",
            )


def publish(path: Path, out: Path, config: PublishConfig) -> dict[str, Any]:
    """Write the folder `out` for the bundle at `path`; a published folder there is replaced.

    Returns:
        The files, what was verified, and why the weights are ONNX, if they are.

    Raises:
        ConfigError: If `out` is a git repository, or ONNX is needed and not installed.
        DataError: If the bundle is damaged, or its exported weights give other results.
    """
    if (out / ".git").exists():
        raise ConfigError(
            f"{out} is a git repository, and would be replaced as a whole.",
            "a folder of its own.",
            "give another folder, and copy its files into the repository.",
        )
    bundle = bundle_format.load(path)
    library, reason = _library_or_reason(bundle)
    published = public_bundle(bundle, photos=config.photos)
    with fileio.atomic_folder(out) as folder:
        published_fingerprint = bundle_format.save(published, folder / "bundle")
        name = "model.onnx" if reason else "model.safetensors"
        exported = export.export(path, folder / name, ExportConfig(format=library))
        card = Card(
            title=config.title or (config.push or str(out.absolute())).rpartition("/")[2],
            library=library,
            build=exported.get("build", ""),
            license=config.license,
            dataset=config.dataset,
            trained=bundle_format.fingerprint(path),
            published=published_fingerprint,
        )
        # Numbers of images are told even if their hashes are not.
        shown = dataclasses.replace(published, known_images=bundle.known_images)
        (folder / "README.md").write_text(model_card.render(shown, card), "utf-8")
        fileio.write_json(folder / "config.json", model_config(bundle, exported, library))
        processor = preparation.processor_config(bundle.recipe)
        fileio.write_json(folder / "preprocessor_config.json", processor)
        fileio.write_json(folder / "arrowhead.json", _facts(bundle, exported, card.trained))
        files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {
        "folder": str(out),
        "library": library,
        "why_onnx": reason,
        "contents": [name for name in files if not (out / name).is_dir()],
        "bytes": size,
        "checked_on": exported["checked_on"],
        "images": exported["images"],
        "compared": exported["compared"],
        "largest_difference": exported["largest_difference"],
        "tolerance": exported["tolerance"],
        "photos": len(published.golden),
    }


def _library_or_reason(
    bundle: Bundle,
) -> tuple[Literal["onnx", "torchvision", "timm"], str]:
    """The format of the weights, and why it is ONNX, if it is."""
    library: Literal["torchvision", "timm"] = (
        "timm" if classifiers.library_of(bundle.recipe.body) == "timm" else "torchvision"
    )
    try:
        library_weights.make_weights(bundle, library)
    except ConfigError as error:
        return "onnx", error.found
    return library, ""


def public_bundle(bundle: Bundle, *, photos: bool) -> Bundle:
    """The bundle without what names people or runs (corrections, run ids), and without its golden
    images and the hashes of its images unless `photos` is true.
    """
    lineage = {name: bundle.lineage[name] for name in PUBLISHED_LINEAGE if name in bundle.lineage}
    bundle = dataclasses.replace(bundle, lineage=lineage)
    return bundle if photos else dataclasses.replace(bundle, golden=(), known_images=None)


def model_config(bundle: Bundle, exported: dict[str, Any], library: str) -> dict[str, Any]:
    """config.json: with the keys of transformers and timm where these have them."""
    task = "multi_label_classification" if bundle.multi else "single_label_classification"
    thresholds = bundle.thresholds or [0.5] * len(bundle.classes)
    output = "sigmoid" if bundle.multi else "softmax"
    return _timm_config(bundle, exported, library) | {
        "library_name": library,
        "architecture": exported.get("architecture", bundle.recipe.body).partition(".")[0],
        "build": exported.get("build"),
        "num_classes": len(bundle.classes),
        "num_features": bundle.recipe.width,
        "problem_type": task,
        "label_names": bundle.classes,
        "id2label": {str(index): name for index, name in enumerate(bundle.classes)},
        "label2id": {name: index for index, name in enumerate(bundle.classes)},
        "thresholds": dict(zip(bundle.classes, thresholds, strict=True)) if bundle.multi else None,
        "output": "calibrated probabilities"
        if library == "onnx"
        else f"calibrated logits: {output} gives probabilities",
    }


def _timm_config(bundle: Bundle, exported: dict[str, Any], library: str) -> dict[str, Any]:
    """What timm's create_model("local-dir:FOLDER", pretrained=True) reads besides the rest."""
    if library != "timm":
        return {}
    recipe, pixels = bundle.recipe, extract.make_pixel_config(bundle.recipe)
    mode = {"crop": "center", "squash": "squash", "pad": "border"}[recipe.resize]
    return {
        "model_args": {k: v for k, v in exported["options"].items() if k != "num_classes"},
        "pretrained_cfg": {
            "input_size": [3, recipe.size, recipe.size],
            "num_classes": len(bundle.classes),
            "mean": list(recipe.mean),
            "std": list(recipe.std),
            "interpolation": pixels.interpolation,
            "crop_pct": recipe.size / pixels.resized_side if recipe.resize == "crop" else 1.0,
            "crop_mode": mode,
            "classifier": exported["last_layer"],
            "label_names": bundle.classes,
        },
    }


def _facts(bundle: Bundle, exported: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    names = ("checked_on", "images", "compared", "largest_difference", "tolerance", "bytes")
    return {
        "arrowhead": __version__,
        "bundle": fingerprint,
        "recipe": bundle.recipe.to_dict(),
        "recipe_fingerprint": bundle.recipe.fingerprint,
        "temperature": bundle.temperature,
        "metrics": bundle.metrics,
        "verified": {name: exported[name] for name in names},
    }
