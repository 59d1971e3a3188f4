"""Run `python -m arrowhead` like the program `arrowhead`."""

from arrowhead.cli.main import main

if __name__ == "__main__":
    main()
