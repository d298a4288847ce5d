"""`python -m replication VERB` is the same door as the `replicate` command."""

from replication.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
