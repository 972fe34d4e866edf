"""``python -m dipguard`` runs the command ``dipguard``."""

from __future__ import annotations

import sys

from dipguard.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
