"""Split a catalog into chunks whose borders stay the same when files are added.

This is content-defined chunking, as in rsync or restic, on rows in place of bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Sequence

import numpy as np

from arrowhead.data.catalog import Catalog


def split_into_chunks(paths: Sequence[str], size: int) -> list[range]:
    """Split rows into consecutive chunks.

    A row ends its chunk if the CRC-32 of its path is the minimum of all rows up to size/2 away. A
    file that is added or removed therefore moves only borders within that distance: it changes at
    most three chunks, and all other shards stay valid.

    Args:
        paths: Path of each row, sorted.
        size: Average chunk length, in rows; only the last chunk is shorter than half of it.
    """
    if not paths:
        return []
    radius = size // 2
    codes = np.fromiter(map(zlib.crc32, map(str.encode, paths)), np.int64, len(paths))
    codes = (codes << 20) + np.arange(len(codes)) % 2**20  # no ties between neighbours
    # Sliding minimum over 2 * radius + 1 rows: two windows of minima combine into a wider one.
    minimum = np.pad(codes, radius, constant_values=np.iinfo(np.int64).max)
    width, full_width = 1, 2 * radius + 1
    while width < full_width:
        step = min(width, full_width - width)
        minimum = np.minimum(minimum[:-step], minimum[step:])
        width += step
    ends = np.flatnonzero(codes == minimum) + 1
    borders = [0, *ends[(ends > radius) & (ends < len(paths))].tolist(), len(paths)]
    return [range(start, stop) for start, stop in itertools.pairwise(borders)]


def shard_name(catalog: Catalog, rows: range, fingerprint: str) -> str:
    """Name of the shard that holds these rows: a hash of the recipe and of each file's path, size,
    stamp and tries.

    A replaced file belongs to another shard. So does a file that became readable, which may change
    neither size nor stamp: hence `tries`.
    """
    selection = slice(rows.start, rows.stop)
    columns = (catalog.sizes[selection], catalog.stamps[selection], catalog.tries[selection])
    stamps = zip(*(column.tolist() for column in columns), strict=True)
    lines = [
        f"{path}\t{size}\t{stamp}\n" if not tries else f"{path}\t{size}\t{stamp}\t{tries}\n"
        for path, (size, stamp, tries) in zip(catalog.paths[selection], stamps, strict=True)
    ]
    total = hashlib.blake2b(fingerprint.encode(), digest_size=12)
    total.update("".join(lines).encode())
    return total.hexdigest()
