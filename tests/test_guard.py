"""The decoder process: a file that crashes or hangs it costs one row and two restarts.

The decoder has no hooks for tests. Python runs a `sitecustomize.py` on PYTHONPATH when it starts;
ours makes the decoder process crash when it reads a file with a mark.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from arrowhead import ConfigError, LostError
from arrowhead.decode import worker_process
from arrowhead.decode.pixels import PixelConfig
from arrowhead.decode.worker_process import SubprocessDecoder

PIXELS = PixelConfig(size=32, views=2)

# A JPEG may have any bytes after its end marker, so a file with a mark is valid.
SABOTAGE = """
import os, resource, signal, sys, time
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if sys.argv[0] == "-c":
    from arrowhead.decode import headers

    def give_up():
        raise MemoryError("marked")

    def be_slow():
        open(os.environ["AT_WORK"] + f"/{os.getpid()}", "w").close()
        time.sleep(1)

    ENDS = {
        b"mark: segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        b"mark: killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        b"mark: abort": os.abort,
        b"mark: exit": lambda: os._exit(1),
        b"mark: raise": give_up,
        b"mark: hang": lambda: time.sleep(3600),
        b"mark: slow": be_slow,
    }
    read_header = headers.read_header

    def sabotaged(data, config):
        for mark, end in ENDS.items():
            if data.endswith(mark):
                end()
        return read_header(data, config)

    headers.read_header = sabotaged
"""


@pytest.fixture
def new_interpreters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start decoder processes as the product does, where their start is what is tested."""
    monkeypatch.setattr(worker_process, "subprocess", subprocess)


@pytest.fixture
def sabotaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make every decoder's process that starts from now on run this first."""

    def install(program: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(program)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    install(SABOTAGE)
    return install


@pytest.fixture(scope="module")
def photos(image_folder: Path) -> list[bytes]:
    """32 synthetic JPEGs."""
    return [path.read_bytes() for path in sorted(image_folder.rglob("*.jpg"))[:32]]


@pytest.fixture(scope="module")
def clean(photos: list[bytes]) -> dict[bytes, bytes]:
    """All views of each photo, from a decoder that nothing happens to."""
    with SubprocessDecoder(PIXELS, batch_size=32, threads=2) as decoder:
        result = decoder(photos, _ids(photos))
    assert result.faults == [None] * 32
    return {photo: _pixels(result.views, row) for row, photo in enumerate(photos)}


@dataclass(frozen=True)
class Batch:
    encoded: Sequence[bytes]

    @property
    def image_ids(self) -> list[bytes]:
        return _ids(self.encoded)


def _ids(files: Sequence[bytes]) -> list[bytes]:
    return [zlib.crc32(data).to_bytes(16, "big") for data in files]


def _pixels(views: Sequence[np.ndarray], row: int) -> bytes:
    return b"".join(view[row].tobytes() for view in views)


def _marked(photo: bytes, way: str) -> bytes:
    return photo + b"mark: " + way.encode()


def _decoder(size: int = 8, timeout_seconds: float = 60.0) -> SubprocessDecoder:
    return SubprocessDecoder(PIXELS, batch_size=size, threads=2, timeout_seconds=timeout_seconds)


def _check_stream(
    decoder: SubprocessDecoder, batches: Iterable[Batch], clean: dict[bytes, bytes]
) -> list[str]:
    """The faults of these batches; every photo in them has to come out as it does alone."""
    batches = list(batches)
    faults = []
    for batch, (streamed_batch, result) in zip(batches, decoder.stream(batches), strict=True):
        assert streamed_batch is batch
        assert len(result.faults) == len(result.fallback) == len(batch.encoded)
        for row, data in enumerate(batch.encoded):
            if data in clean:
                assert result.faults[row] is None
                assert _pixels(result.views, row) == clean[data]
            else:
                assert result.faults[row]
                assert not any(_pixels(result.views, row))
                faults.append(result.faults[row])
    return faults


def _ends(process: int, seconds: float = 120.0) -> bool:
    """Whether a process ends (or is a corpse that its new parent has not buried yet)."""
    for _ in range(int(seconds / 0.05)):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


# ---------------------------------------------------------------------- files that kill


@pytest.mark.usefixtures("sabotaged")
@pytest.mark.parametrize(
    ("way", "words", "deaths"),
    [
        ("segfault", "killed by SIGSEGV", 2),
        ("abort", "killed by SIGABRT", 2),
        ("killed", "killed by SIGKILL", 1 + worker_process.MAX_KILLS_PER_FILE),
        ("exit", "exit code 1", 2),
        ("raise", "exit code 1", 2),
    ],
)
def test_a_file_that_crashes_the_decoder_becomes_a_fault_after_a_few_crashes(
    way: str, words: str, deaths: int, photos: list[bytes], clean: dict[bytes, bytes]
) -> None:
    batch = [*photos[:3], _marked(photos[3], way), *photos[4:8]]
    with _decoder() as decoder:
        assert _check_stream(decoder, [Batch(batch)], clean) == [f"decoder_crash: {words}"]
        assert decoder.deaths == deaths
        assert _check_stream(decoder, [Batch(photos[8:16])], clean) == []
        assert decoder.deaths == deaths


@pytest.mark.usefixtures("sabotaged")
def test_a_file_that_hangs_the_decoder_becomes_a_fault_and_no_process_is_left(
    photos: list[bytes], clean: dict[bytes, bytes]
) -> None:
    batches = [Batch([*photos[:2], _marked(photos[2], "hang"), photos[3]]), Batch(photos[4:8])]
    children = set()
    with _decoder(timeout_seconds=3) as decoder:
        decoder(photos[:1], _ids(photos[:1]))
        children.add(decoder._child.pid)
        assert _check_stream(decoder, batches, clean) == ["decoder_crash: no answer in 3 s"]
        children.add(decoder._child.pid)
        assert decoder.deaths == 2
    assert len(children) == 2
    assert all(_ends(child) for child in children)


@pytest.mark.usefixtures("sabotaged")
def test_crashing_files_anywhere_cost_only_their_own_rows(
    photos: list[bytes], clean: dict[bytes, bytes]
) -> None:
    def marked(number: int) -> bytes:
        return _marked(photos[number], "segfault")

    batches = [
        Batch([marked(0), *photos[1:8]]),  # its first file, with the next batch under way
        Batch(photos[8:16]),
        Batch([marked(16)]),  # alone
        Batch([]),
        Batch([*photos[17:20], marked(20), marked(21), *photos[22:23], marked(23)]),
        Batch([marked(24), marked(25)]),  # two batches under way, both deadly
        Batch([*photos[26:31], marked(31)]),  # the last file of the last batch
    ]
    with _decoder() as decoder:
        faults = _check_stream(decoder, batches, clean)
        assert faults == ["decoder_crash: killed by SIGSEGV"] * 8
        # One death for each batch that holds such files, one for each of the files.
        assert decoder.deaths <= 5 + 8
        assert _check_stream(decoder, [Batch(photos[:8])], clean) == []


@pytest.mark.usefixtures("sabotaged")
def test_batches_stay_in_order_after_crashes(
    photos: list[bytes], clean: dict[bytes, bytes]
) -> None:
    files = [_marked(p, "abort") if n % 9 == 4 else p for n, p in enumerate(photos)]
    batches = [Batch(files[first : first + 3]) for first in range(0, 32, 3)]
    with _decoder(size=3) as decoder:
        assert len(_check_stream(decoder, batches, clean)) == 4
        assert decoder.deaths == 8


@pytest.mark.usefixtures("sabotaged")
def test_a_crashing_file_has_the_same_fault_alone_and_among_others(photos: list[bytes]) -> None:
    marked = _marked(photos[0], "abort")
    with _decoder() as decoder:
        alone = decoder([marked], _ids([marked])).faults[0]
        among = decoder([*photos[1:4], marked], _ids([*photos[1:4], marked])).faults[3]
    assert alone == among == "decoder_crash: killed by SIGABRT"


@pytest.mark.slow
@pytest.mark.usefixtures("sabotaged")
def test_twenty_crashes_leak_no_file_descriptor_and_no_process(
    photos: list[bytes],
) -> None:
    deadly = [_marked(photo, "segfault") for photo in photos[:9]]
    children = set()
    before = sorted(os.listdir("/proc/self/fd"))
    with _decoder(size=9) as decoder:
        decoder(photos[:1], _ids(photos[:1]))
        held = len(os.listdir("/proc/self/fd"))
        while decoder.deaths < 20:
            decoder(deadly, _ids(deadly))
            decoder(photos[:1], _ids(photos[:1]))
            children.add(decoder._child.pid)
            assert len(os.listdir("/proc/self/fd")) == held
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert all(_ends(child) for child in children)


# -------------------------------------------------------------------- the child's own end


def test_a_child_killed_between_batches_costs_nothing(
    photos: list[bytes], clean: dict[bytes, bytes]
) -> None:
    with _decoder() as decoder:
        for first in (0, 8, 16):
            assert _check_stream(decoder, [Batch(photos[first : first + 8])], clean) == []
            os.kill(decoder._child.pid, signal.SIGKILL)
            assert _ends(decoder._child.pid)
        assert _check_stream(decoder, [Batch(photos[24:])], clean) == []
        assert decoder.deaths == 3


def test_a_child_killed_at_any_moment_of_a_stream_costs_nothing(
    photos: list[bytes], clean: dict[bytes, bytes]
) -> None:
    batches = [Batch(photos[first : first + 4]) for first in range(0, 32, 4)]
    with _decoder(size=4) as decoder:

        def batches_with_kills() -> Iterator[Batch]:
            for number, batch in enumerate(batches):
                if number in (2, 3, 6):  # while the one or two before are under way
                    os.kill(decoder._child.pid, signal.SIGKILL)
                yield batch

        rows = [
            _pixels(made.views, row)
            for batch, made in decoder.stream(batches_with_kills())
            for row in range(len(batch.encoded))
        ]
        assert rows == [clean[photo] for photo in photos]
        assert 1 <= decoder.deaths <= 3


def test_a_stream_that_is_abandoned_does_not_affect_the_next(
    photos: list[bytes], clean: dict[bytes, bytes]
) -> None:
    batches = [Batch(photos[first : first + 4]) for first in range(0, 16, 4)]
    with _decoder(size=4) as decoder:
        for _ in decoder.stream(batches):
            break
        assert _check_stream(decoder, [Batch(photos[20:24])], clean) == []

        def failing() -> Iterator[Batch]:
            yield from batches[:2]
            raise OSError("the disk is gone")

        with pytest.raises(OSError, match="the disk is gone"):
            list(decoder.stream(failing()))
        assert _check_stream(decoder, [Batch(photos[28:])], clean) == []


@pytest.mark.usefixtures("new_interpreters")
def test_closing_a_decoder_ends_its_process(photos: list[bytes]) -> None:
    decoder = _decoder()
    decoder(photos[:1], _ids(photos[:1]))
    child = decoder._child.pid
    assert Path(f"/proc/{child}").exists()
    decoder.close()
    assert not Path(f"/proc/{child}").exists()
    decoder.close()  # a second time is no harm


PARENT = """
import sys, time
from pathlib import Path
from arrowhead.decode.pixels import PixelConfig
from arrowhead.decode.worker_process import SubprocessDecoder

data = Path(sys.argv[1]).read_bytes()
decoder = SubprocessDecoder(PixelConfig(size=32), batch_size=1, threads=1)
decoder([data], [bytes(16)])
print(decoder._child.pid, flush=True)
if len(sys.argv) > 2:
    decoder([data + b"mark: hang"], [bytes(16)])
time.sleep(600)
"""


@pytest.mark.usefixtures("sabotaged")
@pytest.mark.parametrize("state", ["idle", "at work"])
def test_the_decoder_process_ends_if_its_parent_is_killed(
    state: str, photos: list[bytes], tmp_path: Path
) -> None:
    (tmp_path / "photo.jpg").write_bytes(photos[0])
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    result = [str(tmp_path / "photo.jpg"), *(["hang"] if state == "at work" else [])]
    parent = subprocess.Popen([sys.executable, program, *result], stdout=subprocess.PIPE, text=True)
    child = 0
    try:
        child = int(parent.stdout.readline())
        assert not _ends(child, 0.5)
        parent.kill()
        parent.wait()
        assert _ends(child)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        with suppress(ProcessLookupError):
            os.kill(child or parent.pid, signal.SIGKILL)


@pytest.mark.usefixtures("new_interpreters")
def test_a_child_that_cannot_start_is_refused_in_three_parts(
    sabotaged: Callable[[str], None], photos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "RETRY_DELAY_SECONDS", 0.0)
    before = sorted(os.listdir("/proc/self/fd"))
    sabotaged("import sys; sys.modules['nvidia.dali'] = None")
    with _decoder() as decoder:
        for _ in range(2):
            with pytest.raises(ConfigError, match="does not start") as error:
                decoder(photos[:1], _ids(photos[:1]))
            assert "nvidia.dali" in error.value.found
            assert "doctor" in error.value.do
        sabotaged("")
        assert decoder(photos[:1], _ids(photos[:1])).faults == [None]
    assert sorted(os.listdir("/proc/self/fd")) == before


# ------------------------------------------------------------------- killed from outside


@contextmanager
def _killing(
    decoder: SubprocessDecoder, times: int, ready: Callable[[int], bool] = lambda child: True
) -> Iterator[list[int]]:
    """Kill the next `times` children with SIGKILL, each when it is `ready`; gives those killed."""
    killed: list[int] = []
    ended = threading.Event()

    def kill_next() -> None:
        while len(killed) < times and not ended.is_set():
            child = decoder._child
            if child and child.pid not in killed and ready(child.pid):
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)
                    killed.append(child.pid)
            time.sleep(0.005)

    thread = threading.Thread(target=kill_next)
    thread.start()
    try:
        yield killed
    finally:
        ended.set()
        thread.join()


@pytest.mark.usefixtures("new_interpreters")
def test_a_child_killed_while_it_starts_is_started_again(
    photos: list[bytes], clean: dict[bytes, bytes]
) -> None:
    with _decoder() as decoder, _killing(decoder, worker_process.MAX_START_ATTEMPTS - 1) as killed:
        assert _check_stream(decoder, [Batch(photos[:8])], clean) == []
        assert len(killed) == worker_process.MAX_START_ATTEMPTS - 1


@pytest.mark.usefixtures("sabotaged")
def test_a_good_photo_is_no_crash_because_its_decoder_was_killed_from_outside(
    photos: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over its batch first, then over the photo alone, again and again."""
    monkeypatch.setenv("AT_WORK", str(tmp_path))
    batch = [*photos[:3], _marked(photos[3], "slow"), *photos[4:8]]
    with _decoder() as decoder:
        with _killing(
            decoder,
            worker_process.MAX_KILLS_PER_FILE,
            lambda child: (tmp_path / str(child)).exists(),
        ) as killed:
            result = decoder(batch, _ids(batch))
        assert len(killed) == decoder.deaths == worker_process.MAX_KILLS_PER_FILE
    assert result.faults == [None] * 8
    ids = _ids(batch)
    with _decoder() as decoder:
        wanted = decoder(photos[:8], ids)
    assert [_pixels(result.views, row) for row in range(8)] == [
        _pixels(wanted.views, row) for row in range(8)
    ]


def test_a_decoder_that_is_always_killed_while_it_starts_is_refused_and_the_file_is_not_blamed(
    sabotaged: Callable[[str], None], photos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "RETRY_DELAY_SECONDS", 0.0)
    sabotaged(
        "import os, signal, sys; sys.argv[0] == '-c' and os.kill(os.getpid(), signal.SIGKILL)"
    )
    with _decoder() as decoder, pytest.raises(LostError) as refusal:
        decoder(photos[:1], _ids(photos[:1]))
    assert "while it started" in refusal.value.found
    assert "memory" in refusal.value.wanted
    assert "--workers" in refusal.value.do


@pytest.mark.slow
@pytest.mark.usefixtures("sabotaged")
def test_files_that_are_killed_one_after_another_are_the_machines_fault(
    photos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "RETRY_DELAY_SECONDS", 0.0)
    monkeypatch.setattr(worker_process, "MAX_KILLS_PER_FILE", 1)
    deadly = [_marked(photo, "killed") for photo in photos[:8]]
    with _decoder() as decoder:
        with pytest.raises(LostError, match=f"{worker_process.MAX_KILLED_FILES} files in a row"):
            decoder(deadly, _ids(deadly))
        assert decoder(photos[:8], _ids(photos[:8])).faults == [None] * 8
        few = deadly[: worker_process.MAX_KILLED_FILES - 1] + photos[4:8]
        for _ in range(2):  # a well one in between: not in a row
            faults = decoder(few, _ids(few)).faults
            assert faults == ["decoder_crash: killed by SIGKILL"] * 4 + [None] * 4


# ------------------------------------------------------------------------------ the slots


def test_files_of_50_megabytes_are_decoded(photos: list[bytes], clean: dict[bytes, bytes]) -> None:
    # A photo followed by a film, as phones write them.
    film = np.random.default_rng(0).bytes(50_000_000)
    large_files = [photos[0] + film, photos[1] + film]
    with _decoder(size=4) as decoder:
        result = decoder([*large_files, photos[2]], _ids(photos[:3]))
        assert result.faults == [None] * 3
        assert [_pixels(result.views, row) for row in range(3)] == [clean[p] for p in photos[:3]]
        # The child gives the memory of the encoded bytes back once it has read them.
        assert all(os.fstat(slot.encoded).st_size == 0 for slot in decoder._slots)


def test_an_empty_batch_has_no_rows_and_starts_no_process() -> None:
    with _decoder() as decoder:
        result = decoder([], [])
        assert [len(view) for view in result.views] == [0, 0]
        assert (result.faults, result.fallback) == ([], [])
        assert decoder._child is None


def test_the_stderr_file_of_the_decoder_process_is_bounded(photos: list[bytes]) -> None:
    # Each of these makes libjpeg and nvImageCodec complain in many words.
    truncated = [photo[: len(photo) // 2] for photo in photos]
    with _decoder(size=32) as decoder:
        for _ in range(60):
            assert all(decoder(truncated, _ids(truncated)).faults)
        assert os.fstat(decoder._stderr.fileno()).st_size < 2 * 2**20
        assert decoder.deaths == 0
