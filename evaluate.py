"""Attacks x defences: one configuration, one run folder, resumable. Try ``python evaluate.py --help``.

Many configurations: ``python evaluate.py -m +sweep=smoke`` (docs/sweeps.md).
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from dipguard.cli.programs import evaluate, run_job, start


@hydra.main(config_path="conf", config_name="evaluate", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """The command line."""
    run_job(evaluate, cfg)


if __name__ == "__main__":
    start(main)
