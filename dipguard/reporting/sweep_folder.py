"""A sweep's folder, read back: its jobs, what was varied among them, how each ended, and its figures.

Any grid will do: a parameter is whatever was overridden and is not the same in all jobs, be it a value
(``rows.paper.options.tau``) or a choice of a config group (``data``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from dipguard.evaluation.run_folder import flatten
from dipguard.evaluation.sweep_job import ASIDE, DONE, FAILED
from dipguard.files import read_json
from dipguard.reporting.stored_results import ResultRow, read_results
from dipguard.reporting.sweep_progress import read_plan

Value = str | int | float | bool | None
STATES = ("done", "failed", "unfinished", "missing")
"""How a job stands: ``unfinished`` is running, or was killed; ``missing`` has not begun."""

SIZES = ("small", "medium", "large")
"""Names that have an order; others stand as they first appear."""


@dataclass(frozen=True, eq=False)
class Job:
    """One job.

    Attributes:
        folder: Its name in the sweep's folder.
        state: One of ``STATES``.
        values: The parameters' values, by key; of a job that never began those that were overridden.
        cells: Its results, of jobs that are done.
        problem: Why there are no results.
        seconds: What it took, start to end.
        store: What its store of fits counted (``fitted``, ``replayed``, ...), if it had one.
    """

    folder: str
    state: str
    values: Mapping[str, Value]
    cells: tuple[ResultRow, ...] = ()
    problem: str = ""
    seconds: float | None = None
    store: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Sweep:
    """All jobs of a sweep.

    Attributes:
        name: The grid's name.
        jobs: In the order of the plan; those of earlier starts come last.
        parameters: Values by key, in their order: numbers by size, others as they first appear.
        labels: A short name by key.
        others: Jobs of earlier starts in the same folder, with other settings, that were left out.
    """

    name: str
    jobs: tuple[Job, ...]
    parameters: Mapping[str, tuple[Value, ...]]
    labels: Mapping[str, str] = field(default_factory=dict)
    others: int = 0

    @property
    def done(self) -> list[Job]:
        """The jobs that have results."""
        return [job for job in self.jobs if job.state == "done"]

    @property
    def rows(self) -> list[str]:
        """The defence rows that have results."""
        return list(dict.fromkeys(cell.row for job in self.jobs for cell in job.cells))

    @property
    def columns(self) -> list[str]:
        """The attack columns that have results."""
        return list(dict.fromkeys(cell.column for job in self.jobs for cell in job.cells))

    def setting(self, job: Job) -> str:
        """A job's values, as far as they are known, as a person writes them."""
        known = {key: job.values[key] for key in self.parameters if job.values[key] is not None}
        return ", ".join(f"{self.labels[key]} = {text_of(value)}" for key, value in known.items())


def read_sweep(folder: str | Path, *, everything: bool = False) -> Sweep:
    """Read a sweep's folder, also while its jobs run.

    Args:
        folder: The folder.
        everything: Take in jobs of earlier starts that the last start's grid does not have.

    Raises:
        FileNotFoundError: It holds no job, and no plan of any.
    """
    folder = Path(folder)
    plan = read_plan(folder)
    overrides = {job["folder"]: list(job["overrides"]) for job in plan.get("jobs") or []}
    found = {path.parents[1].name: path for path in sorted(folder.glob("*/.hydra/overrides.yaml"))}
    others = found.keys() - overrides.keys()
    if everything or not overrides:
        overrides |= {name: list(_yaml(path) or []) for name, path in found.items() if name in others}
        others = set()
    if not overrides:
        raise FileNotFoundError(f"`folder` must be that of a sweep, got {folder}, which holds no job of one")
    given = {name: _expanded(texts) for name, texts in overrides.items()}
    configs = {name: flatten(_yaml(folder / name / "config.yaml") or {}) for name in overrides}
    keys = list(dict.fromkeys(key for values in given.values() for key in values))
    values = {name: {key: _value(folder / name, key, given[name], configs[name]) for key in keys} for name in overrides}
    parameters = _parameters(keys, values.values())
    jobs = tuple(_job(folder / name, {key: values[name][key] for key in parameters}) for name in overrides)
    name = str(plan.get("sweep") or folder.resolve().name)
    return Sweep(name, jobs, parameters, short_labels(parameters), len(others))


def text_of(value: Value) -> str:
    """A value as a person writes it; numbers without trailing zeros."""
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def short_labels(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each key, or as many parts as tell it from the others."""
    parts = {key: key.replace("/", ".").replace("@", ".").split(".") for key in keys}
    labels = {}
    for key, names in parts.items():
        length = 1
        while length < len(names) and any(o != key and p[-length:] == names[-length:] for o, p in parts.items()):
            length += 1
        labels[key] = ".".join(names[-length:])
    return labels


def _yaml(path: Path) -> Any:
    if not path.is_file():
        return None
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, ten times as fast, where it is there
    return yaml.load(path.read_bytes(), Loader=loader)


def _expanded(overrides: Sequence[str]) -> dict[str, Value]:
    """Overrides as values by key, dicts taken apart; those that no result depends on left out."""
    values: dict[str, Value] = {}
    for text in overrides:
        for key, value in _parsed(text):
            if key.split(".")[0].split("@")[0] not in (*ASIDE, "sweep"):
                values[key] = value
    return values


@lru_cache(maxsize=4096)
def _parsed(text: str) -> tuple[tuple[str, Value], ...]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(text)
    key = override.key_or_group + (f"@{override.package}" if override.package else "")
    if override.is_delete():
        return ((f"~{key}", "left out"),)
    value: Any = override.value()
    found = flatten({key: value}) if isinstance(value, Mapping) else {key: value}
    plain = str | int | float | bool | None
    return tuple((name, item if isinstance(item, plain) else str(item)) for name, item in found.items())


def _value(folder: Path, key: str, given: Mapping[str, Value], config: Mapping[str, Any]) -> Value:
    """A key's value in a job: what its config says, which knows the defaults too, or what it was given."""
    if key in config:
        value = config[key]
        return value if isinstance(value, str | int | float | bool | None) else str(value)
    if key in given:
        return given[key]
    choices = flatten((_yaml(folder / ".hydra" / "hydra.yaml") or {}).get("hydra", {}).get("runtime", {}))
    return choices.get(f"choices.{key}")


def _parameters(keys: Sequence[str], jobs: Iterable[Mapping[str, Value]]) -> dict[str, tuple[Value, ...]]:
    settings = list(jobs)
    found = {}
    for key in keys:
        values = list(dict.fromkeys(job[key] for job in settings if job[key] is not None))
        if len(values) > 1 or (values and any(job[key] is None for job in settings)):
            numbers = [value for value in values if isinstance(value, int | float)]
            if set(values) <= set(SIZES):
                values.sort(key=SIZES.index)
            found[key] = tuple(sorted(numbers)) if len(numbers) == len(values) else tuple(values)
    return found


def _job(folder: Path, values: Mapping[str, Value]) -> Job:
    try:
        seconds = float(read_json(folder / DONE)["seconds"])
        cells = tuple(read_results(folder / "results.csv"))
        return Job(folder.name, "done", values, cells, seconds=seconds, store=_store(folder / "store.json"))
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        return Job(folder.name, "failed", values, problem=f"its results are damaged: {error}")
    try:
        failed = read_json(folder / FAILED)
        return Job(folder.name, "failed", values, problem=f"{failed['error']}: {failed['message']}")
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        return Job(folder.name, "failed", values, problem="see its log")
    if (folder / "config.yaml").is_file():
        return Job(folder.name, "unfinished", values, problem="running, or killed before its end")
    return Job(folder.name, "missing", values, problem="not begun")


def _store(path: Path) -> dict[str, int]:
    try:
        return {str(name): int(count) for name, count in read_json(path).items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}
