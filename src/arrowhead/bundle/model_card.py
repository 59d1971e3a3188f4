"""The model card of a published bundle: README.md for people, with YAML front matter for the hub.

Sections: results, use, preparation, calibration, training data, limits, license. Every number comes
from the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arrowhead.bundle import preparation
from arrowhead.bundle.format import Bundle
from arrowhead.wording import pluralize

MAX_CLASSES = 100  # in the table; of more, those with the lowest F1
MAX_NAMES = 20  # in the first paragraph
METRIC_NAMES = {
    "accuracy": "accuracy",
    "accuracy_at_thresholds": "accuracy of all decisions, at their thresholds",
    "balanced_accuracy": "balanced accuracy (mean recall of the classes)",
    "top_5_accuracy": "top-5 accuracy",
    "f1_samples": "F1, mean over images",
    "f1_macro": "F1, mean over labels",
    "mean_average_precision": "mean average precision",
    "auroc": "AUROC",
    "loss": "log loss, without the temperature",
}
HUB_METRICS = {"accuracy": "accuracy", "f1_macro": "f1", "auroc": "roc_auc"}
ACCURACY_OF_LABELS = "accuracy of all decisions, at thresholds of 0.5"  # with several labels


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What a card says besides the bundle's own numbers.

    Attributes:
        title: The name of the model.
        library: torchvision, timm or onnx.
        build: The Python expression that builds the network; "" for ONNX.
        license: Of the model, an identifier such as apache-2.0; None if not stated.
        dataset: What the images are, in words; None if not stated.
        trained: The fingerprint of the bundle that was trained.
        published: The fingerprint of the bundle in the folder.
    """

    title: str
    library: str
    build: str
    license: str | None
    dataset: str | None
    trained: str
    published: str


def render(bundle: Bundle, card: Card) -> str:
    """The text of README.md."""
    import yaml  # type: ignore[import-untyped]

    front = yaml.safe_dump(front_matter(bundle, card), sort_keys=False, allow_unicode=True)
    sections = [
        f"# {text(card.title)}",
        _summary(bundle),
        "## Results",
        *_results(bundle),
        "## Use",
        *_usage(bundle, card),
        "## Preparation of images",
        _preparation(bundle, card),
        "## Calibration",
        _calibration(bundle),
        "## Training data",
        _training_data(bundle, card),
        "## Limits",
        _limits(bundle),
        "## License",
        _license(bundle, card),
        "## Provenance",
        _provenance(bundle, card),
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def front_matter(bundle: Bundle, card: Card) -> dict[str, Any]:
    """The YAML at the top, as the hub reads it."""
    results = []
    for prefix, split in (("", "validation"), ("test_", "test")):
        values = [
            {"type": kind, "value": bundle.metrics[prefix + name], "name": METRIC_NAMES[name]}
            for name, kind in HUB_METRICS.items()
            if isinstance(bundle.metrics.get(prefix + name), float)
            and not (bundle.multi and name == "accuracy")
        ]
        if values:
            dataset = {"name": card.dataset or "images of the author", "type": "images"}
            results.append(
                {
                    "task": {"type": "image-classification"},
                    "dataset": dataset | {"split": split},
                    "metrics": values,
                }
            )
    front: dict[str, Any] = {"license": card.license} if card.license else {}
    front |= {
        "library_name": card.library,
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "arrowhead", bundle.recipe.body],
    }
    if results:
        front["model-index"] = [{"name": card.title, "results": results}]
    return front


def text(value: object) -> str:
    """Text for Markdown, also in a cell of a table: on one line, nothing of it is markup."""
    line = " ".join(str(value).split())
    for character in "\\`*_[]<>|#":
        line = line.replace(character, f"\\{character}" if character != "<" else "&lt;")
    return line


def number(value: float) -> str:
    """A metric with four digits behind the point."""
    return f"{value:.4f}"


def _summary(bundle: Bundle) -> str:
    names = ", ".join(text(name) for name in bundle.classes[:MAX_NAMES])
    more = f" and {len(bundle.classes) - MAX_NAMES} more" if bundle.classes[MAX_NAMES:] else ""
    count = pluralize(len(bundle.classes), "class", "classes")
    if bundle.multi:
        what = f"Finds which of {count} an image shows; it may be none, one or several:"
    else:
        what = f"Says which of {count} an image shows:"
    return (
        f"{what} {names}{more}.\n\nA {text(bundle.recipe.body)} whose features were computed once,"
        f" with a {bundle.head} head trained on them by Arrowhead."
    )


# ------------------------------------------------------------------------------- results


def _results(bundle: Bundle) -> list[str]:
    parts = []
    for prefix, title in (("test_", "test"), ("", "validation")):
        metrics = {
            name.removeprefix(prefix): value
            for name, value in bundle.metrics.items()
            if name.startswith(prefix) and (prefix or not name.startswith("test_"))
        }
        if "images" not in metrics:
            continue
        parts.append(f"On {pluralize(metrics['images'], f'{title} image')}:")
        parts.append(_metrics_table(metrics, multi=bundle.multi))
        if table := metrics.get("per_class"):
            parts.append(_class_table(table, len(bundle.classes)))
    if not parts:
        return ["The bundle has no metrics."]
    if "test_images" in bundle.metrics:
        parts.append("Nothing was trained on the test images, nor chosen with them.")
    parts.append(
        "The head was not trained on the validation images, but choices such as the temperature"
        " were made with them: expect a little less on new images."
    )
    return parts


def _metrics_table(metrics: Mapping[str, Any], *, multi: bool) -> str:
    lines = ["| metric | value | 95 % interval |", "|---|---|---|"]
    for name, title in METRIC_NAMES.items():
        if isinstance(value := metrics.get(name), int | float):
            interval = metrics.get(f"{name}_interval")
            shown = f"{number(interval[0])} to {number(interval[1])}" if interval else ""
            title = ACCURACY_OF_LABELS if name == "accuracy" and multi else title
            lines.append(f"| {title} | {number(value)} | {shown} |")
    if metrics.get("ece_high") is not None:
        low, high = number(metrics["ece_low"]), number(metrics["ece_high"])
        value = number(metrics["ece"])
        lines.append(f"| expected calibration error | {value} | {low} to {high} |")
    return "\n".join(lines)


def _class_table(per_class: Mapping[str, Mapping[str, Any]], classes: int) -> str:
    def f1(name: str) -> float:
        value = per_class[name].get("f1")
        return float("inf") if value is None else float(value)

    names = sorted(per_class, key=f1) if classes > MAX_CLASSES else list(per_class)
    lines = ["| class | precision | recall | F1 | images |", "|---|---|---|---|---|"]
    for name in names[:MAX_CLASSES]:
        row = per_class[name]
        values = [
            "" if row.get(key) is None else number(row[key])
            for key in ("precision", "recall", "f1")
        ]
        lines.append(f"| {text(name)} | {' | '.join(values)} | {row.get('images', '')} |")
    if names[MAX_CLASSES:]:
        lines.append(f"\nThe {MAX_CLASSES} classes with the lowest F1; all are in arrowhead.json.")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------- use


def _usage(bundle: Bundle, card: Card) -> list[str]:
    packages = {
        "torchvision": "`pip install torch torchvision safetensors pillow`",
        "timm": "`pip install timm safetensors pillow`",
        "onnx": "`pip install onnxruntime torchvision pillow`",
    }[card.library]
    return [
        f"Without Arrowhead ({packages}; run it in this folder):",
        f"```python\n{loading_code(bundle, card)}\n```",
        "With Arrowhead, which reads folders, tables and buckets, names files that cannot be read,"
        " and flags images unlike the training images:",
        "```text\narrowhead score bundle IMAGES SCORES --flag-novel\n```",
    ]


def loading_code(bundle: Bundle, card: Card) -> str:
    """Python code that loads the model without Arrowhead and classifies photo.jpg."""
    is_onnx = card.library == "onnx"
    transform = preparation.transform_code(bundle.recipe, normalized=not is_onnx)
    imports = ["import json", "", "import torch"]
    imports += ["import onnxruntime"] if is_onnx else []
    imports += ["from PIL import Image, ImageOps"]
    imports += [] if is_onnx else ["from safetensors.torch import load_file"]
    imports += [] if is_onnx else [f"import {card.library}"]
    imports += ["from torchvision import transforms"]
    if is_onnx:
        imports = [line for line in imports if line != "import torch"]
        load = ['net = onnxruntime.InferenceSession("model.onnx")']
        run = ['(probabilities,) = net.run(None, {"pixels": prepare(image)[None].numpy()})[0]']
    else:
        function = "sigmoid()" if bundle.multi else "softmax(1)"
        load = [
            f"net = {card.build}",
            'net.load_state_dict(load_file("model.safetensors"))',
            "net.eval()",
        ]
        run = [
            "with torch.inference_mode():",
            f"    (probabilities,) = net(prepare(image)[None]).{function}",
        ]
    show = ['for label, probability in zip(config["label_names"], probabilities):']
    if bundle.multi:
        show.append('    is_given = float(probability) >= config["thresholds"][label]')
        show.append("    print(label, float(probability), is_given)")
    else:
        show.append("    print(label, float(probability))")
    lines = [
        *imports,
        "",
        'with open("config.json") as file:',
        "    config = json.load(file)",
        *load,
        transform,
        'image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")',
        *run,
        *show,
    ]
    return "\n".join(lines)


def _preparation(bundle: Bundle, card: Card) -> str:
    mean, std = (
        ", ".join(f"{one:g}" for one in v) for v in (bundle.recipe.mean, bundle.recipe.std)
    )
    where = "The ONNX model itself then computes" if card.library == "onnx" else "Then"
    return (
        f"{preparation.describe(bundle.recipe)} {where} (pixels / 255 - mean) / std, with mean"
        f" {mean} and std {std}.\n\nArrowhead decodes with DALI. Pillow and torchvision give"
        " slightly other pixels, and so slightly other probabilities."
    )


# --------------------------------------------------------------- calibration, data, limits


def _calibration(bundle: Bundle) -> str:
    metrics, lines = bundle.metrics, []
    if bundle.temperature == 1:
        lines.append("The logits are not scaled: the temperature is 1.")
    else:
        lines.append(
            f"The logits are divided by the temperature {bundle.temperature:.4f}, which was fitted"
            " to validation images (temperature scaling, arXiv:1706.04599). The model does this"
            " itself: do not divide again."
        )
    if metrics.get("ece_high") is not None and metrics.get("ece_uncalibrated") is not None:
        error, low, high, before = (
            number(metrics[name]) for name in ("ece", "ece_low", "ece_high", "ece_uncalibrated")
        )
        lines.append(
            f"Expected calibration error on held-out images: {error} (95 % interval {low} to"
            f" {high}); at temperature 1: {before}."
        )
    if bundle.multi:
        lines.append(
            "A label is given from its own threshold on (config.json), which was fitted to"
            " validation images."
        )
    return " ".join(lines)


def _training_data(bundle: Bundle, card: Card) -> str:
    lines = [f"Images: {text(card.dataset or 'not described by the author')}."]
    if known := bundle.known_images:
        lines.append(
            f"{pluralize(len(known.train), 'different training image')},"
            f" {pluralize(len(known.valid), 'different validation image')}."
        )
    if data := bundle.lineage.get("data"):
        lines.append(f"Fingerprint of files, labels and splits: `{data}`.")
    if bundle.golden:
        photos = pluralize(len(bundle.golden), "photo")
        lines.append(f"`bundle/golden` has {photos} of them, to check other machines with.")
    else:
        lines.append("No image is in this folder.")
    if bundle.novelty:
        rows = pluralize(len(bundle.novelty.bank), "training image")
        lines.append(f"`bundle` contains features of {rows}, to flag novel images.")
    return " ".join(lines)


def _limits(bundle: Bundle) -> str:
    metrics, lines = bundle.metrics, []
    if bundle.multi:
        lines.append("It knows no other labels than these.")
    else:
        lines.append(
            "It knows no other classes than these: an image of anything else gets one of them,"
            " often with a high probability."
        )
    lines.append(
        "The results hold for images like those it was measured on. Measure it on your own images"
        " before you rely on it (`arrowhead evaluate bundle IMAGES`)."
    )
    if weak := _weakest(metrics.get("per_class") or {}):
        lines.append(weak)
    images = metrics.get("images")
    if isinstance(images, int) and images < 1000:
        lines.append(f"{pluralize(images, 'validation image')}: mind the intervals.")
    if bundle.novelty is None:
        lines.append("The bundle has no novelty detector.")
    return "\n".join(f"- {line}" for line in lines)


def _weakest(per_class: Mapping[str, Mapping[str, Any]]) -> str:
    """The class with the lowest recall, in words; "" if there is none below 1."""
    recalls = {
        name: row["recall"] for name, row in per_class.items() if row.get("recall") is not None
    }
    if not recalls or min(recalls.values()) == 1:
        return ""
    name = min(recalls, key=lambda one: recalls[one])
    images = per_class[name].get("images", 0)
    return (
        f"It misses most in {text(name)}: recall {number(recalls[name])} of"
        f" {pluralize(images, 'validation image')}."
    )


def _license(bundle: Bundle, card: Card) -> str:
    origin = bundle.lineage.get("weights") or {}
    model = f"`{text(card.license)}`" if card.license else "not stated by the author"
    weights = f"`{text(origin['license'])}`" if origin.get("license") else "not recorded"
    source = f" (from {text(origin['source'])})" if origin.get("source") else ""
    return (
        f"Model: {model}. Pretrained weights of the {text(bundle.recipe.body)}{source}: {weights}."
        " The license of the pretrained weights applies to what is derived from them, too."
    )


def _provenance(bundle: Bundle, card: Card) -> str:
    training = bundle.lineage.get("training") or {}
    settings = ", ".join(f"{name} {value}" for name, value in training.items() if value is not None)
    rows: Sequence[tuple[str, object]] = [
        ("made by", f"Arrowhead {bundle.lineage.get('arrowhead', 'unknown')}"),
        ("bundle as trained", card.trained),
        ("bundle in this folder", card.published),
        ("recipe", bundle.recipe.fingerprint),
        ("pretrained weights (sha256)", bundle.recipe.weights),
        ("training", settings or "unknown"),
    ]
    lines = "\n".join(f"| {name} | {text(value)} |" for name, value in rows)
    return f"| | |\n|---|---|\n{lines}"
