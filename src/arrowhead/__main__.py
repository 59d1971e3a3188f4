"""The program `arrowhead`, also as `python -m arrowhead`."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line. Ctrl-C during its imports ends the process at once, with one line.

    An exception would end in a traceback, and abort the process where it is raised in the
    initialization of a C extension.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_at_once)
    from arrowhead.cli import main as cli

    signal.signal(signal.SIGINT, handler)
    cli.main()


def _exit_at_once(number: int, frame: FrameType | None) -> None:
    sys.stderr.write("\narrowhead: interrupted before the command began.\n")
    sys.stderr.flush()
    os._exit(130)


if __name__ == "__main__":
    main()
