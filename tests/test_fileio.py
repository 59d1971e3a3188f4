"""Files and folders are written whole or not at all, by one writer at a time; after kills, too."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from arrowhead import ConfigError, fileio


@contextmanager
def other(code: str, *words: object) -> Iterator[subprocess.Popen[str]]:
    """Another process, stopped where it says so; it goes on when told anything."""
    setup = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom arrowhead import fileio\n"
        "def say(word):\n    print(word, flush=True)\n    sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", setup + code, *map(str, words)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> int:
    process.communicate("go on\n", timeout=60)
    return process.returncode


# ------------------------------------------------------------------------------- locks

HOLD = "with fileio.locked_output_folder(Path(sys.argv[1])):\n    say('held')\n"


def test_a_refused_second_writer_leaves_the_lock_of_the_first_so_a_third_is_refused_too(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "new" / "deeper"
    with other(HOLD, folder) as first:
        assert heard(first) == "held"
        for _ in "second", "third":
            with (
                pytest.raises(ConfigError, match="being written"),
                fileio.locked_output_folder(folder),
            ):
                pass
            assert (folder / ".lock").exists()
        assert tell(first) == 0, first.stderr
    assert list(tmp_path.iterdir()) == []  # nothing was put into it: it went, and so did its parent
    with fileio.locked_output_folder(folder):
        (folder / "work").touch()
    assert (folder / "work").exists()


def test_files_of_others_and_parent_folders_are_kept(tmp_path: Path) -> None:
    with fileio.locked_output_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "stranger").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["stranger"]


def test_only_one_at_a_time_writes_while_the_lock_comes_and_goes(tmp_path: Path) -> None:
    """Lock files are unlinked all the time here: whoever locks an unlinked one must notice."""
    code = (
        "from arrowhead import ConfigError\n"
        "folder, mark = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "for _ in range(400):\n"
        "    try:\n"
        "        with fileio.locked_output_folder(folder):\n"
        "            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))\n"
        "            mark.unlink()\n"
        "    except ConfigError:\n"
        "        pass\n"
    )
    words = tmp_path / "folder", tmp_path / "mark"
    with other(code, *words) as a, other(code, *words) as b, other(code, *words) as c:
        for process in (a, b, c):
            _, errors = process.communicate(timeout=100)
            assert process.returncode == 0, errors
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_removed_between_opening_and_locking_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = fcntl.flock, False

    def late(handle: int, what: int) -> None:
        nonlocal removed
        if not removed:
            (tmp_path / ".lock").unlink()  # as the writer before does at its end
            removed = True
        lock(handle, what)

    monkeypatch.setattr(fcntl, "flock", late)
    with (
        fileio.folder_lock(tmp_path),
        pytest.raises(ConfigError, match="being written"),
        fileio.folder_lock(tmp_path),
    ):
        pass


def test_a_disk_without_locks_is_reported_and_the_work_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(handle: int, what: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    output: list[str] = []
    with fileio.folder_lock(tmp_path, output.append):
        fileio.write_json(tmp_path / "a.json", 1)
    assert len(output) == 1
    assert str(tmp_path) in output[0] and "no file locks" in output[0]


# ----------------------------------------------------------------------------- folders


def fill(folder: Path, word: str) -> None:
    (folder / "deep").mkdir()
    for name in ("a", "deep/b"):
        (folder / name).write_text(word)


def content(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def whole(word: str) -> dict[str, str]:
    return {"a": word, "deep/b": word}


@pytest.fixture(params=["exchange", "two renames"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without renameat2."""
    if request.param == "two renames":
        monkeypatch.setattr(fileio, "RENAME_EXCHANGE", 1 << 20)  # the kernel answers EINVAL
    return str(request.param)


def test_a_folder_is_replaced_completely_and_the_previous_one_is_kept_on_request(
    tmp_path: Path, disk: str
) -> None:
    path, previous = tmp_path / "it", tmp_path / "it.previous"
    for number, word in enumerate(["one", "two", "three"]):
        with fileio.atomic_folder(path, previous) as folder:
            fill(folder, word)
            if number:
                assert content(path) == whole(["one", "two"][number - 1])
        assert content(path) == whole(word)
    assert content(previous) == whole("two")
    with fileio.atomic_folder(path) as folder:
        fill(folder, "four")
    assert content(path) == whole("four")
    assert {one.name for one in tmp_path.iterdir()} == {"it", "it.previous"}


def test_a_folder_whose_making_fails_leaves_the_one_before_and_no_draft(tmp_path: Path) -> None:
    with fileio.atomic_folder(tmp_path / "it") as folder:
        fill(folder, "one")
    with pytest.raises(KeyboardInterrupt), fileio.atomic_folder(tmp_path / "it") as folder:
        (folder / "a").write_text("half")
        raise KeyboardInterrupt
    assert content(tmp_path / "it") == whole("one")
    assert [one.name for one in tmp_path.iterdir()] == ["it"]


def test_a_link_to_a_folder_stays_a_link_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "it").symlink_to(tmp_path / "elsewhere")
    with fileio.atomic_folder(tmp_path / "it") as folder:
        fill(folder, "one")
    assert (tmp_path / "it").is_symlink()
    assert content(tmp_path / "elsewhere") == whole("one")


KILLED = """
folder = Path(sys.argv[1])
with fileio.atomic_folder(folder) as draft:
    (draft / "a").write_text("half")
    say("in the middle")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_the_old_folder_and_the_next_writer_sweeps(tmp_path: Path) -> None:
    path = tmp_path / "it"
    with fileio.atomic_folder(path) as folder:
        fill(folder, "one")
    with other(KILLED, path) as killed, other(KILLED, path) as living:
        assert heard(killed) == heard(living) == "in the middle"
        assert tell(killed) == -signal.SIGKILL
        assert content(path) == whole("one")
        assert len(list(tmp_path.glob(".it.*.draft"))) == 2
        with fileio.atomic_folder(path) as folder:
            fill(folder, "two")
        assert content(path) == whole("two")
        assert len(list(tmp_path.glob(".it.*.draft"))) == 1  # of the one that is at work
    fileio.remove_stale_drafts(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["it"]


def test_a_kill_between_the_two_renames_leaves_a_folder_that_the_next_one_brings_back(
    tmp_path: Path,
) -> None:
    path = tmp_path / "it"
    with fileio.atomic_folder(path) as folder:
        fill(folder, "one")
    for moment in (1, 2, 3):
        code = (
            "fileio.RENAME_EXCHANGE = 1 << 20\n"
            "rename, left = Path.rename, [int(sys.argv[2])]\n"
            "def dying(self, target):\n"
            "    left[0] -= 1\n"
            "    made = rename(self, target)\n"
            "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return made\n"
            "Path.rename = dying\n"
            "with fileio.atomic_folder(Path(sys.argv[1])) as draft:\n"
            "    (draft / 'a').write_text('two')\n"
        )
        with other(code, path, moment) as process:
            process.communicate(timeout=60)
            assert process.returncode == -signal.SIGKILL
        fileio.recover_folder(path)
        assert content(path) == ({"a": "two"} if moment > 1 else whole("one"))
        fileio.remove_stale_drafts(tmp_path)
        assert [one.name for one in tmp_path.iterdir()] == ["it"]


def test_the_folder_one_stands_in_has_the_file_that_vouches_for_all_only_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle written in place: killed before any of its moves, it is no bundle."""
    names = ["bundle.json", "golden", "images.safetensors", "weights.safetensors"]
    for moves in range(len(names) + 1):
        here = tmp_path / str(moves)
        here.mkdir()
        monkeypatch.chdir(here)
        code = (
            "import os\n"
            "moves, rename = int(sys.argv[2]), Path.rename\n"
            "def one_less(self, target):\n"
            "    global moves\n"
            "    moves -= 1\n"
            "    return rename(self, target) if moves >= 0 else os.kill(os.getpid(), 9)\n"
            "Path.rename = one_less\n"
            "with fileio.atomic_folder(Path(sys.argv[1])) as draft:\n"
            "    (draft / 'golden').mkdir()\n"
            "    for name in ('weights.safetensors', 'images.safetensors', 'bundle.json'):\n"
            "        (draft / name).write_text(name)\n"
            "        os.utime(draft / name, (0, 0))\n"
        )
        with other(code, here, str(moves)) as process:
            process.communicate(timeout=60)
        assert (here / "bundle.json").exists() == (moves == len(names))
        assert set(os.listdir(here)) <= set(names)
        assert len(os.listdir(here)) == moves


def test_drafts_of_files_are_swept_when_their_writer_is_gone_and_only_then(tmp_path: Path) -> None:
    code = "with fileio.atomic_write(Path(sys.argv[1])) as draft:\n    say('in the middle')\n"
    with other(code, tmp_path / "a.txt") as killed:
        assert heard(killed) == "in the middle"
        fileio.remove_stale_drafts(tmp_path)
        assert re.fullmatch(r"\.a\.txt\.[0-9a-f]{8}\.draft", os.listdir(tmp_path)[0])
    (tmp_path / ".mine.draft").touch()
    fileio.remove_stale_drafts(tmp_path)
    assert os.listdir(tmp_path) == [".mine.draft"]


def test_a_full_disk_while_a_folder_is_written_is_reported_and_leaves_no_draft(
    tmp_path: Path,
) -> None:
    """RLIMIT_FSIZE stands in for the full disk."""
    code = (
        "import resource\n"
        "from arrowhead import ConfigError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try:\n"
        "    with fileio.atomic_folder(Path(sys.argv[1])) as draft:\n"
        "        (draft / 'large').write_bytes(bytes(10_000))\n"
        "except ConfigError as error:\n"
        "    print(error.found, error.do)\n"
    )
    with fileio.atomic_folder(tmp_path / "it") as folder:
        fill(folder, "one")
    with other(code, tmp_path / "it") as process:
        output, errors = process.communicate(timeout=60)
    assert f"{tmp_path / 'it'} cannot be written: File too large." in output, errors
    assert "run the same command again" in output
    assert content(tmp_path / "it") == whole("one")
    assert [one.name for one in tmp_path.iterdir()] == ["it"]
