"""Defend images: one attack, one defence, one run folder. Try ``python train.py --help``.

``dipguard train`` is the same program.
"""

from dipguard.cli.programs import main

if __name__ == "__main__":
    main("train")
