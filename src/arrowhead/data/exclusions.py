"""Which files of a folder are no images to be worked on, though they lie among them.

    junk        hidden files, and those that systems leave (Thumbs.db, __MACOSX): left out, counted
    own         what Arrowhead and MLflow write (a store, a bundle, scores, mlruns): left out
    sidecars    cat.txt, cat.json: the name says that it is no image, and the first bytes agree

Our own output is not even counted: a command that is run again in the folder that it wrote to
gives the same counts. A file with the name of an image is never left out, whatever is in it.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_left
from contextlib import suppress

# Of Windows, macOS, ext4 and network storage (Synology, QNAP).
JUNK = frozenset(
    b"Thumbs.db thumbs.db ehthumbs.db desktop.ini Desktop.ini $RECYCLE.BIN __MACOSX lost+found"
    b" @eaDir #recycle #snapshot @Recycle @Recently-Snapshot".split()
) | {b"System Volume Information"}
# What Arrowhead and MLflow write beside what they were asked for.
OWN = frozenset(
    b"mlruns mlartifacts mlflow.db mlflow.db-journal mlflow.db-shm mlflow.db-wal .arrowhead .bundle"
    b" .lock lr_finder.png lr_finder.csv".split()
)
OWN_ENDINGS = (
    b".training",
    b".draft",
)  # of hidden names: checkpoints, files that are being written
# A folder is one of ours when it holds such a file with such a word in it.
OWN_FILES = {
    b"store.json": b'"seal"',
    b"bundle.json": b'"seal"',
    b"score.json": b'"bundle_fingerprint"',
    b"request.json": b'"runs"',
}
OWN_FIGURES = ("-confusion.png", "-learning-curve.png")  # earlier versions: beside their bundle
IMAGES = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".tif", b".tiff", b".gif", b".avif")
IMAGE_ENDINGS = (*IMAGES, *(ending.upper() for ending in IMAGES))
# Endings of names that say: no image.
SIDECARS = frozenset(
    b"3gp 7z aac aae bak flv license lrv m2ts mts pp3"
    b" aac aae arff arrow avi bat bib bz2 cfg conf css csv dat data db dll doc docx dtd env"
    b" epub exe feather flac geojson gpx gz h5 hdf5 htm html ini ipynb jar joblib js json json5"
    b" jsonl kml kmz lnk lock log lst m4a m4v map mat md md5 mkv mov mp3 mp4 mpeg mpg msi names"
    b" ndjson npy npz nfo odp ods odt ogg onnx opus parquet pdf pickle pkl ppt pptx proto pt pth"
    b" py pyc rar rst rtf safetensors sh sha1 sha256 sql sqlite sqlite3 srt sum tar tex tfrecord"
    b" tfrecords tgz toml tsv txt url vtt wav webloc webm wmv xlsm xls xlsx xml xmp xsd xz yaml yml"
    b" zip zst".split()
)
# Names without an ending that say the same, in any case.
SIDECAR_NAMES = frozenset(
    b"authors changelog contributing copying licence license makefile notice readme".split()
)
REGULAR = stat.S_IFREG >> 12
HEAD_BYTES = 16  # enough to see that a file is an image
MAGICS = (
    *(b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\xff\x0a"),
    *(b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"8BPS"),
)
BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")


def sorted_out(names: list[bytes]) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Of a sorted list the names to look at, those that are hidden or a system's, and ours."""
    start, stop = bisect_left(names, b"."), bisect_left(names, b"/")
    odd = {*names[start:stop], *JUNK.intersection(names), *OWN.intersection(names)}
    if not odd:
        return names, [], []
    ours = {name for name in odd if is_own_name(name)}
    return [name for name in names if name not in odd], sorted(odd - ours), sorted(ours)


def is_own_name(name: bytes) -> bool:
    """Whether Arrowhead or MLflow gave a file or folder its name."""
    return name in OWN or (name[:1] == b"." and name.endswith(OWN_ENDINGS))


def is_own_folder(handle: int, names: list[bytes]) -> bool:
    """Whether an open folder, of these names, is a store, a bundle, or scores."""
    for name in frozenset(OWN_FILES).intersection(names):
        with suppress(OSError):
            file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=handle)
            with os.fdopen(file, "rb") as stream:
                if OWN_FILES[name] in stream.read(2**26):
                    return True
    return False


def sidecars(handle: int, names: list[bytes], kinds: bytearray) -> dict[int, bytes]:
    """Places of the sidecars among the names in an open folder, with their kinds."""
    found = {}
    for at, name in enumerate(names):
        if name.endswith(IMAGE_ENDINGS) or kinds[at] != REGULAR:
            continue
        if kind := sidecar_kind(name):
            with suppress(OSError):  # one that cannot be read stays a row, and a fault
                file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=handle)
                try:
                    head = os.read(file, HEAD_BYTES)
                finally:
                    os.close(file)
                if not looks_like_an_image(head):
                    found[at] = kind
    return found


def sidecar_kind(name: bytes) -> bytes | None:
    """The ending that says that a file is no image, in small letters (.txt), or its name where it
    has none (README); None for other names.
    """
    _, dot, word = name.rpartition(b".")
    if dot:
        return b"." + end if (end := word.lower()) in SIDECARS else None
    return name if name.lower() in SIDECAR_NAMES else None


def looks_like_an_image(head: bytes) -> bool:
    """Whether a file begins as an image of any kind does, also of one that we cannot read."""
    return (
        head.startswith(MAGICS)
        or (head[:2] == b"BM" and head[6:10] == bytes(4))  # a text may begin with BM
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in BRANDS)
    )
