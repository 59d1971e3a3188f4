"""Files and folders are written completely or not at all, by one writer at a time."""

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
def other_process(code: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    """Run code in another process, which waits at each `say` for a line on its standard input."""
    setup = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom arrowhead import fileio\n"
        "def say(word):\n    print(word, flush=True)\n    sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", setup + code, *map(str, args)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def read_message(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def let_finish(process: subprocess.Popen[str]) -> int:
    process.communicate("go on\n", timeout=60)
    return process.returncode


# ------------------------------------------------------------------------------- locks

HOLD_LOCK = "with fileio.locked_output_folder(Path(sys.argv[1])):\n    say('held')\n"


def test_every_further_writer_is_refused_while_a_folder_is_locked(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "new" / "deeper"
    with other_process(HOLD_LOCK, folder) as first:
        assert read_message(first) == "held"
        for _ in "second", "third":
            with (
                pytest.raises(ConfigError, match="being written"),
                fileio.locked_output_folder(folder),
            ):
                pass
            assert (folder / ".lock").exists()
        assert let_finish(first) == 0, first.stderr
    assert list(tmp_path.iterdir()) == []  # the empty folder and its parent were removed
    with fileio.locked_output_folder(folder):
        (folder / "work").touch()
    assert (folder / "work").exists()


def test_unlocking_keeps_parent_folders_that_hold_other_files(tmp_path: Path) -> None:
    with fileio.locked_output_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "stranger").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["stranger"]


def test_only_one_process_holds_the_lock_while_lock_files_are_removed(tmp_path: Path) -> None:
    """Lock files are unlinked constantly; a process that locks an unlinked one must notice."""
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
    args = tmp_path / "folder", tmp_path / "mark"
    with (
        other_process(code, *args) as a,
        other_process(code, *args) as b,
        other_process(code, *args) as c,
    ):
        for process in (a, b, c):
            _, errors = process.communicate(timeout=100)
            assert process.returncode == 0, errors
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_removed_between_opening_and_locking_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = fcntl.flock, False

    def flock_after_removal(handle: int, what: int) -> None:
        nonlocal removed
        if not removed:
            (tmp_path / ".lock").unlink()  # as the previous writer does when it ends
            removed = True
        lock(handle, what)

    monkeypatch.setattr(fcntl, "flock", flock_after_removal)
    with (
        fileio.folder_lock(tmp_path),
        pytest.raises(ConfigError, match="being written"),
        fileio.folder_lock(tmp_path),
    ):
        pass


def test_a_file_system_without_locks_is_reported_and_writing_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock_unsupported(handle: int, what: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock_unsupported)
    output: list[str] = []
    with fileio.folder_lock(tmp_path, output.append):
        fileio.write_json(tmp_path / "a.json", 1)
    assert len(output) == 1
    assert str(tmp_path) in output[0] and "no file locks" in output[0]


# ----------------------------------------------------------------------------- folders


def write_files(folder: Path, text: str) -> None:
    (folder / "deep").mkdir()
    for name in ("a", "deep/b"):
        (folder / name).write_text(text)


def read_files(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def expected_files(text: str) -> dict[str, str]:
    return {"a": text, "deep/b": text}


@pytest.fixture(params=["exchange", "two renames"])
def rename_method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without renameat2."""
    if request.param == "two renames":
        monkeypatch.setattr(fileio, "RENAME_EXCHANGE", 1 << 20)  # the kernel answers EINVAL
    return str(request.param)


def test_a_folder_is_replaced_completely_and_the_previous_one_is_kept_on_request(
    tmp_path: Path, rename_method: str
) -> None:
    path, previous = tmp_path / "it", tmp_path / "it.previous"
    for number, text in enumerate(["one", "two", "three"]):
        with fileio.atomic_folder(path, previous) as folder:
            write_files(folder, text)
            if number:
                assert read_files(path) == expected_files(["one", "two"][number - 1])
        assert read_files(path) == expected_files(text)
    assert read_files(previous) == expected_files("two")
    with fileio.atomic_folder(path) as folder:
        write_files(folder, "four")
    assert read_files(path) == expected_files("four")
    assert {entry.name for entry in tmp_path.iterdir()} == {"it", "it.previous"}


def test_a_failed_write_leaves_the_previous_folder_and_no_draft(tmp_path: Path) -> None:
    with fileio.atomic_folder(tmp_path / "it") as folder:
        write_files(folder, "one")
    with pytest.raises(KeyboardInterrupt), fileio.atomic_folder(tmp_path / "it") as folder:
        (folder / "a").write_text("half")
        raise KeyboardInterrupt
    assert read_files(tmp_path / "it") == expected_files("one")
    assert [entry.name for entry in tmp_path.iterdir()] == ["it"]


def test_writing_to_a_symlink_replaces_its_target_and_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "it").symlink_to(tmp_path / "elsewhere")
    with fileio.atomic_folder(tmp_path / "it") as folder:
        write_files(folder, "one")
    assert (tmp_path / "it").is_symlink()
    assert read_files(tmp_path / "elsewhere") == expected_files("one")


KILLED_WRITER = """
folder = Path(sys.argv[1])
with fileio.atomic_folder(folder) as draft:
    (draft / "a").write_text("half")
    say("in the middle")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_the_old_folder_and_the_next_writer_removes_its_draft(
    tmp_path: Path,
) -> None:
    path = tmp_path / "it"
    with fileio.atomic_folder(path) as folder:
        write_files(folder, "one")
    with (
        other_process(KILLED_WRITER, path) as killed,
        other_process(KILLED_WRITER, path) as running,
    ):
        assert read_message(killed) == read_message(running) == "in the middle"
        assert let_finish(killed) == -signal.SIGKILL
        assert read_files(path) == expected_files("one")
        assert len(list(tmp_path.glob(".it.*.draft"))) == 2
        with fileio.atomic_folder(path) as folder:
            write_files(folder, "two")
        assert read_files(path) == expected_files("two")
        assert len(list(tmp_path.glob(".it.*.draft"))) == 1  # that of the running writer
    fileio.remove_stale_drafts(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["it"]


def test_a_kill_between_the_two_renames_leaves_a_folder_that_can_be_recovered(
    tmp_path: Path,
) -> None:
    path = tmp_path / "it"
    with fileio.atomic_folder(path) as folder:
        write_files(folder, "one")
    for rename_count in (1, 2, 3):
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
        with other_process(code, path, rename_count) as process:
            process.communicate(timeout=60)
            assert process.returncode == -signal.SIGKILL
        fileio.recover_folder(path)
        assert read_files(path) == ({"a": "two"} if rename_count > 1 else expected_files("one"))
        fileio.remove_stale_drafts(tmp_path)
        assert [entry.name for entry in tmp_path.iterdir()] == ["it"]


def test_in_the_working_directory_the_manifest_is_moved_into_place_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle is written in place; after a kill before any move it is not a valid bundle."""
    names = ["bundle.json", "golden", "images.safetensors", "weights.safetensors"]
    for moves in range(len(names) + 1):
        directory = tmp_path / str(moves)
        directory.mkdir()
        monkeypatch.chdir(directory)
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
        with other_process(code, directory, str(moves)) as process:
            process.communicate(timeout=60)
        assert (directory / "bundle.json").exists() == (moves == len(names))
        assert set(os.listdir(directory)) <= set(names)
        assert len(os.listdir(directory)) == moves


def test_drafts_of_files_are_removed_only_after_their_writer_has_ended(tmp_path: Path) -> None:
    code = "with fileio.atomic_write(Path(sys.argv[1])) as draft:\n    say('in the middle')\n"
    with other_process(code, tmp_path / "a.txt") as killed:
        assert read_message(killed) == "in the middle"
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
        write_files(folder, "one")
    with other_process(code, tmp_path / "it") as process:
        output, errors = process.communicate(timeout=60)
    assert f"{tmp_path / 'it'} cannot be written: File too large." in output, errors
    assert "run the same command again" in output
    assert read_files(tmp_path / "it") == expected_files("one")
    assert [entry.name for entry in tmp_path.iterdir()] == ["it"]
