"""Run the decoder in a child process, since a file may crash it.

    batches                written to shared memory, two in flight at a time
      -> child process     decode.Decoder; reports when a batch is done
      -> pixels            copied out of shared memory, in the order of the batches; on a GPU that
                           memory is the GPU's, and no pixels pass through the host

If the child crashes or hangs, a new one is started and the files of its batch are decoded one by
one. A file that crashes a second child gets the fault `decoder_crash`; the others are not affected,
and nothing else is restarted.

A child that was killed from outside (SIGKILL, the out-of-memory killer) tells nothing about a file.
Its files are tried again with fewer threads, `MAX_KILLS_PER_FILE` times each. If that fails for
several files in a row, or if no child starts, the command is refused.

multiprocessing and Ray restart crashed workers, but neither finds the file that is to blame.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from arrowhead.decode.checked_codec import synchronize
from arrowhead.decode.decoder import MAX_STDERR_BYTES, Decoder
from arrowhead.decode.device_memory import DeviceMemory, DeviceMemoryError
from arrowhead.decode.pixels import (
    CROPPED_UPRIGHT,
    Device,
    PixelConfig,
    Pixels,
    check_decoder_rule,
    torch_device,
)
from arrowhead.errors import ConfigError, LostError

BATCHES_IN_FLIGHT = 2  # the child decodes one while the parent copies the other
STARTUP_TIMEOUT_SECONDS = 120.0  # takes two seconds on an idle machine
MAX_START_ATTEMPTS = 3
MAX_KILLS_PER_FILE = 4  # SIGKILLs while the child decodes only this file, before it gets a fault
MAX_KILLED_FILES = 5  # such files in a row, before the command is refused
RETRY_DELAY_SECONDS = 0.5  # times the number of failed attempts: memory may become free


class EncodedBatch(Protocol):
    """A batch of encoded files."""

    @property
    def encoded(self) -> Sequence[bytes]:
        """The bytes of B files."""

    @property
    def image_ids(self) -> Sequence[bytes]:
        """A 16-byte id of each."""


AnyBatch = TypeVar("AnyBatch", bound=EncodedBatch)


class WorkerDied(Exception):
    """The child process has died; from_outside: by SIGKILL, which no file causes."""

    def __init__(self, how: str, *, from_outside: bool = False) -> None:
        super().__init__(how)
        self.from_outside = from_outside


@dataclass(slots=True, eq=False)
class SharedSlot:
    """Memory shared with the child: encoded bytes for it, pixels from it."""

    encoded: int
    pixels: int
    pixels_by_view: NDArray[np.uint8]
    """(views, B, S, S, 3): the memory of `pixels`."""
    on_device: DeviceMemory | None = None
    """The same on a GPU, if its memory can be shared; then `pixels` is not used."""

    @staticmethod
    def allocate(shape: tuple[int, ...], device: Device) -> SharedSlot:
        """Allocate memory for pixels of this shape; that for encoded bytes grows as needed."""
        on_device = None
        if isinstance(device, int):
            with contextlib.suppress(DeviceMemoryError):
                on_device = DeviceMemory.allocate(shape, device)
        encoded, pixels = os.memfd_create("ah-encoded"), os.memfd_create("ah-pixels")
        os.ftruncate(pixels, int(np.prod(shape)))
        memory = mmap.mmap(pixels, 0, prot=mmap.PROT_READ)
        pixels_by_view = np.frombuffer(memory, np.uint8).reshape(shape)
        return SharedSlot(encoded, pixels, pixels_by_view, on_device)

    def close(self) -> None:
        """Free the memory."""
        self.pixels_by_view = np.empty(0, np.uint8)  # unmaps the memory
        os.close(self.encoded)
        os.close(self.pixels)
        if self.on_device is not None:
            self.on_device.close()


class SubprocessDecoder:
    """`decoder.Decoder` in a child process, with the same pixels.

    Use it as a context manager, or call `close`.

    Args:
        config: Size, views and limits.
        batch_size: Maximal number of files per batch.
        threads: Decoding threads of the child.
        device: Where to decode, see `Device`.
        timeout_seconds: Time for a batch, plus one second per megabyte, before the child counts as
            hung.
        rule: The recipe's `decoder`, one of DECODER_RULES.

    Attributes:
        deaths: How often the child died or hung.
        on_device: Whether pixels stay on the GPU. Without memory that two processes can share, the
            child copies them to the host.
    """

    def __init__(
        self,
        config: PixelConfig,
        *,
        batch_size: int,
        threads: int,
        device: Device = None,
        timeout_seconds: float = 60.0,
        rule: str = CROPPED_UPRIGHT,
    ) -> None:
        check_decoder_rule(rule)
        self._shape = (config.views, batch_size, config.side, config.side, 3)
        self._settings: dict[str, Any] = {
            "config": dataclasses.asdict(config),
            "batch_size": batch_size,
            "threads": threads,
            "device": device,
            "rule": rule,
        }
        self._timeout_seconds = timeout_seconds
        self._device = device
        self._slots = [SharedSlot.allocate(self._shape, device) for _ in range(BATCHES_IN_FLIGHT)]
        self.on_device = all(slot.on_device for slot in self._slots)
        self._copy_stream: Any = None
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._killed_files = 0  # in a row
        self.deaths = 0

    def __enter__(self) -> SubprocessDecoder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self, encoded: Sequence[bytes], image_ids: Sequence[bytes]) -> Pixels:
        """Decode one batch."""
        batch = _FileBatch(encoded, image_ids)
        return next(pixels for _, pixels in self.stream([batch]))

    def stream(self, batches: Iterable[AnyBatch]) -> Iterator[tuple[AnyBatch, Pixels]]:
        """Yield each batch with its pixels, in order, while the next one is being decoded."""
        waiting: deque[tuple[AnyBatch, SharedSlot]] = deque()
        try:
            for index, batch in enumerate(batches):
                slot, done = self._slots[index % BATCHES_IN_FLIGHT], None
                if len(waiting) == BATCHES_IN_FLIGHT:
                    done = waiting[0][0], self._receive(waiting)
                    waiting.popleft()
                waiting.append((batch, slot))
                self._send(batch, slot)
                if done:
                    yield done
            while waiting:
                last = waiting[0][0], self._receive(waiting)
                waiting.popleft()
                yield last
        finally:
            if waiting:  # discard unread replies, which the next stream must not get
                self._stop()

    def close(self) -> None:
        """Stop the child and free the shared memory."""
        self._stop()
        for slot in self._slots:
            slot.close()
        self._slots = []

    # ---- send a batch, receive its pixels

    def _send(self, batch: EncodedBatch, slot: SharedSlot) -> None:
        if not batch.encoded:
            return
        self._ensure_started()
        position = 0
        for data in batch.encoded:
            os.pwrite(slot.encoded, data, position)
            position += len(data)
        sizes = [len(data) for data in batch.encoded]
        names = [image_id.hex() for image_id in batch.image_ids]
        assert self._connection
        request = {"slot": self._slots.index(slot), "sizes": sizes, "ids": names}
        with contextlib.suppress(OSError):  # if the child has died, _read_reply finds out
            self._connection.send_bytes(json.dumps(request).encode())

    def _receive(self, waiting: deque[tuple[AnyBatch, SharedSlot]]) -> Pixels:
        """The pixels of the oldest batch; if the child died, its files are decoded one by one."""
        batch, slot = waiting[0]
        if not batch.encoded:
            return self._blank_pixels(0)
        try:
            return self._read_reply(batch, slot)
        except WorkerDied:
            pixels = self._decode_one_by_one(batch, slot)
        for later, its_slot in list(waiting)[1:]:
            self._send(later, its_slot)
        return pixels

    def _read_reply(self, batch: EncodedBatch, slot: SharedSlot) -> Pixels:
        """Wait for the reply to the batch in `slot`; WorkerDied if none comes."""
        assert self._connection and self._child
        seconds = self._timeout_seconds + sum(map(len, batch.encoded)) / 1e6
        try:
            if not self._connection.poll(seconds):
                self.deaths += 1
                self._stop()
                raise WorkerDied(f"no answer in {seconds:.0f} s")
            reply = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise self._on_worker_death() from None
        self._killed_files = 0
        return Pixels(self._copy_views(slot, len(batch.encoded)), **reply)

    def _copy_views(self, slot: SharedSlot, count: int) -> list[Any]:
        """Copies of the first `count` images of each view, after which the slot may be reused."""
        if not self.on_device or slot.on_device is None:
            return [view[:count].copy() for view in slot.pixels_by_view]
        import torch

        if self._copy_stream is None:
            self._copy_stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._copy_stream):  # not behind the network's work
            views = [view[:count].clone() for view in slot.on_device.pixels]
        self._copy_stream.synchronize()
        return views

    def _decode_one_by_one(self, batch: EncodedBatch, slot: SharedSlot) -> Pixels:
        """Decode each file of a batch that crashed the child in a separate batch."""
        self._ensure_started()  # which decides where the pixels are
        pixels, repaired = self._blank_pixels(len(batch.encoded)), 0
        for row, (data, image_id) in enumerate(zip(batch.encoded, batch.image_ids, strict=True)):
            try:
                decoded = self._decode_single(_FileBatch([data], [image_id]), slot)
            except WorkerDied as error:
                pixels.faults[row] = f"decoder_crash: {error}"
                continue
            pixels.faults[row], pixels.fallback[row] = decoded.faults[0], decoded.fallback[0]
            pixels.sizes[row] = decoded.sizes[0]
            repaired += decoded.repaired
            for view, decoded_view in zip(pixels.views, decoded.views, strict=True):
                view[row] = decoded_view[0]
        return dataclasses.replace(pixels, repaired=repaired)

    def _decode_single(self, file: _FileBatch, slot: SharedSlot) -> Pixels:
        """Decode one file; WorkerDied if it crashes the child."""
        for attempt in range(MAX_KILLS_PER_FILE):
            time.sleep(RETRY_DELAY_SECONDS * attempt)
            self._send(file, slot)
            try:
                return self._read_reply(file, slot)
            except WorkerDied as error:
                if not error.from_outside:
                    raise
                last_error = error
        self._killed_files += 1
        if self._killed_files >= MAX_KILLED_FILES:
            raise self._killed_error(f"while it decoded {self._killed_files} files in a row")
        raise last_error

    def _killed_error(self, when: str) -> LostError:
        return LostError(
            f"The decoder's process was killed again and again (SIGKILL) {when}.",
            "enough memory: the cause is nearly always the system's out-of-memory killer.",
            "free memory, or give fewer --workers, a smaller --batch-size or --max-pixels; the same"
            " command continues where it stopped.",
        )

    def _blank_pixels(self, count: int) -> Pixels:
        """Black pixels of `count` files without faults."""
        n_views, _, *square = self._shape
        views: list[Any] = [np.zeros((count, *square), np.uint8) for _ in range(n_views)]
        if self.on_device:
            import torch

            views = [torch.from_numpy(view).to(f"cuda:{self._device}") for view in views]
        return Pixels(views, [None] * count, [False] * count, [(0, 0)] * count)

    # ---- the child

    def _ensure_started(self) -> None:
        """Start a child and wait until it is ready, unless there is one."""
        for attempt in range(MAX_START_ATTEMPTS):
            if self._child is not None:
                return
            time.sleep(RETRY_DELAY_SECONDS * attempt)
            self._spawn()
            assert self._connection
            try:
                if not self._connection.poll(STARTUP_TIMEOUT_SECONDS):
                    raise WorkerDied(f"not ready after {STARTUP_TIMEOUT_SECONDS:.0f} s")
                self.on_device = json.loads(self._connection.recv_bytes())["on_device"]
                return
            except (EOFError, OSError):
                died = self._cause_of_death()
            except WorkerDied as error:
                died = error
            self._stderr.seek(0)
            stderr = self._stderr.read()[-2000:].decode(errors="replace")
            self._stop()
        if died.from_outside:
            raise self._killed_error("while it started")
        last_line = next((line for line in reversed(stderr.splitlines()) if line.strip()), "")
        raise ConfigError(
            f"The decoder's process does not start ({died}): {last_line.strip() or 'no message'}.",
            "DALI, nvImageCodec and Pillow, and on a GPU its driver, that load in a new process.",
            "run `arrowhead doctor`; `make setup` installs the locked versions.",
        ) from RuntimeError(stderr)

    def _spawn(self) -> None:
        own_end, child_end = _socket_pair()
        lifeline, parent_end = os.pipe()  # the child exits when parent_end is closed
        descriptors = [fd for slot in self._slots for fd in (slot.encoded, slot.pixels)]
        settings = {
            "connection": child_end,
            "lifeline": lifeline,
            "slots": descriptors,
            "device_memory": [
                slot.on_device.handle.hex()
                for slot in self._slots
                if self.on_device and slot.on_device is not None
            ],
            **self._settings,
        }
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in _stop
        self._child = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-P", "-c", WORKER_PROGRAM, json.dumps(settings)],
            pass_fds=[child_end, lifeline, *descriptors],
            env=_worker_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
        )
        os.close(child_end)
        os.close(lifeline)
        self._parent_end = parent_end
        self._connection = Connection(own_end)

    def _on_worker_death(self) -> WorkerDied:
        """Clean up after a death and return its cause. If the child was killed, the next one gets
        fewer threads, since each needs memory; the pixels do not depend on their number.
        """
        self.deaths += 1
        died = self._cause_of_death()
        self._stop()
        if died.from_outside:
            self._settings["threads"] = max(1, self._settings["threads"] // 2)
        return died

    def _cause_of_death(self) -> WorkerDied:
        assert self._child
        try:
            code = self._child.wait(10)  # writing a core dump takes time
        except subprocess.TimeoutExpired:
            code = 0
        if code >= 0:
            return WorkerDied(f"exit code {code}")
        return WorkerDied(
            f"killed by {signal.Signals(-code).name}", from_outside=-code == signal.SIGKILL
        )

    def _stop(self) -> None:
        """Kill the child if there is one."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        os.close(self._parent_end)
        self._stderr.close()
        if self._connection:
            self._connection.close()
        self._connection = None


def decode_in_turn(
    decoders: Sequence[SubprocessDecoder], batches: Iterable[AnyBatch]
) -> Iterator[tuple[AnyBatch, Pixels]]:
    """Like `SubprocessDecoder.stream`, but each decoder takes one batch after another in turn."""
    source, waiting = iter(batches), [deque[AnyBatch]() for _ in decoders]
    turns = itertools.cycle(waiting)

    def share(own: deque[AnyBatch]) -> Iterator[AnyBatch]:
        while True:
            while not own:
                try:
                    batch = next(source)
                except StopIteration:
                    return
                next(turns).append(batch)
            yield own.popleft()

    streams = [decoder.stream(share(own)) for decoder, own in zip(decoders, waiting, strict=True)]
    for stream in itertools.cycle(streams):
        done = next(stream, None)
        if done is None:
            return
        yield done


WORKER_PROGRAM = "from arrowhead.decode import worker_process; worker_process.serve()"


def _worker_environment() -> dict[str, str]:
    """Environment of the child: it imports this Arrowhead, nothing from the working directory."""
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def supported_formats() -> list[str]:
    """The image formats that can be decoded here, found by decoding a small image of each."""
    from PIL import Image

    kinds = ["JPEG", "PNG", "WebP", "BMP", "TIFF", "GIF", "AVIF"]
    images = []
    for kind in kinds:
        sheet = io.BytesIO()
        Image.new("RGB", (32, 32), (200, 100, 50)).save(sheet, kind)
        images.append(sheet.getvalue())
    with SubprocessDecoder(PixelConfig(size=32), batch_size=16, threads=1) as decoder:
        faults = decoder(images, [bytes(16)] * len(images)).faults
    return [kind for kind, fault in zip(kinds, faults, strict=True) if fault is None]


@dataclass(frozen=True, slots=True)
class _FileBatch:
    encoded: Sequence[bytes]
    image_ids: Sequence[bytes]


def _socket_pair() -> tuple[int, int]:
    import socket

    own_end, child_end = socket.socketpair()
    return own_end.detach(), child_end.detach()


# ------------------------------------------------------------------------ in the child


def serve() -> None:
    """Main function of the child: decode what the parent puts into the slots, until it exits."""
    settings = json.loads(sys.argv[-1])
    # The parent handles these signals; this process exits with it.
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, args=(settings["lifeline"],), daemon=True).start()
    connection = Connection(settings["connection"])
    config = PixelConfig(**settings["config"])
    decoder = Decoder(
        config,
        batch_size=settings["batch_size"],
        threads=settings["threads"],
        device=settings["device"],
        rule=settings["rule"],
        read_messages=_StderrReader().read_new,
    )
    host, on_device = _shared_memory(settings)
    connection.send_bytes(json.dumps({"on_device": bool(on_device)}).encode())
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        start_time = perf_counter()
        slot = request["slot"]
        ids = [bytes.fromhex(name) for name in request["ids"]]
        files = _read_files(settings["slots"][2 * slot], request["sizes"])
        if settings["device"] is None:
            pixels = decoder(files, ids, host[slot])
        elif on_device:
            pixels = decoder(files, ids, on_device[slot])
            synchronize(torch_device(settings["device"]))
        else:
            pixels = decoder(files, ids)
            for view, decoded in zip(host[slot], pixels.views, strict=True):
                view[: len(files)] = decoded.cpu().numpy()
        reply = {name: getattr(pixels, name) for name in REPLY}
        connection.send_bytes(json.dumps(reply | {"seconds": perf_counter() - start_time}).encode())


REPLY = ("faults", "fallback", "sizes", "repaired")


def _shared_memory(settings: dict[str, Any]) -> tuple[list[NDArray[np.uint8]], list[Any]]:
    """The pixels of each slot on the host; and on a GPU, if its memory can be shared."""
    config = PixelConfig(**settings["config"])
    shape = config.views, settings["batch_size"], config.side, config.side, 3
    host = [
        np.frombuffer(mmap.mmap(fd, 0), np.uint8).reshape(shape) for fd in settings["slots"][1::2]
    ]
    handles = [bytes.fromhex(handle) for handle in settings["device_memory"]]
    with contextlib.suppress(DeviceMemoryError):
        memories = [DeviceMemory.attach(one, shape, settings["device"]) for one in handles]
        return host, [memory.pixels for memory in memories]
    return host, []


def _read_files(memory: int, sizes: list[int]) -> list[bytes]:
    """Read the files of a slot, and free its memory if it is large."""
    position, files = 0, []
    for size in sizes:
        files.append(os.pread(memory, size, position))
        position += size
    if position > 2**25:
        os.ftruncate(memory, 0)
    return files


def _exit_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)  # returns when the parent closes its end or dies
    os._exit(0)


class _StderrReader:
    """Reads what is written to this process's stderr, also by C libraries."""

    def __init__(self) -> None:
        self._offset = os.lseek(2, 0, os.SEEK_END)

    def read_new(self) -> str:
        """What was written since the last call."""
        end = os.lseek(2, 0, os.SEEK_END)
        messages = os.pread(2, min(end - self._offset, MAX_STDERR_BYTES), self._offset)
        if end > 2**20:  # a folder of corrupt images causes many messages
            os.ftruncate(2, 0)
            os.lseek(2, 0, os.SEEK_SET)
            end = 0
        self._offset = end
        return messages.decode(errors="replace")
