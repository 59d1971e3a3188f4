"""`arrowhead train` as a script for `ray job submit`: the same flags, TOML and help."""

import sys

from arrowhead.cli.main import main

main(["train", *sys.argv[1:]])
