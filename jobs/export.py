"""`arrowhead export` as a script for `ray job submit`: the same flags, TOML and help."""

import sys

from arrowhead.cli.main import main

main(["export", *sys.argv[1:]])
