"""Tables and plots of a sweep, finished or not: ``python -m sweeps.collect FOLDER``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dipguard.cli import exit_codes
from dipguard.reporting.sweep_report import summary, write_sweep_report


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sweeps.collect", description=__doc__)
    parser.add_argument("folder", nargs="+", help="a sweep's folder, such as outputs/sweeps/smoke")
    given = parser.parse_args(arguments)
    with exit_codes("sweeps.collect"):
        for folder in given.folder:
            try:
                write_sweep_report(folder)
                text = summary(folder)
            except (OSError, ValueError) as error:
                print(f"{folder}: {error}", file=sys.stderr)
                return 1
            print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
