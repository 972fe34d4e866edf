"""Attacks x defences: one configuration, one run folder, resumable. Try ``python evaluate.py --help``."""

from __future__ import annotations

import logging
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf

from dipguard.config_matrix import from_hydra, register
from dipguard.evaluation.aware import estimate_aware, run_aware, write_curves_csv
from dipguard.evaluation.matrix import Matrix, prepare_matrix
from dipguard.evaluation.matrix_run import run_matrix
from dipguard.evaluation.results import write_results
from dipguard.evaluation.sharding import run_sharded
from dipguard.files import write_text
from dipguard.reporting.matrix_report import write_matrix_report
from dipguard.reporting.matrix_tables import main_tables
from dipguard.reporting.stored_results import read_results

log = logging.getLogger("dipguard")

register()


def run(cfg: DictConfig, folder: Path) -> list[Path]:
    """Attack, purify, judge, report, into ``folder``; returns the report's files.

    Raises:
        CompactHydraException: A setting or a file is not as it must be; nothing was run.
    """
    try:
        config = from_hydra(cfg)
        matrix = prepare_matrix(config, folder)
        costs = estimate_aware(matrix)
    except (TypeError, ValueError, OSError, RuntimeError, ImportError) as error:
        raise CompactHydraException(f"{type(error).__name__}: {error}") from error
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    if config.rebuild:
        write_results(matrix)
        write_curves_csv(matrix)
    else:
        _run(matrix, {name: str(cost) for name, cost in costs.items()})
    return write_matrix_report(matrix.folder.path, clean=matrix.clean, count=config.figures)


def _run(matrix: Matrix, costs: dict[str, str]) -> None:
    steps = sum(row.steps_per_image for row in matrix.rows.values() if row.unavailable is None)
    cells = len(matrix.config.columns) * len(matrix.rows)
    log.info(
        "%d columns x %d rows = %d cells of %d images, %s DIP steps at most",
        len(matrix.config.columns), len(matrix.rows), cells, len(matrix.clean),
        f"{steps * len(matrix.config.columns) * len(matrix.clean):,}",
    )  # fmt: skip
    for name, row in matrix.rows.items():
        if row.unavailable is not None:
            log.warning("row %s: %s", name, row.unavailable)
    for name, cost in costs.items():
        log.info("%s will cost at most %s", name, cost)
    if matrix.config.processes > 1:
        run_sharded(matrix)
    run_matrix(matrix)
    run_aware(matrix)


@hydra.main(config_path="conf", config_name="evaluate", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """The command line."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    run(cfg, folder)
    log.info("results: %s\n%s", folder / "report.md", main_tables(read_results(folder / "results.csv")))


if __name__ == "__main__":
    main()
