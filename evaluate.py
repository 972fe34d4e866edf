"""Attacks x defences: one configuration, one run folder, resumable. Try ``python evaluate.py --help``.

Many configurations: ``python evaluate.py -m +sweep=smoke`` (docs/sweeps.md). ``dipguard evaluate`` is the same.
"""

from dipguard.cli.programs import main

if __name__ == "__main__":
    main("evaluate")
