"""Small real runs of evaluate.py for the tests: a few digits, two attacks, defences of every kind, short fits."""

from pathlib import Path

from omegaconf import DictConfig

from dipguard.cli.programs import evaluate
from dipguard.config import RunConfig, from_hydra
from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.plan import prepare
from dipguard.evaluation.runner import run
from tests.store.parts import list_entries
from tests.tiny_run import compose_config

TINY = (
    "data.limit=5", "chunk=3", "figures=2", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false",
    "defenses.paper.network=small", "defenses.paper.T=20", "defenses.paper.decisions=10", "defenses.paper.t0=2",
    "defenses.paper.tau=0.2", "defenses.mirror.networks=[small,small,small]", "defenses.mirror.T=12",
    "defenses.mirror.t0=4", "defenses.mirror.every=4",
    "defenses.dip_fixed.network=small", "defenses.dip_fixed.T=10", "defenses.dip_fixed.step=7",
)  # fmt: skip
"""Overrides of a run of seconds."""


def compose_matrix(*overrides: str) -> DictConfig:
    """What Hydra makes of these overrides."""
    return compose_config(*overrides, program="evaluate")


def typed_matrix(*overrides: str) -> RunConfig:
    """The same as checked settings."""
    return from_hydra(compose_matrix(*overrides))


def tiny_matrix(folder: Path, *overrides: str) -> Matrix:
    """A checked matrix, not run yet."""
    return prepare(typed_matrix(*TINY, *overrides), folder)


def completed(matrix: Matrix) -> Matrix:
    """The matrix, run; no cell may fail."""
    failed = run(matrix)
    assert not failed, failed
    return matrix


def written(matrix: Matrix) -> dict[Path, float]:
    """The entries of its store, and when each was written (a read changes the time of the file too)."""
    return {info.path: info.header["made"] for info in list_entries(matrix.store.path)}


def tiny_evaluation(folder: Path, *overrides: str) -> list[Path]:
    """Run evaluate.py's work in this process; return the report's files."""
    return evaluate(compose_matrix(*TINY, *overrides), folder)
