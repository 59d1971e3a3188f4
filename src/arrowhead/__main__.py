"""The program `arrowhead`, also as `python -m arrowhead`."""

import gc
import os
import signal
import sys
from types import FrameType

GC_THRESHOLDS = 50_000, 20, 20
"""With Python's own (700, 10, 10), looking for garbage takes 0.6 of the 3.7 seconds that importing
torch and MLflow takes."""


def main() -> None:
    """Run the command line. Ctrl-C during its imports ends the process at once, with one line.

    An exception would end in a traceback, and abort the process where it is raised in the
    initialization of a C extension.
    """
    gc.set_threshold(*GC_THRESHOLDS)
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_at_once)
    from arrowhead.cli import main as cli

    cli.import_command(sys.argv[1:])
    signal.signal(signal.SIGINT, handler)
    try:
        cli.main()
    except SystemExit as end:
        from arrowhead.runtime import signals

        signals.exit_without_teardown(end.code if isinstance(end.code, int) else 0)
        raise


def _exit_at_once(number: int, frame: FrameType | None) -> None:
    sys.stderr.write("\narrowhead: interrupted before the command began.\n")
    sys.stderr.flush()
    os._exit(130)


if __name__ == "__main__":
    main()
