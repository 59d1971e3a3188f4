"""`python -m arrowhead` is the same as `arrowhead`."""

from arrowhead.cli.main import main

if __name__ == "__main__":
    main()
