"""Print what pip-audit reports about the locks: `audit.py REPORT.json`.

pip-audit skips packages that its advisory database does not know, and reports success if the
database does not answer. This script reports failure if no package was audited.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(path: Path) -> int:
    """0: no advisory is known; 1: some are; 3: the database could not be reached."""
    report = json.loads(path.read_text()) if path.is_file() else {"dependencies": []}
    audited = [package for package in report["dependencies"] if "vulns" in package]
    for package in audited:
        for advisory in package["vulns"]:
            fixed = ", ".join(advisory["fix_versions"]) or "no version yet"
            names = " ".join([advisory["id"], *advisory.get("aliases", [])])
            print(f"{package['name']} {package['version']}: {names}; fixed in {fixed}")
    if not audited:
        print("No advisory database answered: nothing was audited.")
        return 3
    affected = sum(bool(package["vulns"]) for package in audited)
    print(f"{len(audited)} packages audited, {affected} with known vulnerabilities")
    return 1 if affected else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
