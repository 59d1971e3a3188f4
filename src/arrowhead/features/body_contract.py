"""What every body must do, as a check that anyone can run on a body of theirs.

    from arrowhead.features.body_contract import check_backbone

    check_backbone("timm/convnext_atto").require()

The promises of a store rest on these: the same bytes from one worker and from several need features
that depend neither on the batch nor on the number of threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from arrowhead.errors import ConfigError, DataError
from arrowhead.features import backbone, body_table, networks, timm_bodies, torchvision_bodies
from arrowhead.features.backbone import Body, BodyConfig, Weights
from arrowhead.features.networks import TIMM_PREFIX
from arrowhead.features.precision import pictures

if TYPE_CHECKING:
    import torch
    from torch import nn

MIN_BATCH = 16  # rows that extraction pads smaller batches to
BATCHES = (17, 32)  # besides that; the last one is all pictures
THREADS = (1, 2)
MIN_COSINE = 0.9999  # between two ways to compute the same features in float32


@dataclass(slots=True)
class BackboneReport:
    """What `check_backbone` found.

    Attributes:
        body: As --body takes it.
        size: Side of the images that it was checked with, in pixels.
        width: Numbers per feature.
        pool: The pooling, with auto resolved.
        violations: What is not as it must be, in sentences; empty if all is well.
        cosines: The smallest cosine between the features and those of another way to compute them:
            library (the library's own forward pass), onnx.
    """

    body: str
    size: int = 0
    width: int = 0
    pool: str = ""
    violations: list[str] = field(default_factory=list)
    cosines: dict[str, float] = field(default_factory=dict)

    def require(self) -> BackboneReport:
        """Return the report; raise DataError if there are violations."""
        if self.violations:
            raise DataError(
                f"{self.body} breaks the contract of a body: {' '.join(self.violations)}",
                "a body whose features do not depend on batches, threads or file formats.",
                "do not use it with several workers, and please report it.",
            )
        return self


def check_backbone(
    name: str,
    *,
    weights: str = "random",
    size: int | None = None,
    pools: bool = True,
    onnx: bool = False,
) -> BackboneReport:
    """Check that a body keeps the contract; takes seconds for small networks and sizes.

    Same bits: for batches from 16 rows on, for any position in a batch, for any number of threads.
    Same features (cosine above 0.9999): with batch norms folded as in the library's own forward
    pass, and in ONNX. Width: as the table of bodies says. Pooling: each that the body allows.

    Args:
        name: As --body takes it.
        weights: As --weights takes it.
        size: Side of the images in pixels; None: that of the weights.
        pools: Also check other poolings than the default one.
        onnx: Also export to ONNX and run that; needs the extra onnx.

    Raises:
        ConfigError: If there is no such body, or it does not take this size.
    """
    config = BodyConfig(body=name, weights=weights, accept_license=True)
    loaded = backbone.load(config, size)
    size = size or loaded.pixels.side
    report = BackboneReport(name, size)
    pixels_BCHW = pictures(max(BATCHES), size)
    with _quiet():
        if weights == "random":
            loaded = _settled(name, loaded, size, pixels_BCHW[:MIN_BATCH])
        body = _make_body(name, loaded, "auto", size)
        report.width, report.pool = body.width, body.pool
        feature_BD = body(pixels_BCHW)
        _check_width(report, feature_BD)
        _check_bits(report, body, pixels_BCHW, feature_BD)
        reference_BD = _library_features(name, loaded, size, pixels_BCHW[:4])
        _compare(report, "library", feature_BD[:4], reference_BD)
        if pools:
            _check_pools(report, loaded, pixels_BCHW[:MIN_BATCH])
        if onnx:
            _compare(report, "onnx", feature_BD[:4], _onnx_features(body.module, pixels_BCHW[:4]))
    return report


def _settled(name: str, loaded: Weights, size: int, pixels_BCHW: torch.Tensor) -> Weights:
    """Random weights with batch norms that know their input, as after training.

    Otherwise the activations of a deep network shrink to nothing, or to numbers so small that a CPU
    takes a hundred times as long for them.
    """
    import torch
    from torch import nn

    maker = timm_bodies if name.startswith(TIMM_PREFIX) else torchvision_bodies
    net, _ = maker.build(name, size)
    networks.load_tensors(net, loaded.state)
    norms = [one for one in net.modules() if isinstance(one, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average, here of one batch
        norm.train()
    if norms:
        with torch.no_grad():
            net((pixels_BCHW.float() / 255 - 0.5) / 0.25)
    state = {key: value.clone() for key, value in net.eval().state_dict().items()}
    return dataclasses.replace(loaded, state=state)


def _make_body(name: str, loaded: Weights, pool: str, size: int) -> Body:
    return Body(name, loaded.state, pool=pool, mean=loaded.mean, std=loaded.std, size=size)


def _check_width(report: BackboneReport, feature_BD: torch.Tensor) -> None:
    import torch

    if feature_BD.dtype != torch.float32 or feature_BD.ndim != 2:
        report.violations.append(f"Features are {feature_BD.dtype}, {tuple(feature_BD.shape)}.")
    if not feature_BD.half().isfinite().all():
        report.violations.append("Features are not finite as float16.")
    if (feature_BD == feature_BD[0]).all():
        report.violations.append("All images have the same features.")
    known = {row.width for row in body_table.rows(report.body)}
    if known and report.width not in known:
        report.violations.append(f"The width is {report.width}, the table says {known}.")


def _check_bits(
    report: BackboneReport, body: Body, pixels_BCHW: torch.Tensor, feature_BD: torch.Tensor
) -> None:
    """The same bits for other batch sizes, other positions and other numbers of threads."""
    import torch

    def differs(got_BD: torch.Tensor, wanted_BD: torch.Tensor) -> bool:
        return not torch.equal(got_BD, wanted_BD)

    before = torch.get_num_threads()
    smallest_BD = body(pixels_BCHW[:MIN_BATCH])
    if differs(smallest_BD, feature_BD[:MIN_BATCH]):
        report.violations.append(f"Batches of {MIN_BATCH} rows give other bits.")
    for size in BATCHES[:-1]:
        if differs(body(pixels_BCHW[:size]), feature_BD[:size]):
            report.violations.append(f"Batches of {size} rows give other bits.")
    if differs(body(pixels_BCHW.flip(0)).flip(0), feature_BD):
        report.violations.append("Another position in the batch gives other bits.")
    try:
        for threads in {*THREADS} - {before}:
            torch.set_num_threads(threads)
            if differs(body(pixels_BCHW[:MIN_BATCH]), smallest_BD):
                report.violations.append(f"{threads} threads give other bits than {before}.")
    finally:
        torch.set_num_threads(before)


def _library_features(
    name: str, loaded: Weights, size: int, pixels_BCHW: torch.Tensor
) -> torch.Tensor:
    """Features by the library's own forward pass: nothing folded, no other memory format."""
    import torch

    maker = timm_bodies if name.startswith(TIMM_PREFIX) else torchvision_bodies
    net, _ = maker.build(name, size)
    networks.load_tensors(net, loaded.state)
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in (loaded.mean, loaded.std))
    with torch.inference_mode():
        out: torch.Tensor = net((pixels_BCHW.float() / 255 - mean) / std)
    return out.flatten(1)


def _compare(
    report: BackboneReport, way: str, got_BD: torch.Tensor, wanted_BD: torch.Tensor
) -> None:
    """Note the smallest cosine between features that should be equal."""
    from torch.nn.functional import cosine_similarity

    if got_BD.shape != wanted_BD.shape:
        report.violations.append(
            f"{way}: {tuple(wanted_BD.shape)} features instead of {tuple(got_BD.shape)}."
        )
        return
    report.cosines[way] = cosine = float(cosine_similarity(got_BD, wanted_BD).min())
    if not cosine >= MIN_COSINE:
        report.violations.append(f"{way}: the cosine to its features is {cosine:.6f}.")


def _check_pools(report: BackboneReport, loaded: Weights, pixels_BCHW: torch.Tensor) -> None:
    """The other poolings: their widths, and that joined ones are the two that they join."""
    import torch

    features: dict[str, torch.Tensor] = {}
    for pool in dict.fromkeys((*networks.MAP_POOLS, *networks.TOKEN_POOLS)):
        with contextlib.suppress(ConfigError):
            features[pool] = _make_body(report.body, loaded, pool, report.size)(pixels_BCHW)
    joined = {"concat": ("avg", "max"), "cls+avg": ("cls", "avg")}
    for pool, parts in joined.items():
        if pool not in features:
            continue
        if features[pool].shape[1] != 2 * features[parts[1]].shape[1]:
            report.violations.append(f"Pooling {pool} has {features[pool].shape[1]} numbers.")
        second = features[pool].chunk(2, 1)[1]
        if not torch.allclose(second, features[parts[1]], rtol=1e-3, atol=1e-4):
            report.violations.append(f"Pooling {pool} does not end with {parts[1]}.")


def _onnx_features(module: nn.Module, pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """Features by ONNX Runtime of the exported body."""
    import onnxruntime
    import torch

    with torch.no_grad():
        exported = torch.onnx.export(
            torch.export.export(
                module,
                (pixels_BCHW[:2],),
                dynamic_shapes={"pixels_BCHW": {0: torch.export.Dim("batch", min=1)}},
            ),
            dynamo=True,
            opset_version=20,
            input_names=["pixels"],
            output_names=["features"],
            verbose=False,
        )
    assert exported is not None
    session = onnxruntime.InferenceSession(
        exported.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (out,) = session.run(["features"], {"pixels": pixels_BCHW.numpy()})
    return torch.from_numpy(out)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop the warnings and the chatter of the exporters."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
