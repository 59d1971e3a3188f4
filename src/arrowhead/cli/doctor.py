"""The command `doctor`."""

from __future__ import annotations

from arrowhead.cli.app import print_result
from arrowhead.cli.options import Out, Output
from arrowhead.cli.screen import Screen


def doctor(*, output: Out = Output()) -> int:
    """Check this machine: what is installed, what it can do, and what to fix.

    The exit code is 1 if something that Arrowhead needs is missing.
    """
    from arrowhead import doctor as arrowhead_doctor

    checks = arrowhead_doctor.checks()
    if output.json:
        print_result({"checks": [check.plain() for check in checks]})
    else:
        for check in checks:
            Screen(to_stderr=False).print(check.line())
    return 1 if any(check.state == "missing" for check in checks) else 0
