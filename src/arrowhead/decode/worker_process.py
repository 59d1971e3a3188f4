"""The decoder in a process of its own, which may die.

    batches                written to shared memory, two under way at a time
      -> child process     decode.Decoder; says when a batch is done
      -> pixels            copied out of shared memory, in the order the batches came

No decoder is proof against every file. When the child dies or hangs, a new one is started and the
files it was at are tried one by one; a file that kills a second one is quarantined as a fault,
`decoder_crash`. Its mates come out as if it had not been there, and nothing else is restarted.

A child that was killed from outside (SIGKILL: the system's out-of-memory killer) says nothing about
a file. The file is tried again, with fewer threads, `MAX_KILLS` times; when several files in a row
come to nothing so, or when no child can be started, the command is refused instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
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

from arrowhead.decode.decoder import FLOOD, Decoder
from arrowhead.decode.pixels import CROPPED_UPRIGHT, PixelConfig, Pixels, must_know
from arrowhead.errors import ConfigError, LostError

UNDER_WAY = 2  # batches: the child has its next one while we take the last
START = 120.0  # seconds; two on a quiet machine
STARTS = 3  # attempts, before the command is refused
MAX_KILLS = 4  # deaths by SIGKILL, after which a file that is alone is taken for their cause
MAX_KILLED_FILES = 5  # such files in a row, after which the machine is
PAUSE = 0.5  # seconds before a second attempt, twice that before a third: memory may come free
LEAST = 16  # rows: networks compute a row to the same last bit in every batch of 16 or more


class Encoded(Protocol):
    """A batch as it comes in."""

    @property
    def encoded(self) -> Sequence[bytes]:
        """B files' bytes."""

    @property
    def image_ids(self) -> Sequence[bytes]:
        """16 bytes that name each."""


AnyBatch = TypeVar("AnyBatch", bound=Encoded)


class Died(Exception):
    """The child is gone, and how. from_outside: by SIGKILL, which no file makes it die of."""

    def __init__(self, how: str, *, from_outside: bool = False) -> None:
        super().__init__(how)
        self.from_outside = from_outside


@dataclass(slots=True, eq=False)
class Slot:
    """Memory shared with the child: encoded bytes one way, pixels the other."""

    encoded: int
    pixels: int
    squares: NDArray[np.uint8]
    """(views, B, S, S, 3): what lies in `pixels`."""

    @staticmethod
    def of(shape: tuple[int, ...]) -> Slot:
        """Memory for pixels of this shape, and as much as is needed for encoded bytes."""
        encoded, pixels = os.memfd_create("ah-encoded"), os.memfd_create("ah-pixels")
        os.ftruncate(pixels, int(np.prod(shape)))
        memory = mmap.mmap(pixels, 0, prot=mmap.PROT_READ)
        return Slot(encoded, pixels, np.frombuffer(memory, np.uint8).reshape(shape))

    def close(self) -> None:
        """Give the memory back."""
        self.squares = np.empty(0, np.uint8)  # the map goes with the array
        os.close(self.encoded)
        os.close(self.pixels)


class GuardedDecoder:
    """`decoder.Decoder` in a child process; the same pixels, in batches of at least 16 rows.

    batch_size: most files per batch. threads: the child's decoding threads. device: a CUDA device
    number or None. patience: seconds a batch may take, besides one per megabyte of files, before
    the child is taken for hung. rule: the recipe's `decoder` (`pixels.RULES`).
    Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        config: PixelConfig,
        *,
        batch_size: int,
        threads: int,
        device: int | None = None,
        patience: float = 60.0,
        rule: str = CROPPED_UPRIGHT,
    ) -> None:
        must_know(rule)
        self._shape = (config.views, batch_size, config.size, config.size, 3)
        self._settings: dict[str, Any] = {
            "config": dataclasses.asdict(config),
            "batch_size": batch_size,
            "threads": threads,
            "device": device,
            "rule": rule,
        }
        self._patience = patience
        self._slots = [Slot.of(self._shape) for _ in range(UNDER_WAY)]
        self._child: subprocess.Popen[bytes] | None = None
        self._line: Connection | None = None
        self._killed_files = 0  # in a row
        self.deaths = 0

    def __enter__(self) -> GuardedDecoder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self, encoded: Sequence[bytes], image_ids: Sequence[bytes]) -> Pixels:
        """Pixels and faults of one batch.

        views have at least 16 rows; those past the last file are black.
        """
        batch = _Batch(encoded, image_ids)
        return next(pixels for _, pixels in self.stream([batch]))

    def stream(self, batches: Iterable[AnyBatch]) -> Iterator[tuple[AnyBatch, Pixels]]:
        """Each batch and its pixels, in order; the next is under way while the last is taken."""
        waiting: deque[tuple[AnyBatch, Slot]] = deque()
        try:
            for number, batch in enumerate(batches):
                slot, done = self._slots[number % UNDER_WAY], None
                if len(waiting) == UNDER_WAY:
                    done = waiting[0][0], self._take(waiting)
                    waiting.popleft()
                waiting.append((batch, slot))
                self._give(batch, slot)
                if done:
                    yield done
            while waiting:
                last = waiting[0][0], self._take(waiting)
                waiting.popleft()
                yield last
        finally:
            if waiting:  # nobody will take these: the next stream must not get them
                self._end()

    def close(self) -> None:
        """End the child and give its memory back."""
        self._end()
        for slot in self._slots:
            slot.close()
        self._slots = []

    # ---- one batch there and back

    def _give(self, batch: Encoded, slot: Slot) -> None:
        if not batch.encoded:
            return
        self._start()
        at = 0
        for data in batch.encoded:
            os.pwrite(slot.encoded, data, at)
            at += len(data)
        sizes = [len(data) for data in batch.encoded]
        names = [image_id.hex() for image_id in batch.image_ids]
        assert self._line
        request = {"slot": self._slots.index(slot), "sizes": sizes, "ids": names}
        with contextlib.suppress(OSError):  # that the child has died shows when it is to answer
            self._line.send_bytes(json.dumps(request).encode())

    def _take(self, waiting: deque[tuple[AnyBatch, Slot]]) -> Pixels:
        """The pixels of the oldest batch; if the child died over it, of its files one by one."""
        batch, slot = waiting[0]
        if not batch.encoded:
            return self._blank(0)
        try:
            return self._answer(batch, slot)
        except Died:
            pixels = self._one_by_one(batch, slot)
        for later, its_slot in list(waiting)[1:]:
            self._give(later, its_slot)
        return pixels

    def _answer(self, batch: Encoded, slot: Slot) -> Pixels:
        """What the child says of the batch in `slot`; Died if it says nothing any more."""
        assert self._line and self._child
        seconds = self._patience + sum(map(len, batch.encoded)) / 1e6
        try:
            if not self._line.poll(seconds):
                self.deaths += 1
                self._end()
                raise Died(f"no answer in {seconds:.0f} s")
            said = json.loads(self._line.recv_bytes())
        except (EOFError, OSError):
            raise self._autopsy() from None
        self._killed_files = 0
        count = len(batch.encoded)
        blank = self._blank(count, filled=count)
        for view, made in zip(blank.views, slot.squares, strict=True):
            view[:count] = made[:count]
        return Pixels(blank.views, **said)

    def _one_by_one(self, batch: Encoded, slot: Slot) -> Pixels:
        """The files of a batch that a child died over, each in a batch of its own."""
        pixels = self._blank(len(batch.encoded))
        for row, (data, image_id) in enumerate(zip(batch.encoded, batch.image_ids, strict=True)):
            try:
                one = self._alone(_Batch([data], [image_id]), slot)
            except Died as again:
                pixels.faults[row] = f"decoder_crash: {again}"
                continue
            pixels.faults[row], pixels.fallback[row] = one.faults[0], one.fallback[0]
            for view, its_view in zip(pixels.views, one.views, strict=True):
                view[row] = its_view[0]
        return pixels

    def _alone(self, file: _Batch, slot: Slot) -> Pixels:
        """The pixels of one file; Died if it is the file that the child dies of."""
        for attempt in range(MAX_KILLS):
            time.sleep(PAUSE * attempt)
            self._give(file, slot)
            try:
                return self._answer(file, slot)
            except Died as death:
                if not death.from_outside:
                    raise
                last = death
        self._killed_files += 1
        if self._killed_files >= MAX_KILLED_FILES:
            raise self._no_memory(f"while it decoded {self._killed_files} files in a row")
        raise last

    def _no_memory(self, when: str) -> LostError:
        return LostError(
            f"The decoder's process was killed again and again (SIGKILL) {when}.",
            "memory for it: what ends it so is nearly always the system's out-of-memory killer.",
            "free memory, or give fewer --workers, a smaller --batch-size or --max-pixels; the same"
            " command goes on where it stopped.",
        )

    def _blank(self, count: int, filled: int = 0) -> Pixels:
        """Pixels of `count` files without a fault, black but for the first `filled` rows."""
        views, _, *square = self._shape
        rows = max(LEAST, count) if count else 0
        made = [np.empty((rows, *square), np.uint8) for _ in range(views)]
        for view in made:
            view[filled:] = 0
        return Pixels(made, [None] * count, [False] * count)

    # ---- the child

    def _start(self) -> None:
        """A child that is ready, unless there is one."""
        for attempt in range(STARTS):
            if self._child is not None:
                return
            time.sleep(PAUSE * attempt)
            self._spawn()
            assert self._line
            try:
                if not self._line.poll(START):
                    raise Died(f"not ready after {START:.0f} s")
                self._line.recv_bytes()  # ready
                return
            except (EOFError, OSError):
                death = self._cause_of_death()
            except Died as late:
                death = late
            self._stderr.seek(0)
            words = self._stderr.read()[-2000:].decode(errors="replace")
            self._end()
        if death.from_outside:
            raise self._no_memory("while it started")
        last = next((line for line in reversed(words.splitlines()) if line.strip()), "")
        raise ConfigError(
            f"The decoder's process does not start ({death}): {last.strip() or 'it says nothing'}.",
            "DALI, nvImageCodec and Pillow, and on a GPU its driver, that load in a new process.",
            "see what `arrowhead doctor` says; `make setup` installs what the lock names.",
        ) from RuntimeError(words)

    def _spawn(self) -> None:
        ours, theirs = _pair()
        life, hold = os.pipe()  # the child ends when no one holds this any more
        descriptors = [fd for slot in self._slots for fd in (slot.encoded, slot.pixels)]
        settings = {"line": theirs, "life": life, "slots": descriptors, **self._settings}
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the child
        self._child = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-P", "-c", PROGRAM, json.dumps(settings)],
            pass_fds=[theirs, life, *descriptors],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
        )
        os.close(theirs)
        os.close(life)
        self._hold = hold
        self._line = Connection(ours)

    def _autopsy(self) -> Died:
        """The line to the child is dead: what the child died of. The next one has fewer threads if
        it was killed: each holds memory of its own. (They change no pixel.)
        """
        self.deaths += 1
        death = self._cause_of_death()
        self._end()
        if death.from_outside:
            self._settings["threads"] = max(1, self._settings["threads"] // 2)
        return death

    def _cause_of_death(self) -> Died:
        assert self._child
        try:
            code = self._child.wait(10)  # a core dump takes its time
        except subprocess.TimeoutExpired:
            code = 0
        if code >= 0:
            return Died(f"exit code {code}")
        return Died(f"killed by {signal.Signals(-code).name}", from_outside=-code == signal.SIGKILL)

    def _end(self) -> None:
        """Kill the child, if there is one."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        os.close(self._hold)
        self._stderr.close()
        if self._line:
            self._line.close()
        self._line = None


PROGRAM = "from arrowhead.decode import worker_process; worker_process.serve()"


def _environment() -> dict[str, str]:
    """The child's: this Arrowhead is found first, and nothing in the folder we stand in is."""
    house = str(Path(__file__).resolve().parents[2])
    paths = [house, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def works() -> list[str]:
    """Kinds of files that open here, found by decoding one small image of each."""
    from PIL import Image

    kinds = ["JPEG", "PNG", "WebP", "BMP", "TIFF", "GIF", "AVIF"]
    images = []
    for kind in kinds:
        sheet = io.BytesIO()
        Image.new("RGB", (32, 32), (200, 100, 50)).save(sheet, kind)
        images.append(sheet.getvalue())
    with GuardedDecoder(PixelConfig(size=32), batch_size=16, threads=1) as decoder:
        faults = decoder(images, [bytes(16)] * len(images)).faults
    return [kind for kind, fault in zip(kinds, faults, strict=True) if fault is None]


@dataclass(frozen=True, slots=True)
class _Batch:
    encoded: Sequence[bytes]
    image_ids: Sequence[bytes]


def _pair() -> tuple[int, int]:
    import socket

    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


# ------------------------------------------------------------------------ in the child


def serve() -> None:
    """Decode what the parent puts into the slots, until it is gone."""
    settings = json.loads(sys.argv[-1])
    # The parent answers these; this process ends with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_until_alone, args=(settings["life"],), daemon=True).start()
    line = Connection(settings["line"])
    config = PixelConfig(**settings["config"])
    views, side = config.views, config.size
    decoder = Decoder(
        config,
        batch_size=settings["batch_size"],
        threads=settings["threads"],
        device=settings["device"],
        rule=settings["rule"],
        said=_Stderr().since,
    )
    squares = [
        np.frombuffer(mmap.mmap(fd, 0), np.uint8).reshape(views, -1, side, side, 3)
        for fd in settings["slots"][1::2]
    ]
    line.send_bytes(b"ready")
    while True:
        try:
            request = json.loads(line.recv_bytes())
        except (EOFError, OSError):
            return
        began = perf_counter()
        slot = request["slot"]
        ids = [bytes.fromhex(name) for name in request["ids"]]
        files = _files(settings["slots"][2 * slot], request["sizes"])
        pixels = decoder(files, ids, squares[slot])
        said: dict[str, Any] = {"faults": pixels.faults, "fallback": pixels.fallback}
        line.send_bytes(json.dumps(said | {"seconds": perf_counter() - began}).encode())


def _files(memory: int, sizes: list[int]) -> list[bytes]:
    """The files of a slot, and its memory given back."""
    at, files = 0, []
    for size in sizes:
        files.append(os.pread(memory, size, at))
        at += size
    if at > 2**25:
        os.ftruncate(memory, 0)
    return files


def _until_alone(life: int) -> None:
    os.read(life, 1)  # returns when the parent has closed its end, or died
    os._exit(0)


class _Stderr:
    """What is written to this process's stderr, by C libraries too."""

    def __init__(self) -> None:
        self._at = os.lseek(2, 0, os.SEEK_END)

    def since(self) -> str:
        """The words since the last call."""
        end = os.lseek(2, 0, os.SEEK_END)
        words = os.pread(2, min(end - self._at, FLOOD), self._at)
        if end > 2**20:  # a bad folder says a lot
            os.ftruncate(2, 0)
            os.lseek(2, 0, os.SEEK_SET)
            end = 0
        self._at = end
        return words.decode(errors="replace")
