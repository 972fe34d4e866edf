"""``python -m sweeps.collect FOLDER`` in a copy of the repository: ``dipguard collect FOLDER``."""

from __future__ import annotations

import sys

from dipguard.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["collect", *sys.argv[1:]]))
