"""The decoder of a device: what it gets wrong is found, decoded again on the CPU, and counted.

No GPU here: the device is the CPU, and its decoder fails on purpose.
"""

from __future__ import annotations

import ctypes
import functools
import io
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from arrowhead.decode import checked_codec, device_memory, geometry, headers
from arrowhead.decode.checked_codec import CheckedCodec
from arrowhead.decode.codecs import CpuCodec
from arrowhead.decode.decoder import Decoder
from arrowhead.decode.device_memory import DeviceMemory, DeviceMemoryError
from arrowhead.decode.pixels import Header, PixelConfig
from arrowhead.decode.worker_process import SubprocessDecoder, decode_in_turn
from arrowhead.features.captured_body import CapturedBody

Images = list[torch.Tensor]
BATCH = 250


def jpeg(pixels: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90, **options)
    return out.getvalue()


def drawn_photos(count: int) -> list[bytes]:
    """Photos of 64 x 48: blobs of random colours, so that no two look alike."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (count, 6, 8, 3), dtype=np.uint8)
    bicubic = Image.Resampling.BICUBIC
    return [jpeg(np.asarray(Image.fromarray(one).resize((64, 48), bicubic))) for one in coarse]


@pytest.fixture(scope="module")
def photos() -> list[Header]:
    read = [headers.read_header(data, PixelConfig()) for data in drawn_photos(1000)]
    return [header for header in read if isinstance(header, Header)]


@pytest.fixture(scope="module")
def cpu() -> CpuCodec:
    return CpuCodec(1)


class FailingCodec:
    """A decoder that decodes all images of a batch but `victim`, with which it does `damage`."""

    def __init__(self, damage: Callable[[Images, int, Images], None]) -> None:
        self.damage, self.victim = damage, -1
        self._cpu, self._memory = CpuCodec(1), None

    def __call__(self, headers: list[Header], images: Images) -> list[bool]:
        before = [image.clone() for image in images]
        decoded = self._cpu.decode_into(headers, images)
        if self.victim >= 0:
            self.damage(images, self.victim, before)
        return decoded


def skip(images: Images, victim: int, before: Images) -> None:
    images[victim].copy_(before[victim])


def skip_the_lower_half(images: Images, victim: int, before: Images) -> None:
    images[victim][24:] = before[victim][24:]


def blacken(images: Images, victim: int, before: Images) -> None:
    images[victim].zero_()


def show_another(images: Images, victim: int, before: Images) -> None:
    images[victim].copy_(images[(victim + 1) % len(images)])


def swap(images: Images, victim: int, before: Images) -> None:
    other = images[(victim + 7) % len(images)]
    other_pixels = other.clone()
    other.copy_(images[victim])
    images[victim].copy_(other_pixels)


def decode_all(
    codec: FailingCodec, cpu: CpuCodec, photos: list[Header], victim: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Decode in batches. Which were found wrong, and the pixels after that."""
    checked = CheckedCodec(codec, cpu, "cpu")
    wrong, pixels = [], []
    for start in range(0, len(photos), BATCH):
        codec.victim = victim - start if start <= victim < start + BATCH else -1
        part = photos[start : start + BATCH]
        result = checked(part, [b"\1" * 16] * len(part))  # ids of which none asks for a check
        wrong.append(result.wrong)
        pixels += [image.numpy().copy() for image in result.images]
    return np.concatenate(wrong), pixels


@pytest.mark.parametrize("damage", [skip, skip_the_lower_half, blacken, show_another, swap])
def test_one_bad_image_of_a_thousand_is_found_every_time_and_repaired(
    damage: Callable[[Images, int, Images], None], photos: list[Header], cpu: CpuCodec
) -> None:
    expected = cpu(photos)
    for victim in np.random.default_rng(1).integers(0, len(photos), 4).tolist():
        wrong, pixels = decode_all(FailingCodec(damage), cpu, photos, victim)
        first = victim - victim % BATCH
        both = {victim, first + (victim - first + 7) % BATCH} if damage is swap else {victim}
        assert set(np.flatnonzero(wrong).tolist()) == both
        for row, (given, its) in enumerate(zip(pixels, expected, strict=True)):
            assert np.array_equal(given, its), row


def test_a_correct_decoder_is_never_blamed_also_for_black_and_plain_photos(
    photos: list[Header], cpu: CpuCodec
) -> None:
    plain = [np.full((48, 64, 3), level, np.uint8) for level in (0, 2, 61, 128, 198, 249, 255)]
    half = [np.where(np.arange(48)[:, None, None] < 24, image, 90) for image in plain]
    files = [jpeg(image.astype(np.uint8)) for image in plain + half]
    odd = [headers.read_header(file, PixelConfig()) for file in files]
    wrong, _ = decode_all(FailingCodec(skip), cpu, [*photos, *odd], -1)
    assert not wrong.any()


def test_an_image_swapped_for_one_with_the_same_plain_top_is_found(cpu: CpuCodec) -> None:
    """Product photos: white backgrounds, so that the first rows say nothing."""
    rng = np.random.default_rng(0)
    white = np.full((8, 48, 64, 3), 255, np.uint8)
    white[:, 20:, 10:50] = rng.integers(0, 255, (8, 1, 1, 3))
    products = [headers.read_header(jpeg(image), PixelConfig()) for image in white]
    wrong, pixels = decode_all(FailingCodec(swap), cpu, products, 0)
    assert np.flatnonzero(wrong).tolist() == [0, 7]
    assert all(np.array_equal(*pair) for pair in zip(pixels, cpu(products), strict=True))


def test_a_partly_wrong_image_is_found_where_its_batch_is_under_suspicion(
    photos: list[Header], cpu: CpuCodec
) -> None:
    def damage(images: Images, victim: int, before: Images) -> None:
        images[victim].zero_()
        images[victim + 1][24:] = 0  # its first rows are right

    wrong, _ = decode_all(FailingCodec(damage), cpu, photos[:BATCH], 3)
    assert np.flatnonzero(wrong).tolist() == [3, 4]
    codec = FailingCodec(lambda images, victim, before: images[victim][24:].zero_())
    codec.victim = 3
    chosen = [bytes(16) if row == 3 else b"\1" * 16 for row in range(BATCH)]
    result = CheckedCodec(codec, cpu, "cpu")(photos[:BATCH], chosen)
    assert np.flatnonzero(result.wrong).tolist() == [3]


def test_the_pattern_of_unwritten_memory_is_recognized_at_every_address(cpu: CpuCodec) -> None:
    checked = CheckedCodec(cpu.decode_into, cpu, "cpu")
    shapes = np.array([(17, 23), (1, 1), (64, 64)], np.int64)
    _, offsets = checked._fill_memory(shapes)
    for grid in (checked_codec.TOP_GRID, checked_codec.WHOLE_GRID):
        positions = checked_codec.grid_positions(shapes, grid, None, offsets)
        assert checked_codec.is_unwritten(checked._sample(positions), positions).all()


# ------------------------------------------------------------- the path of a GPU, on the CPU


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_the_path_of_a_device_gives_the_pixels_of_the_cpu_path(resize: str) -> None:
    """Every orientation, odd sizes, augmented views, other formats, faults in between."""
    rng = np.random.default_rng(0)
    files, turned = [], Image.Exif()
    for orientation in range(1, 9):
        turned[0x0112] = orientation
        files.append(jpeg(rng.integers(0, 255, (41, 57, 3), dtype=np.uint8), exif=turned))
    png = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (30, 50, 4), dtype=np.uint8)).save(png, "PNG")
    opaque = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (30, 50, 3), dtype=np.uint8)).save(opaque, "PNG")
    files[3:3] = [b"", png.getvalue(), opaque.getvalue(), files[0][:900]]
    ids = [bytes([row]) * 16 for row in range(len(files))]
    config = PixelConfig(size=32, resize=resize, views=3, augment="top-down")
    results = [
        Decoder(config, batch_size=16, threads=1, device=device)(files, ids)
        for device in (None, "cpu")
    ]
    assert results[0].faults == results[1].faults
    assert [fault is not None for fault in results[0].faults].count(True) == 2
    assert results[0].sizes == results[1].sizes
    for by_cpu, by_device in zip(results[0].views, results[1].views, strict=True):
        assert isinstance(by_device, torch.Tensor)
        assert np.array_equal(by_cpu, by_device.numpy())


def test_what_the_device_got_wrong_is_repaired_and_counted_through_the_child_process() -> None:
    files = drawn_photos(32)
    ids = [bytes(16)] * 32
    config = PixelConfig(size=32)
    expected = Decoder(config, batch_size=32, threads=1)(files, ids)
    codec = FailingCodec(blacken)
    codec.victim = 5
    result = Decoder(config, batch_size=32, threads=1, device="cpu", codec=codec)(files, ids)
    assert result.repaired == 1
    assert np.array_equal(result.views[0].numpy(), expected.views[0])
    with SubprocessDecoder(config, batch_size=32, threads=1, device="cpu") as decoder:
        result = decoder(files, ids)
        assert (result.repaired, decoder.on_device) == (0, False)
        assert np.array_equal(result.views[0], expected.views[0])


def test_a_batch_of_symmetries_is_the_same_as_turning_one_image_after_another() -> None:
    square = np.arange(5 * 5 * 3, dtype=np.uint8).reshape(5, 5, 3)

    def upright(image: np.ndarray, orientation: int) -> np.ndarray:
        image = image.transpose(1, 0, 2) if orientation >= 5 else image
        image = image[::-1] if orientation in (3, 4, 7, 8) else image
        return image[:, ::-1] if orientation in (2, 3, 6, 7) else image

    cases = [(o, turns, m) for o in range(1, 9) for turns in range(4) for m in (False, True)]
    orientation, turns, mirrored = (np.array(column) for column in zip(*cases, strict=True))
    symmetry = geometry.compose_symmetries(
        geometry.SYMMETRY_OF_ORIENTATION[orientation], geometry.symmetry_of_turns(turns, mirrored)
    )
    rows = np.arange(len(cases)) * 2  # not next to each other
    batch = np.stack([square] * len(cases))
    by_array = np.zeros((2 * len(cases), 5, 5, 3), np.uint8)
    by_tensor = torch.zeros(by_array.shape, dtype=torch.uint8)
    geometry.place(batch, symmetry, by_array, rows)
    geometry.place(torch.from_numpy(batch), symmetry, by_tensor, rows)
    for row, (o, quarter_turns, mirror) in zip(rows, cases, strict=True):
        expected = np.rot90(upright(square, o), quarter_turns)
        expected = expected[:, ::-1] if mirror else expected
        assert np.array_equal(by_array[row], expected), (o, quarter_turns, mirror)
    assert np.array_equal(by_array, by_tensor.numpy())


def test_two_decoders_in_turn_give_the_batches_in_order_with_the_pixels_of_one() -> None:
    files, config = drawn_photos(40), PixelConfig(size=16)
    batches = [
        SimpleNamespace(encoded=files[n : n + 6], image_ids=[bytes(16)] * len(files[n : n + 6]))
        for n in range(0, 40, 6)
    ]
    make = functools.partial(SubprocessDecoder, config, batch_size=6, threads=1)
    with make() as one, make() as other:
        for count in range(len(batches) + 1):
            done = list(decode_in_turn([one, other], batches[:count]))
            assert [id(batch) for batch, _ in done] == [id(batch) for batch in batches[:count]]
        both = np.concatenate([pixels.views[0] for _, pixels in done])
        alone = np.concatenate([pixels.views[0] for _, pixels in one.stream(batches)])
    assert np.array_equal(both, alone)


def test_a_graph_is_used_only_if_it_gives_the_same_bits() -> None:
    def body(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().flatten(1)[:, :4] * 0.1

    def stale(network: object, recorded: torch.Tensor) -> object:
        return lambda pixels: body(recorded)  # ignores its input

    def unable(network: object, recorded: torch.Tensor) -> object:
        raise RuntimeError("operation not permitted when stream is capturing")

    pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    for capture, graphs in ((lambda network, _: network, 1), (stale, 0), (unable, 0)):
        captured = CapturedBody(body, capture)
        assert all(torch.equal(captured(pixels), body(pixels)) for _ in range(5))
        assert captured.graphs == graphs


def test_shared_memory_of_a_gpu_is_refused_where_there_is_none_and_its_handle_survives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(DeviceMemoryError, match="cuda"):
            DeviceMemory.allocate((2, 2), 0)
    from cuda.bindings import runtime

    sent = bytes(range(64))

    def get_handle(pointer: int) -> tuple[int, object]:
        handle = runtime.cudaIpcMemHandle_t()
        ctypes.memmove(handle.getPtr(), sent, 64)
        return 0, handle

    def open_handle(handle: object, flags: object) -> tuple[int, int]:
        assert ctypes.string_at(handle.getPtr(), 64) == sent
        return 0, 4096

    freed: list[int] = []
    fake = SimpleNamespace(
        cudaSetDevice=lambda device: (0,),
        cudaMalloc=lambda count: (0, 4096) if count == 12 else (2, None),
        cudaFree=lambda pointer: (freed.append(pointer), (0,))[1],
        cudaIpcGetMemHandle=get_handle,
        cudaIpcOpenMemHandle=open_handle,
        cudaIpcMemHandle_t=runtime.cudaIpcMemHandle_t,
        cudaIpcMemLazyEnablePeerAccess=1,
    )
    monkeypatch.setattr(device_memory, "_runtime", lambda: fake)
    monkeypatch.setattr(device_memory, "_tensor_at", lambda pointer, shape, device: pointer)
    memory = DeviceMemory.allocate((3, 4), 0)
    assert DeviceMemory.attach(memory.handle, (3, 4), 0).pixels == memory.pixels == 4096
    memory.close()
    memory.close()
    assert freed == [4096]
