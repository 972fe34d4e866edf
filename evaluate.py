"""Attacks x defences: one configuration, one run folder, resumable. Try ``python evaluate.py --help``.

Many configurations: ``python evaluate.py -m +sweep=smoke`` (docs/sweeps.md).
"""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dipguard.attacks import Cost
from dipguard.config_matrix import from_hydra, register
from dipguard.evaluation.aware import estimate_aware, run_aware, write_curves_csv
from dipguard.evaluation.courses import Courses
from dipguard.evaluation.ladder import estimate_ladder, run_ladder, write_ladder
from dipguard.evaluation.matrix import Matrix, prepare_matrix
from dipguard.evaluation.matrix_run import run_matrix
from dipguard.evaluation.results import write_results
from dipguard.evaluation.sharding import run_sharded
from dipguard.evaluation.sweep_job import is_done, isolated, job_key, mark_begun, mark_done, mark_failed
from dipguard.files import write_text
from dipguard.reporting import RunLog, open_log
from dipguard.reporting.ladder_tables import ladder_summary
from dipguard.reporting.matrix_log import log_matrix
from dipguard.reporting.matrix_report import write_matrix_report
from dipguard.reporting.matrix_tables import main_tables
from dipguard.reporting.stored_results import read_results
from dipguard.reporting.sweep_progress import register_resolver, report_open_sweeps

log = logging.getLogger("dipguard")

register()
register_resolver()


def run(cfg: DictConfig, folder: Path, *, sweep: str | None = None) -> list[Path]:
    """Attack, purify, judge, report, into ``folder``; returns the report's files.

    Args:
        cfg: The composed config.
        folder: The run folder.
        sweep: The name of the sweep that this is a job of.

    Raises:
        CompactHydraException: A setting or a file is not as it must be; nothing was run.
        RuntimeError: Cells of the ladder failed; everything else was run and reported.
    """
    try:
        config = from_hydra(cfg)
        matrix = prepare_matrix(config, folder)
        costs = estimate_aware(matrix) | estimate_ladder(matrix)
    except (TypeError, ValueError, OSError, RuntimeError, ImportError) as error:
        raise CompactHydraException(f"{type(error).__name__}: {error}") from error
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    failed: list[str] = []
    if config.rebuild:
        write_results(matrix)
        write_curves_csv(matrix)
        write_ladder(matrix)
    else:
        job_type = "evaluate" if sweep is None else "sweep"
        settings = config.to_dict()
        with open_log(config.logger, folder, settings=settings, job_type=job_type, group=sweep) as run_log:
            failed = _run(matrix, costs, run_log)
    made = write_matrix_report(matrix.folder.path, clean=matrix.clean, count=config.figures)
    if failed:  # after the report: all other cells are in it
        raise RuntimeError(f"{len(failed)} cells of the ladder failed, all others are stored: {'; '.join(failed)}")
    return made


def _run(matrix: Matrix, costs: dict[str, Cost], run_log: RunLog | None) -> list[str]:
    """Run it all; the cells of the ladder that failed."""
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
    if costs:
        log.info("together at most %s", sum(costs.values(), Cost()))
    if matrix.config.processes > 1:
        run_sharded(matrix)
    courses = Courses(matrix, keep=matrix.config.log_figures)
    with courses.watching() if run_log is not None else nullcontext():
        run_matrix(matrix)
    run_aware(matrix)
    failed = run_ladder(matrix)
    if run_log is not None:
        log_matrix(run_log, matrix, courses)
    return failed


def run_in_sweep(cfg: DictConfig, folder: Path) -> None:
    """:func:`run` as one job of a sweep: nothing if it is done already; how it ends is left in ``folder``.

    Raises:
        Exception: What :func:`run` raised. Hydra goes on with the other jobs and ends with it.
    """
    try:
        config = from_hydra(cfg)
        key = job_key(config)
        if is_done(folder, key) and not config.rebuild:
            log.info("%s is done already", folder.name)
            return
        mark_begun(folder)
        start = time.perf_counter()
        with isolated():
            run(cfg, folder, sweep=folder.resolve().parent.name)
        mark_done(folder, key, seconds=time.perf_counter() - start)
    except Exception as error:
        log.exception("this job failed")  # into its own log; the sweep's report names it too
        mark_failed(folder, error)
        raise


@hydra.main(config_path="conf", config_name="evaluate", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """The command line."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        run_in_sweep(cfg, folder)
        return
    run(cfg, folder)
    log.info("results: %s\n%s", folder / "report.md", main_tables(read_results(folder / "results.csv")))
    if (folder / "ladder.csv").is_file():
        log.info("the ladder\n%s", ladder_summary(folder))


if __name__ == "__main__":
    try:
        main()
    finally:
        report_open_sweeps()
