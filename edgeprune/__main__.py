"""`python -m edgeprune`: the command, where it is not on the path."""

from edgeprune.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
