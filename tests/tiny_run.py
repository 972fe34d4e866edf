"""Small real runs of train.py for the tests: composed as on the command line, a few images, a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dipguard.cli.programs import train
from dipguard.config import RunConfig, from_hydra, register

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
TINY = (
    "data.limit=4",
    "defense=paper",
    "defense.T=40",
    "defense.decisions=20",
    "defense.t0=4",
    "defense.tau=0.2",
    "chunk=2",
    "figures=1",
    "keep_traces=true",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "logger=none",
)
"""Overrides of a run of seconds. tau is low, so that some crossings count although the fit is so short."""


def compose_config(*overrides: str, program: str = "train") -> DictConfig:
    """What Hydra makes of these overrides."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(program, overrides=list(overrides))


def typed_config(*overrides: str) -> RunConfig:
    """The same as checked settings."""
    return from_hydra(compose_config(*overrides))


def tiny_run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Run train.py's work in this process; return the metrics."""
    return train(compose_config(*TINY, *overrides), folder)
