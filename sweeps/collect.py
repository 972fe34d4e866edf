"""Tables and plots of a sweep, finished or not: ``python -m sweeps.collect FOLDER``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dipguard.reporting.sweep_report import summary, write_sweep_report


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sweeps.collect", description=__doc__)
    parser.add_argument("folder", nargs="+", help="a sweep's folder, such as outputs/sweeps/smoke")
    given = parser.parse_args(arguments)
    for folder in given.folder:
        try:
            write_sweep_report(folder)
            print(summary(folder))
        except (OSError, ValueError) as error:
            print(f"{folder}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
