"""`python -m replication VERB` is the same door as `replicate`, and takes nothing from the current folder either."""

import os
import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:  # a yaml.py there, or another clone, would pass for ours
        os.execv(sys.executable, [sys.executable, "-P", *sys.orig_argv[1:]])
    from replication.cli.main import main

    raise SystemExit(main())
