"""``dipguard collect``: tables and plots of a sweep, finished or not."""

from __future__ import annotations

import argparse

from dipguard.cli import command_errors
from dipguard.reporting.sweep_report import summary, write_sweep_report


def run(args: argparse.Namespace) -> int:
    """Write the report of each folder, and print its summary; return the exit code."""
    for folder in args.folder:
        with command_errors(f"{folder}: "):
            write_sweep_report(folder)
            print(summary(folder))
    return 0
