"""Small real runs of evaluate.py for the tests: a few digits, two attacks, rows of every kind, short fits."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import evaluate
from dipguard.config_matrix import MatrixConfig, from_hydra, register
from dipguard.evaluation.matrix import Matrix, prepare_matrix
from tests.tiny_run import CONF

TINY = (
    "data.limit=5",
    "chunk=3",
    "figures=2",
    "trainer.accelerator=cpu",
    "trainer.progress=false",
    "rows.paper.options.T=20",
    "+rows.paper.options.decisions=10",
    "rows.paper.options.t0=2",
    "rows.paper.options.tau=0.2",
    "rows.dipguard.options.T=20",
    "rows.dipguard.options.t0=5",
    "rows.dipguard.options.every=5",
    "rows.dip_fixed.options.T=20",
    "rows.dip_fixed.options.step=7",
    "+rows.dip_fixed.options.fit.jitter=0",
    "+rows.dip_fixed.options.fit.padding=zeros",
)
"""Overrides of a run of seconds; `dip_fixed` rides on the fit of `paper`."""


def compose_matrix(*overrides: str) -> DictConfig:
    """What Hydra makes of these overrides."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("evaluate", overrides=list(overrides))


def typed_matrix(*overrides: str) -> MatrixConfig:
    """The same as dataclasses."""
    return from_hydra(compose_matrix(*overrides))


def tiny_matrix(folder: Path, *overrides: str) -> Matrix:
    """A checked matrix, not run yet."""
    return prepare_matrix(typed_matrix(*TINY, *overrides), folder)


def tiny_evaluation(folder: Path, *overrides: str) -> list[Path]:
    """Run evaluate.py's work in this process; return the report's files."""
    return evaluate.run(compose_matrix(*TINY, *overrides), folder)
