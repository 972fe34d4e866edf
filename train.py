"""Defend images: one attack, one defence, one run folder. Try ``python train.py --help``."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from dipguard.cli.programs import run_job, start, train


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """The command line."""
    run_job(train, cfg)


if __name__ == "__main__":
    start(main)
