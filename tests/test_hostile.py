"""Bad files affect no other file: a corpus of them, and tens of thousands of random ones."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import slow_params
from hostile import (
    KINDS,
    Case,
    animated,
    chunk,
    encoded,
    hostile,
    interlaced,
    mutants,
    on_disk,
    ycck,
)
from PIL import Image

from arrowhead.data import chunks as data_chunks
from arrowhead.data import path_text, sources
from arrowhead.decode.pixels import PixelConfig, Pixels
from arrowhead.decode.worker_process import SubprocessDecoder
from arrowhead.features.backbone import Body, BodyConfig, load
from arrowhead.features.extract import ExtractConfig, FeatureCache, FeaturePipeline, make_recipe
from arrowhead.runtime.worker import Worker

PIXELS = PixelConfig(size=32, views=2)


class Row(NamedTuple):
    """The result of one file."""

    fault: str | None
    fallback: bool
    pixels: bytes  # of all views


@pytest.fixture(scope="module")
def photos(image_folder: Path) -> list[bytes]:
    """56 synthetic JPEGs."""
    return [path.read_bytes() for path in sorted(image_folder.rglob("*.jpg"))[:56]]


@pytest.fixture(scope="module")
def corpus(photos: list[bytes]) -> dict[str, Case]:
    return hostile(photos)


@pytest.fixture(scope="module")
def decoder() -> Iterator[SubprocessDecoder]:
    with SubprocessDecoder(PIXELS, batch_size=64, threads=2) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def alone(corpus: dict[str, Case], decoder: SubprocessDecoder) -> dict[str, Row]:
    """The result of each broken file in a batch of its own."""
    rows = {}
    for name, case in corpus.items():
        rows[name] = _rows(decoder([case.data], _ids([case.data])))[0]
    return rows


def _ids(files: Sequence[bytes]) -> list[bytes]:
    return [zlib.crc32(data).to_bytes(16, "big") for data in files]


def _rows(pixels: Pixels) -> list[Row]:
    """The rows of files."""
    return [
        Row(fault, pixels.fallback[row], b"".join(view[row].tobytes() for view in pixels.views))
        for row, fault in enumerate(pixels.faults)
    ]


def _shuffled_batch(
    good: Sequence[bytes], broken: Sequence[bytes], rng: np.random.Generator
) -> tuple[list[bytes], list[int]]:
    """A batch of both, shuffled, and where in (mates + strangers) each of its files stood."""
    order = rng.permutation(len(good) + len(broken))
    files = [*good, *broken]
    return [files[place] for place in order], [int(place) for place in order]


# ------------------------------------------------------------------------------ the corpus


def test_the_corpus_is_large_and_the_same_from_the_same_seed(
    photos: list[bytes], corpus: dict[str, Case]
) -> None:
    assert len(corpus) > 500
    assert hostile(photos) == corpus
    assert hostile(photos, seed=1) != corpus


def test_every_broken_file_has_its_expected_outcome(
    corpus: dict[str, Case], alone: dict[str, Row]
) -> None:
    wrong = {}
    for name, (_, outcome) in corpus.items():
        fault = alone[name].fault
        kind = fault.partition(":")[0] if fault else None
        fits = kind in (outcome or {None}) if outcome != "either" else kind in KINDS | {None}
        if not fits:
            wrong[name] = f"{fault}, not {outcome}"
    assert not wrong


def test_a_fault_is_one_short_printable_line_without_addresses_or_paths(
    alone: dict[str, Row],
) -> None:
    for name, row in alone.items():
        if row.fault is not None:
            kind, _, words = row.fault.partition(": ")
            assert kind in KINDS, name
            assert words.strip(), name
            assert row.fault.isprintable(), name
            assert len(row.fault) < 300, name
            # What Pillow was given, one of its formats and our own files are no one's business.
            for never in ("0x7", "BytesIO", "MPO", ".cpp", ".py", "/work", "/tmp", "@"):
                assert never not in row.fault, (name, row.fault)


def test_a_faulty_row_is_black(alone: dict[str, Row]) -> None:
    for name, row in alone.items():
        assert row.fault is None or not any(row.pixels), name


@pytest.mark.parametrize(
    ("size", "bad", "threads", "real"),
    [(64, 12, 2, False), *slow_params((32, 6, 1, False), (64, 24, 2, True))],
)
def test_broken_and_good_files_in_a_batch_are_decoded_as_when_alone(
    size: int,
    bad: int,
    threads: int,
    real: bool,
    photos: list[bytes],
    corpus: dict[str, Case],
    alone: dict[str, Row],
    request: pytest.FixtureRequest,
) -> None:
    others = photos[: size - bad]
    if real:
        folder = request.getfixturevalue("dogscats")
        others = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))[: size - bad]]
    rng = np.random.default_rng(size)
    names = [str(name) for name in rng.permutation(list(corpus))]
    with SubprocessDecoder(PIXELS, batch_size=size, threads=threads) as decoder:
        clean = _rows(decoder(others, _ids(others)))
        assert not any(row.fault for row in clean)
        for first in range(0, len(names), bad):
            some = names[first : first + bad]
            batch, order = _shuffled_batch(others, [corpus[name].data for name in some], rng)
            for directory, row in zip(order, _rows(decoder(batch, _ids(batch))), strict=True):
                if directory < len(others):
                    assert row == clean[directory], f"a photo changed among {some}"
                else:
                    name = some[directory - len(others)]
                    assert row == alone[name], f"{name} among {some}"
        assert decoder.deaths == 0


def test_one_broken_file_among_63_photos_costs_one_row(
    photos: list[bytes], corpus: dict[str, Case], decoder: SubprocessDecoder
) -> None:
    others = (photos * 2)[:63]
    clean = _rows(decoder(others, _ids(others)))
    for name in ("JPEG cut at 50% of its scans", "a web page", "PNG of broken deflate", "empty"):
        batch = [*others[:20], corpus[name].data, *others[20:]]
        rows = _rows(decoder(batch, _ids(batch)))
        assert rows[:20] + rows[21:] == clean
        assert rows[20].fault


def test_messages_about_one_file_do_not_hide_the_damage_of_another(
    photos: list[bytes], decoder: SubprocessDecoder
) -> None:
    # libpng says a line for each of 20,000 broken comments in a PNG that is otherwise well, while
    # libjpeg says a single one for the damage that it decodes past.
    photo = Image.open(io.BytesIO(photos[0])).convert("RGB")
    png = encoded(photo.resize((40, 40)), "PNG")
    comment = chunk(b"tEXt", b"Comment\0x")[:-4] + b"oops"
    noisy = png[:33] + comment * 20_000 + png[33:]
    large = encoded(photo.resize((1600, 1200)), "JPEG", quality=95)
    truncated = large[: len(large) * 9 // 10].rstrip(b"\xff") + b"\xff\xd9"
    (expected,) = _rows(decoder([truncated], _ids([truncated])))
    assert expected.fault
    for batch in (
        [truncated, *[noisy] * 4],
        [*[noisy] * 4, truncated],
        [*photos[:9], noisy, truncated, noisy],
    ):
        rows = _rows(decoder(batch, _ids(batch)))
        assert rows[batch.index(truncated)] == expected
        assert [row.fault for row in rows].count(None) == len(batch) - 1


# -------------------------------------------------------------------------------- memory


def _peak_megabytes(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def test_a_false_size_in_a_file_allocates_no_memory(
    corpus: dict[str, Case], photos: list[bytes]
) -> None:
    claims = [name for name in corpus if "claiming" in name or "longer than itself" in name]
    claims += [name for name in corpus if "of EXIF, as it says" in name or "1500 scans" in name]
    claims += [name for name in corpus if "billion" in name or "past its end" in name]
    assert len(claims) > 30
    with SubprocessDecoder(PIXELS, batch_size=1, threads=2) as decoder:
        decoder(photos[:1], [bytes(16)])
        assert decoder._child
        before = _peak_megabytes(decoder._child.pid)
        for name in claims:
            decoder([corpus[name].data], [bytes(16)])
            took = _peak_megabytes(decoder._child.pid) - before
            assert took < 200, f"{name} took {took} MB"
        assert decoder.deaths == 0


# ------------------------------------------------------------------------------- mutants


def _small(photos: list[bytes], count: int) -> list[Image.Image]:
    images = [Image.open(io.BytesIO(photo)).convert("RGB") for photo in photos[:count]]
    return [image.resize((48 + n % 3 * 8, 48 + n % 2 * 16)) for n, image in enumerate(images)]


def _jpegs(images: list[Image.Image]) -> list[bytes]:
    """Small JPEGs of every kind that is decoded."""
    turned = Image.Exif()
    turned[0x0112] = 6
    ways: list[dict[str, object]] = [
        {},
        {"progressive": True},
        {"restart_marker_rows": 1},
        {"subsampling": "4:4:4", "exif": turned},
        {"optimize": True, "keep_rgb": True},
    ]
    files = [encoded(image, "JPEG", **ways[n % 5]) for n, image in enumerate(images)]
    files += [encoded(images[0].convert(mode), "JPEG") for mode in ("L", "CMYK")]
    return [*files, ycck(images[1])]


def _others(images: list[Image.Image]) -> list[bytes]:
    """Small files of every other kind."""
    files = []
    for image in images:
        seen_through = image.copy()
        seen_through.putalpha(Image.radial_gradient("L").resize(image.size))
        palette = image.quantize(64)
        for kind in ("PNG", "WEBP", "GIF", "AVIF", "TIFF", "JPEG2000", "PPM", "BMP"):
            files.append(encoded(image, kind))
        for kind in ("PNG", "WEBP", "GIF", "AVIF", "TIFF"):
            files.append(animated(image, kind))
        for kind in ("PNG", "WEBP", "TIFF", "AVIF", "BMP"):
            files.append(encoded(seen_through, kind))
        for way in ("tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits"):
            files.append(encoded(image, "TIFF", compression=way))
        files += [encoded(palette, kind) for kind in ("PNG", "TIFF", "BMP")]
        files += [encoded(palette, "PNG", transparency=3), interlaced(image)]
        files += [encoded(image, "WEBP", lossless=True), encoded(image.convert("1"), "PNG")]
    return files


def _decode_among_good(
    broken: Sequence[bytes], good: Sequence[bytes], decoder: SubprocessDecoder
) -> Iterator[Row]:
    """What broken files come out as, in batches of 64 with good ones between them."""
    clean = _rows(decoder(good, _ids(good)))
    assert not any(row.fault for row in clean)
    broken_per_batch = 64 - len(good)
    for first in range(0, len(broken), broken_per_batch):
        batch = list(broken[first : first + broken_per_batch])
        places = [number * len(batch) // len(good) for number in range(len(good))]
        for folder, photo in zip(reversed(places), reversed(good), strict=True):
            batch.insert(folder, photo)
        places = [place + number for number, place in enumerate(places)]
        rows = _rows(decoder(batch, _ids(batch)))
        assert len(rows) == len(batch)
        assert [rows[place] for place in places] == clean, f"a photo changed in batch {first}"
        yield from (row for place, row in enumerate(rows) if place not in places)


@pytest.mark.parametrize("kind", ["JPEG", "other"])
@pytest.mark.parametrize("count", [2_000, *slow_params(10_000)])
def test_mutated_files_are_decoded_or_faults_and_the_same_in_every_order(
    kind: str, count: int, photos: list[bytes], decoder: SubprocessDecoder
) -> None:
    images = _small(photos, 20)
    deaths = decoder.deaths
    seeds = _jpegs(images) if kind == "JPEG" else _others(images[:3])
    broken = list(mutants(seeds, count, seed=7))
    good = [encoded(image, "JPEG", quality=88) for image in images[:4]]
    rows = list(_decode_among_good(broken, good, decoder))
    assert decoder.deaths == deaths
    assert len(rows) == count
    for row in rows:
        assert row.fault is None or row.fault.partition(":")[0] in KINDS
        assert row.fault is None or row.fault.isprintable()
        assert row.fault is None or not any(row.pixels)
    # Half of them are still well, or nearly nothing was tried.
    assert 0.05 * count < sum(row.fault is None for row in rows) < 0.95 * count

    order = np.random.default_rng(8).permutation(count)
    with SubprocessDecoder(PIXELS, batch_size=64, threads=1) as other:
        again = list(_decode_among_good([broken[place] for place in order], good, other))
        assert other.deaths == 0
    changed = [int(place) for place, row in zip(order, again, strict=True) if row != rows[place]]
    assert not changed, [(n, broken[n][:4], rows[n].fault) for n in changed[:9]]


# ------------------------------------------------------------------------------- on disk


def test_unreadable_files_get_a_row_and_odd_names_are_preserved(
    photos: list[bytes], tmp_path: Path
) -> None:
    outcomes = on_disk(tmp_path, photos[0])
    config = BodyConfig(body="resnet18", weights="random")
    weights = load(config)
    body = Body(config.body, weights.state, pool="avg", mean=weights.mean, std=weights.std, size=32)
    catalog = sources.unlabelled_catalog(tmp_path)
    recipe = make_recipe(PIXELS, config, weights, body.width)
    worker = Worker(0, 1, "cpu", 2, lambda: None, lambda report: None)
    with FeaturePipeline(worker, body, recipe, PIXELS, ExtractConfig(batch_size=16)) as pump:
        runs = data_chunks.split_into_chunks(catalog.paths, 256)
        chunks = list(
            pump(((at, catalog.subset(rows)) for at, rows in enumerate(runs)), FeatureCache())
        )
    faults = {path: fault for c in chunks for path, fault in zip(c.paths, c.faults, strict=True)}
    assert all(path.isprintable() for path in faults)
    ended = {path_text.unescape_path(path): fault for path, fault in faults.items()}
    assert ended.keys() == outcomes.keys()
    for name, outcome in outcomes.items():
        kind = ended[name].partition(":")[0] if ended[name] else None
        assert kind in (outcome or {None}), name
