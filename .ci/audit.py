"""What pip-audit found in the locks, on some lines: `audit.py FOUND.json`.

pip-audit passes over what its advisory database does not know, or does not answer for, and calls
that success. Here an audit of nothing is none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(path: Path) -> int:
    """0: no advisory is known; 1: some are; 3: the database could not be asked."""
    held = json.loads(path.read_text()) if path.is_file() else {"dependencies": []}
    asked = [one for one in held["dependencies"] if "vulns" in one]
    for one in asked:
        for known in one["vulns"]:
            mended = ", ".join(known["fix_versions"]) or "no version yet"
            names = " ".join([known["id"], *known.get("aliases", [])])
            print(f"{one['name']} {one['version']}: {names}; mended in {mended}")
    if not asked:
        print("No advisory database answered: nothing was audited.")
        return 3
    affected = sum(bool(one["vulns"]) for one in asked)
    print(f"{len(asked)} packages audited, {affected} with known vulnerabilities")
    return 1 if affected else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
