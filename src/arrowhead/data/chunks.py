"""A catalog cut into chunks that stay the same when files are added."""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Sequence

import numpy as np

from arrowhead.data.catalog import Catalog


def chunks(paths: Sequence[str], size: int) -> list[range]:
    """Runs of rows over all of them, `size` long on average; only the last is shorter than half.

    A row ends its run when the CRC-32 of its path is the smallest of all rows up to size/2 away.
    Nothing further off counts: a file added or removed moves borders up to that far away, so it
    changes three chunks at most, and every other shard stays as it is.
    """
    if not paths:
        return []
    reach = size // 2
    codes = np.fromiter(map(zlib.crc32, map(str.encode, paths)), np.int64, len(paths))
    codes = (codes << 20) + np.arange(len(codes)) % 2**20  # no two neighbours alike
    lowest = np.pad(codes, reach, constant_values=np.iinfo(np.int64).max)
    width, full = 1, 2 * reach + 1
    while width < full:  # lowest of `width` rows from each row on; two such windows make a longer
        step = min(width, full - width)
        lowest = np.minimum(lowest[:-step], lowest[step:])
        width += step
    ends = np.flatnonzero(codes == lowest) + 1
    borders = [0, *ends[(ends > reach) & (ends < len(paths))].tolist(), len(paths)]
    return [range(start, stop) for start, stop in itertools.pairwise(borders)]


def chunk_name(catalog: Catalog, rows: range, fingerprint: str) -> str:
    """Name of the shard that holds these rows: a hash of the files' stamps and the recipe.

    Size and stamp count: a file replaced under its old name belongs to another shard. So does one
    that could be read at last, which leaves no trace in either: that is what `tries` is for.
    """
    here = slice(rows.start, rows.stop)
    columns = (catalog.sizes[here], catalog.stamps[here], catalog.tries[here])
    stamps = zip(*(column.tolist() for column in columns), strict=True)
    lines = [
        f"{path}\t{size}\t{stamp}\n" if not tries else f"{path}\t{size}\t{stamp}\t{tries}\n"
        for path, (size, stamp, tries) in zip(catalog.paths[here], stamps, strict=True)
    ]
    total = hashlib.blake2b(fingerprint.encode(), digest_size=12)
    total.update("".join(lines).encode())
    return total.hexdigest()
