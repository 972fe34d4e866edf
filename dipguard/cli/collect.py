"""``dipguard collect``: tables and plots of a sweep, finished or not."""

from __future__ import annotations

import argparse

from dipguard.cli import command_errors
from dipguard.registry import import_extra


def run(args: argparse.Namespace) -> int:
    """Write the report into each folder, and print its summary; returns the exit code."""
    with command_errors():
        import_extra("hydra", owner="dipguard collect", extra="app")
    from dipguard.reporting.sweep_report import summary, write_sweep_report

    for folder in args.folder:
        with command_errors(f"{folder}: "):
            write_sweep_report(folder)
            print(summary(folder))
    return 0
