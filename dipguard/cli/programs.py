"""The programs ``train`` and ``evaluate``: from the command line to the report, alone or as one job of a sweep.

Importing this module is fast: torch is imported when the keys of the config have been checked.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dipguard.cli import CommandError, exit_codes, locked
from dipguard.cli.sweep_progress import register_resolver, report_open_sweeps
from dipguard.config import NODE_KEYS, RunConfig, check_overrides, explain, from_hydra, name_of, names_of, register
from dipguard.evaluation.sweep_job import DONE, FAILED, is_done, job_key, may_be_path, objective
from dipguard.files import write_json, write_text
from hydra_plugins.dipguard_groups import conf_folder

if TYPE_CHECKING:
    from dipguard.evaluation.matrix import Matrix

log = logging.getLogger("dipguard")

COLUMN = 33  # of the comments in ``--help``


def train(cfg: DictConfig, folder: Path, *, sweep: str | None = None) -> dict[str, Any]:
    """Run one attack and one defence, with pictures, as a job of ``sweep`` if there is one; return the metrics.

    Raises:
        CompactHydraException: A setting or a file is not as it must be; nothing was run.
        RuntimeError: The cell failed.
    """
    matrix = _prepare(cfg, folder, single=True)
    from dipguard.reporting.report import write_train_report

    metrics: dict[str, Any] = _run(matrix, cfg, folder, job_type="fit", sweep=sweep, report=write_train_report)
    right = metrics["accuracy"]
    log.info(
        "accuracy: clean %.3f, undefended %.3f, defended %.3f", right["clean"], right["undefended"], right["defended"]
    )
    log.info("results: %s", folder / "report.md")
    return metrics


def evaluate(cfg: DictConfig, folder: Path, *, sweep: str | None = None) -> list[Path]:
    """Run all attacks on all defences; return the files of the report. Arguments and errors are those of `train`."""
    matrix = _prepare(cfg, folder, single=False)
    from dipguard.reporting.report import results_text, write_matrix_report

    made: list[Path] = _run(matrix, cfg, folder, job_type="evaluate", sweep=sweep, report=write_matrix_report)
    if sweep is None:
        log.info("results: %s\n%s", folder / "report.md", results_text(folder))
    return made


def run_job(program: Callable[..., Any], cfg: DictConfig) -> float | None:
    """Run `train` or `evaluate` in the folder that Hydra chose; as a job of a sweep, only if it is not done already.

    Returns the objective of the run, for sweepers that optimise.
    """
    settings = HydraConfig.get()
    folder, root = Path(settings.runtime.output_dir), Path(settings.runtime.cwd)
    if Path.cwd() != root:
        _make_absolute(cfg, root)
    sweep = root / settings.sweep.dir if settings.mode == RunMode.MULTIRUN else None
    if sweep is not None and cfg.get("store") is None:
        cfg.store = str(sweep / "store")  # one set of fits for all jobs
    try:
        # A search may ask for the same job twice at once: the second then finds it done.
        with locked(folder, wait=sweep is not None):
            if sweep is None:
                program(cfg, folder)
            else:
                _sweep_job(program, cfg, folder, sweep=sweep.name)
    except (CommandError, OSError) as error:
        raise CompactHydraException(str(error)) from error
    value = objective(folder, cfg.objective)
    if value is None and cfg.objective is not None:
        raise CompactHydraException(f"ValueError: `objective` is {cfg.objective}, of which this run has no figures")
    return value


def _make_absolute(node: DictConfig, root: Path) -> None:
    """Let relative paths start from ``root``, where the command was given: hydra.job.chdir=true puts jobs elsewhere.

    Our own data may be downloaded to a ``path`` that does not exist yet; other values are paths if something is there.
    """
    for key in map(str, node):
        try:
            value = node[key]
        except OmegaConfBaseException:  # nothing to interpolate from, or a missing value: refused later
            continue
        if isinstance(value, DictConfig):
            _make_absolute(value, root)
        elif isinstance(value, str):
            ours = key == "store" or (key == "path" and node.get("name") in names_of("data"))
            if ours or (may_be_path(key, value) and os.path.exists(root / value)):
                node[key] = str(root / Path(value).expanduser())


def _sweep_job(program: Callable[..., Any], cfg: DictConfig, folder: Path, *, sweep: str) -> None:
    """Leave in the folder how the job ended (:mod:`dipguard.evaluation.sweep_job`); its error is raised again."""
    if cfg.get("rebuild"):  # nothing is run, so how the job ended stays as it is
        program(cfg, folder, sweep=sweep)
        return
    try:
        key = job_key(_config(cfg), sweep=folder.parent)
        logged = cfg.logger.kind == "none" or any((folder / "logs").glob(f"{cfg.logger.kind}*"))
        if is_done(folder, key) and logged:  # a log that was not asked for before is written from the store
            log.info("%s is done already", folder.name)
            return
        for name in (DONE, FAILED):
            (folder / name).unlink(missing_ok=True)
        start = time.perf_counter()
        program(cfg, folder, sweep=sweep)
        write_json(folder / DONE, {"key": key, "seconds": round(time.perf_counter() - start, 3)})
    except Exception as error:
        refused = isinstance(error, CompactHydraException)  # its message says all
        log.error("this job failed: %s", error, exc_info=not refused)  # into its own log; the sweep's report has it too
        kind, text = "refused" if refused else type(error).__name__, "".join(traceback.format_exception(error))
        write_json(folder / FAILED, {"error": kind, "message": str(error), "traceback": text})
        raise


def main(name: str, arguments: Sequence[str] | None = None) -> None:
    """Run ``train`` or ``evaluate`` as a Hydra program: explain mistyped keys, and report sweeps however they end.

    ``arguments`` take the place of those of this process.
    """
    program: Callable[..., Any] = {"train": train, "evaluate": evaluate}[name]

    def task(cfg: DictConfig) -> float | None:
        return run_job(program, cfg)

    if arguments is not None:
        sys.argv[1:] = arguments
    register()
    register_resolver()
    OmegaConf.register_new_resolver("dipguard_groups", groups_text, replace=True)
    OmegaConf.register_new_resolver("dipguard_keys", keys_text, replace=True)
    with exit_codes(name):
        try:
            hydra.main(config_path=str(conf_folder()), config_name=name, version_base="1.3")(task)()
        except SystemExit as end:
            hint = explain(end.__context__)  # Hydra's own message, already printed, does not say what was meant
            if hint is not None:
                print(hint, file=sys.stderr)
            raise
        finally:
            report_open_sweeps()


def groups_text(*, _root_: DictConfig) -> str:
    """The config groups of a program with their options, without the groups of options that they are based on."""
    loader = GlobalHydra.instance().config_loader()
    hidden = {"dipguard", "hydra"}
    if _root_.hydra.job.config_name == "train":
        hidden |= {"experiment", "ladder", "sweep"}  # of many attacks and defences
    groups = [group for group in loader.list_groups("") if group not in hidden]
    return "".join(f"{group}: {', '.join(loader.get_group_options(group))}\n" for group in groups)


def keys_text(*, _root_: DictConfig) -> str:
    """The config as YAML, with a comment on each key."""
    folder = conf_folder()
    assert folder is not None  # the config came from it
    about: Any = OmegaConf.load(folder / "help.yaml")
    shown = OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"])
    path, lines = list[str](), list[str]()
    for line in OmegaConf.to_yaml(shown).splitlines():
        if match := re.match(r"( *)'?(\w[^ :']*)'?:", line):
            path = [*path[: len(match[1]) // 2], match[2]]
            label = len(path) > 1 and OmegaConf.is_dict(OmegaConf.select(shown, ".".join(path)))
            names = [OmegaConf.select(shown, ".".join([*path[:-1], key])) for key in ("kind", "name")]
            name = names[0] or names[1]
            comment = about.get(f"{name}.{path[-1]}" if name else "") or about.get("." * (len(path) > 1) + path[-1])
            line = f"{line:<{COLUMN}} # {comment}" if comment and not label else line
        lines.append(line)
    return "\n".join(lines).replace("$", "$$")  # it becomes a part of a template


def _config(cfg: DictConfig) -> RunConfig:
    try:
        if HydraConfig.initialized():
            check_overrides(cfg, HydraConfig.get().overrides.task)
        return from_hydra(cfg)
    except (TypeError, ValueError) as error:
        raise _refusal(error, cfg) from error


def _refusal(error: Exception, cfg: DictConfig) -> CompactHydraException:
    """The error with its settings named as the command line has them."""
    message = f"{type(error).__name__}: {error}"
    for many, one in (("attacks", "attack"), ("defenses", "defense")):
        node = cfg.get(one)
        if isinstance(node, Mapping) and node.keys() & set(NODE_KEYS):
            message = message.replace(f"`{many}.{name_of(node)}", f"`{one}")
    return CompactHydraException(message)


def _prepare(cfg: DictConfig, folder: Path, *, single: bool) -> Matrix:
    """The checked matrix of a config; ``single``: of one attack and one defence."""
    config = _config(cfg)
    for many, one in (("attacks", "attack"), ("defenses", "defense")):
        if single and (len(getattr(config, many)) != 1 or (cfg.get(many) and cfg.get(one))):
            raise CompactHydraException(f"ValueError: train.py has one `{one}`, and no `{many}`; evaluate.py has many")
    if single and any(node.get("number") for node in config.attacks.values()):
        raise CompactHydraException("ValueError: `attack.number` is for attack suites, which evaluate.py runs")
    from dipguard.evaluation.plan import prepare

    try:
        return prepare(config, folder)
    except (TypeError, ValueError, OSError, RuntimeError, ImportError) as error:
        raise _refusal(error, cfg) from error


def _run(
    matrix: Matrix, cfg: DictConfig, folder: Path, *, job_type: str, sweep: str | None, report: Callable[..., Any]
) -> Any:
    """Run what is missing, and write the report; return what ``report`` returns."""
    from dipguard.evaluation.runner import run
    from dipguard.reporting.loggers import open_log

    config = matrix.config
    if config.rebuild:
        matrix.load()
        if not any(result.done for results in matrix.results.values() for result in results):
            raise CompactHydraException(
                f"ValueError: `rebuild` found no finished cell of these settings and versions in {folder}, "
                "and has changed nothing"
            )
        return report(matrix)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    kind = job_type if sweep is None else "sweep"
    if sweep is None:
        log.info("run folder: %s (hydra.run.dir=%s goes on with a run that was stopped)", folder, folder)
    with open_log(matrix, job_type=kind, group=sweep) as run_log:
        failed = run(matrix, log=run_log)
        made = report(matrix, log=run_log)
        if failed:  # after the report, which has all other cells, and before the log is closed as a success
            raise RuntimeError(f"{len(failed)} cells failed, all others are stored: {'; '.join(failed)}")
    return made
