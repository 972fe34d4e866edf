"""Defend images: one configuration, one run folder. Try ``python train.py --help``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf

from dipguard.config import from_hydra, register
from dipguard.evaluation.pipeline import execute, prepare
from dipguard.files import write_text
from dipguard.reporting import open_log, write_report

log = logging.getLogger("dipguard")

register()


def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Data -> attack -> fit -> reconstruction -> report, into ``folder``; return the metrics.

    Raises:
        CompactHydraException: A setting or a file is not as it must be; nothing was run.
    """
    try:
        config = from_hydra(cfg)
        job = prepare(config, folder)
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        raise CompactHydraException(f"{type(error).__name__}: {error}") from error
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    with open_log(config.logger, folder, settings=config.to_dict()) as run_log:
        outcome = execute(job, logger_at=lambda step: run_log and run_log.starting_at(step))
        metrics = write_report(outcome, config, log=run_log)
    right = metrics["accuracy"]
    log.info(
        "accuracy: clean %.3f, undefended %.3f, defended %.3f", right["clean"], right["undefended"], right["defended"]
    )
    log.info("results: %s", folder / "report.md")
    return metrics


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """The command line."""
    run(cfg, Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    main()
