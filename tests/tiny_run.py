"""Small real runs of train.py for the tests: composed as on the command line, a few images, a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import train
from dipguard.config import TrainConfig, from_hydra, register

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
TINY = (
    "data.limit=4",
    "defense=paper",
    "defense.T=40",
    "defense.decisions=20",
    "defense.t0=4",
    "defense.tau=0.2",
    "fit.stack_size=2",
    "report.figures=1",
    "trainer.accelerator=cpu",
    "trainer.progress=false",
    "logger=none",
)
"""Overrides of a run of seconds. tau is low, so that some crossings count although the fit is so short."""


def compose_config(*overrides: str) -> DictConfig:
    """What Hydra makes of these overrides."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def typed_config(*overrides: str) -> TrainConfig:
    """The same as dataclasses."""
    return from_hydra(compose_config(*overrides))


def tiny_run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Run train.py's work in this process; return the metrics."""
    return train.run(compose_config(*TINY, *overrides), folder)
