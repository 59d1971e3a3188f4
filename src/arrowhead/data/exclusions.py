"""Which files below a folder of images are ignored.

    system      hidden files, and those of operating systems (Thumbs.db, __MACOSX)
    own         what Arrowhead and MLflow write (a store, a bundle, scores, mlruns)
    sidecars    cat.txt, cat.json: neither the name nor the first bytes are those of an image

Ignored files are counted, except our own output: a command that runs again in the folder that it
wrote to gives the same counts. A file that is named like an image is never ignored.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_left
from contextlib import suppress

# Files of Windows, macOS, ext4 and network storage (Synology, QNAP).
SYSTEM_FILES = frozenset(
    b"Thumbs.db thumbs.db ehthumbs.db desktop.ini Desktop.ini $RECYCLE.BIN __MACOSX lost+found"
    b" @eaDir #recycle #snapshot @Recycle @Recently-Snapshot".split()
) | {b"System Volume Information"}
# What Arrowhead and MLflow write beside their output.
OWN_NAMES = frozenset(
    b"mlruns mlartifacts mlflow.db mlflow.db-journal mlflow.db-shm mlflow.db-wal .arrowhead .bundle"
    b" .lock lr_finder.png lr_finder.csv".split()
)
OWN_SUFFIXES = (
    b".training",
    b".draft",
)  # of hidden names: checkpoints, files that are being written
# A folder is ours if it holds one of these files, and the file contains this text.
OWN_MARKERS = {
    b"store.json": b'"seal"',
    b"bundle.json": b'"seal"',
    b"score.json": b'"bundle_fingerprint"',
    b"request.json": b'"runs"',
    b"report.json": b'"bundle_fingerprint"',
}
OWN_FIGURE_SUFFIXES = (
    "-confusion.png",
    "-learning-curve.png",
)  # earlier versions: beside their bundle
IMAGE_SUFFIXES = (
    b".jpg",
    b".jpeg",
    b".png",
    b".webp",
    b".bmp",
    b".tif",
    b".tiff",
    b".gif",
    b".avif",
)
IMAGE_SUFFIXES_BOTH_CASES = (*IMAGE_SUFFIXES, *(ending.upper() for ending in IMAGE_SUFFIXES))
# Suffixes of files that are not images, without the dot.
SIDECAR_SUFFIXES = frozenset(
    b"3gp 7z aac aae bak flv license lrv m2ts mts pp3"
    b" aac aae arff arrow avi bat bib bz2 cfg conf css csv dat data db dll doc docx dtd env"
    b" epub exe feather flac geojson gpx gz h5 hdf5 htm html ini ipynb jar joblib js json json5"
    b" jsonl kml kmz lnk lock log lst m4a m4v map mat md md5 mkv mov mp3 mp4 mpeg mpg msi names"
    b" ndjson npy npz nfo odp ods odt ogg onnx opus parquet pdf pickle pkl ppt pptx proto pt pth"
    b" py pyc rar rst rtf safetensors sh sha1 sha256 sql sqlite sqlite3 srt sum tar tex tfrecord"
    b" tfrecords tgz toml tsv txt url vtt wav webloc webm wmv xlsm xls xlsx xml xmp xsd xz yaml yml"
    b" zip zst".split()
)
# Names without a suffix of files that are not images, in any case.
SIDECAR_NAMES = frozenset(
    b"authors changelog contributing copying licence license makefile notice readme".split()
)
REGULAR_FILE = stat.S_IFREG >> 12
HEADER_BYTES = 16  # enough to recognize an image
IMAGE_SIGNATURES = (
    *(b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\xff\x0a"),
    *(b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"8BPS"),
)
IMAGE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")


def partition_names(names: list[bytes]) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Partition sorted names into those to list, hidden or system ones, and our own ones."""
    start, stop = bisect_left(names, b"."), bisect_left(names, b"/")  # names that start with a dot
    hidden = names[start:stop]
    ignored = {*hidden, *SYSTEM_FILES.intersection(names), *OWN_NAMES.intersection(names)}
    if not ignored:
        return names, [], []
    own = {name for name in ignored if is_own_name(name)}
    return [name for name in names if name not in ignored], sorted(ignored - own), sorted(own)


def is_own_name(name: bytes) -> bool:
    """Whether a file or folder has a name that only Arrowhead or MLflow gives."""
    return name in OWN_NAMES or (name[:1] == b"." and name.endswith(OWN_SUFFIXES))


def is_own_folder(handle: int, names: list[bytes]) -> bool:
    """Whether an open folder with these entries is a store, a bundle, scores or a report."""
    for name in frozenset(OWN_MARKERS).intersection(names):
        with suppress(OSError):
            file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=handle)
            with os.fdopen(file, "rb") as stream:
                if OWN_MARKERS[name] in stream.read(2**26):
                    return True
    return False


def find_sidecars(
    handle: int, names: list[bytes], kinds: bytearray, keep: tuple[bytes, ...] = ()
) -> dict[int, bytes]:
    """The sidecars in an open folder: {index into `names`: kind}.

    Args:
        handle: Of the folder.
        names: Of the files in it.
        kinds: File type of each name, st_mode >> 12.
        keep: Suffixes, in lower case, of files that are no sidecars.
    """
    kinds_by_index = {}
    for i, name in enumerate(names):
        if name.endswith(IMAGE_SUFFIXES_BOTH_CASES) or kinds[i] != REGULAR_FILE:
            continue
        if keep and name.lower().endswith(keep):
            continue
        if kind := sidecar_kind(name):
            with suppress(OSError):  # an unreadable one stays a row, and becomes a fault
                file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=handle)
                try:
                    head = os.read(file, HEADER_BYTES)
                finally:
                    os.close(file)
                if not looks_like_image(head):
                    kinds_by_index[i] = kind
    return kinds_by_index


def sidecar_kind(name: bytes) -> bytes | None:
    """The suffix of a sidecar in lower case (.txt), or its name if it has none (README); None for
    other names.
    """
    _, dot, suffix = name.rpartition(b".")
    if dot:
        return b"." + suffix.lower() if suffix.lower() in SIDECAR_SUFFIXES else None
    return name if name.lower() in SIDECAR_NAMES else None


def looks_like_image(head: bytes) -> bool:
    """Whether a file starts like an image of any format, also of one that we cannot decode."""
    return (
        head.startswith(IMAGE_SIGNATURES)
        or (head[:2] == b"BM" and head[6:10] == bytes(4))  # a text may start with BM, too
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in IMAGE_BRANDS)
    )
