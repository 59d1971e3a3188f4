"""Write src/arrowhead/features/body_table.json: width, size, parameters, license of every body.

    .venv/bin/python bench/body_table.py            # all networks: 15 minutes
    .venv/bin/python bench/body_table.py --speed    # measures images per second of SPEED_BODIES

Networks are built on torch's meta device, without memory for weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from arrowhead.errors import ConfigError
from arrowhead.features import backbone, body_table, timm_bodies, torchvision_bodies
from arrowhead.features.backbone import Body, BodyConfig

SPEED_BODIES = [
    "resnet18",
    "resnet34",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "convnext_tiny",
    "vit_b_16",
    "timm/tf_efficientnet_lite0",
    "timm/resnet50",
    "timm/mobilenetv4_conv_small",
    "timm/efficientnet_b0",
    "timm/convnext_tiny",
    "timm/vit_tiny_patch16_224",
    "timm/vit_small_patch16_224",
    "timm/vit_small_patch16_dinov3",
    "timm/vit_base_patch16_siglip_224",
    "timm/swin_tiny_patch4_window7_224",
]


def timm_entry(name: str) -> dict[str, Any] | None:
    """One network of timm with its weights, the default ones first."""
    timm = timm_bodies.import_timm()
    with torch.device("meta"), torch.no_grad():
        try:
            net = timm.create_model(name, num_classes=0).eval()
            out = net.forward_features(torch.empty(1, *net.pretrained_cfg["input_size"]))
            width = net.forward_head(out, pre_logits=True).shape[1]
        except (NotImplementedError, TypeError):
            return None  # an encoder, without a classifier that could be left out
    default = timm.models.get_pretrained_cfg(name)
    tags = [one.partition(".")[2] for one in timm.list_pretrained(f"{name}.*")]
    tags.sort(key=lambda tag: tag != default.tag)
    configs = {tag: timm.models.get_pretrained_cfg(f"{name}.{tag}") for tag in tags}
    return {
        "width": width,
        "size": net.pretrained_cfg["input_size"][-1],
        "parameters": sum(one.numel() for one in net.parameters()),
        "weights": {t: [c.input_size[-1], c.license or "unknown"] for t, c in configs.items()},
    }


def torchvision_entry(name: str) -> dict[str, Any] | None:
    """One network of torchvision with its weights, the default ones first."""
    models = torchvision_bodies.import_models()
    entries = models.get_model_weights(name)
    default = entries["DEFAULT"]
    ordered = sorted(entries, key=lambda one: one is not default)
    size = default.transforms().crop_size[0]
    try:
        net, _ = torchvision_bodies.build(name, size)  # some read values while they are built
    except ConfigError:
        return None  # its last layer is not linear
    with torch.no_grad():
        image = torch.empty(1, 3, size, size, device="meta")
        width = net.to("meta")(image).flatten(1).shape[1]
    weights = {
        one.name: [one.transforms().crop_size[0], torchvision_bodies.license_of(one)]
        for one in ordered
    }
    return {
        "width": width,
        "size": size,
        "parameters": sum(one.numel() for one in net.parameters()),
        "weights": weights,
    }


def images_per_second(name: str, threads: int = 2, batch: int = 32) -> float:
    """Forward pass at the size of the weights: the median of five batches, random weights."""
    torch.set_num_threads(threads)
    made = backbone.load(BodyConfig(body=name, weights="random"))
    size = made.pixels.side
    body = Body(name, made.state, pool="auto", mean=made.mean, std=made.std, size=size)
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        body(pixels)
        seconds.append(time.perf_counter() - start)
    return round(batch / statistics.median(seconds[1:]), 1)


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speed", action="store_true")
    table = json.loads(body_table.TABLE.read_text()) if body_table.TABLE.exists() else {}
    if parser.parse_args().speed:
        table["images_per_second"] = {name: images_per_second(name) for name in SPEED_BODIES}
        table["machine"] = "2 CPU cores, batches of 32, forward pass only"
    else:
        import torchvision

        timm = timm_bodies.import_timm()
        found = {name: torchvision_entry(name) for name in torchvision_bodies.registered_names()}
        found |= {f"timm/{name}": timm_entry(name) for name in timm.list_models()}
        table = {"machine": "", "images_per_second": {}} | table
        table |= {
            "torchvision": torchvision.__version__.partition("+")[0],
            "timm": timm.__version__,
            "bodies": {name: entry for name, entry in found.items() if entry},
        }
    lines = json.dumps(table | {"bodies": {}})[:-1].removesuffix('"bodies": {}')
    rows = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in table["bodies"].items())
    body_table.TABLE.write_text(f'{lines}"bodies": {{\n{rows}\n}}}}\n')


if __name__ == "__main__":
    main()
