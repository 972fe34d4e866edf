"""A sweep's folder: its jobs, the parameters that vary between them, how each ended, and its results.

Any grid will do. A parameter is whatever was overridden and is not the same in all jobs: a value
(``defenses.paper.tau``) or a choice of a config group (``data``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml  # type: ignore[import-untyped]

from dipguard.evaluation import cell
from dipguard.evaluation.sweep_job import DONE, FAILED, is_aside, plan_of
from dipguard.reporting.escape import NONE
from dipguard.reporting.results import flatten, read_results

Value = str | int | float | bool | None
CLOCK = 1.0
"""Seconds by which a file may seem older than it is: file systems round, and have clocks of their own."""
STATES = ("done", "failed", "unfinished", "missing")
"""States of a job: ``unfinished`` is running or was killed; ``missing`` has not begun."""


class Job(NamedTuple):
    """One job: its state, parameters' values by key, and why it has no results.

    A null is the text ``null``; None stands for a key that the job does not have. Of a job that has not begun, only
    those values are known that were overridden.
    """

    state: str
    values: Mapping[str, Value]
    problem: str


@dataclass(frozen=True, eq=False)
class Sweep:
    """All jobs of a sweep.

    Attributes:
        name: The grid's name.
        jobs: By the name of their folder, in the order of the plan.
        parameters: Values by key, in their order: numbers by size, others as they first appear.
        labels: A short name by key.
        results: The rows of all jobs' results.csv, with the name of the job's folder in the column ``job``.
        others: Number of jobs of earlier starts with other settings in the same folder, which were left out.
    """

    name: str
    jobs: Mapping[str, Job]
    parameters: Mapping[str, tuple[Any, ...]]
    labels: Mapping[str, str]
    results: pd.DataFrame
    others: int

    @property
    def defenses(self) -> list[str]:
        """The defences that have results."""
        return list(self.results["defense"].unique())

    def setting(self, job: str, keys: Iterable[str] | None = None) -> str:
        """A job's values as text: those of ``keys``, or all that are known."""
        values = self.jobs[job].values
        known = {key: values[key] for key in (values if keys is None else keys) if values[key] is not None}
        return ", ".join(f"{self.labels[key]} = {text_of(value)}" for key, value in known.items())


def read_sweep(folder: str | Path) -> Sweep:
    """Read a sweep's folder, also while its jobs run; FileNotFoundError if it holds no job, and no plan of any."""
    folder = Path(folder)
    plan = plan_of(folder)
    planned = {job["folder"]: list(job["overrides"]) for job in plan.get("jobs") or []}
    found = {path.parents[1].name: path for path in sorted(folder.glob("*/.hydra/overrides.yaml"))}
    # A search has no list of jobs: Hydra writes the overrides of each trial anew that this start has asked for.
    began = plan.get("began", 0) - CLOCK
    asked = {name: path for name, path in found.items() if path.stat().st_mtime >= began}
    overrides = planned or {name: _yaml(path, list) for name, path in (asked or found).items()}
    if not overrides:
        raise FileNotFoundError(f"`folder` must be that of a sweep, got {folder}, which holds no job of one")
    given = {name: {k: v for text in texts for k, v in _parsed(text).items()} for name, texts in overrides.items()}
    keys = [key for key in dict.fromkeys(key for values in given.values() for key in values) if not is_aside(key)]
    values = {name: _values(folder / name, keys, given[name]) for name in overrides}
    parameters = _parameters(keys, list(values.values()))
    jobs: dict[str, Job] = {}
    tables = [pd.DataFrame(columns=["job", "attack", "defense"])]
    for name in overrides:
        state, problem, table = _outcome(folder / name)
        known = {key: values[name][key] for key in parameters}
        jobs[name] = Job(state, known, problem)
        if table is not None:
            tables.append(table.assign(job=name))
    results = pd.concat(tables[1:] or tables, ignore_index=True)
    name = str(plan.get("sweep") or folder.resolve().name)
    return Sweep(name, jobs, parameters, short_labels(parameters), results, len(found.keys() - overrides.keys()))


def is_numeric(values: Sequence[Value]) -> bool:
    """Whether all values are numbers."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def text_of(value: Value) -> str:
    """A value as text, numbers without trailing zeros; a dash for None."""
    return NONE if value is None else cell.text_of(value)


def short_labels(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each key, or as many parts as distinguish it from the others."""
    parts = {key: key.replace("/", ".").replace("@", ".").split(".") for key in keys}
    labels = {}
    for key, names in parts.items():
        length = 1
        while length < len(names) and any(o != key and p[-length:] == names[-length:] for o, p in parts.items()):
            length += 1
        labels[key] = ".".join(names[-length:])
    return labels


def _yaml(path: Path, kind: type[Any] = dict) -> Any:
    """The content of a YAML or JSON file; empty if there is none, or it is damaged."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast, but not everywhere
    try:
        content = yaml.load(path.read_bytes(), Loader=loader)
    except (FileNotFoundError, yaml.YAMLError):
        content = None
    return content if isinstance(content, kind) else kind()


def _plain(settings: Mapping[str, Any]) -> dict[str, Value]:
    """Settings with dotted keys and plain values; a null becomes a name like any other."""
    flat = {key: "null" if value is None else value for key, value in flatten(settings).items()}
    return {key: value if isinstance(value, Value) else str(value) for key, value in flat.items()}


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Mapping[str, Value]:
    """An override as values by key."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(text)
    key = override.key_or_group + (f"@{override.package}" if override.package else "")
    return {f"~{key}": "left out"} if override.is_delete() else _plain({key: override.value()})


def _values(folder: Path, keys: Sequence[str], given: Mapping[str, Value]) -> dict[str, Value]:
    """The keys' values in a job: those of its config, which has the defaults too, or what it was given; else None."""
    config = _plain(_yaml(folder / "config.yaml"))
    choices = _yaml(folder / ".hydra" / "hydra.yaml").get("hydra", {}).get("runtime", {}).get("choices", {})
    known = {**_plain(choices), **given, **config}
    return {key: known.get(key) for key in keys}


def _parameters(keys: Sequence[str], jobs: Sequence[Mapping[str, Value]]) -> dict[str, tuple[Value, ...]]:
    found = {}
    for key in keys:
        values = list(dict.fromkeys(job[key] for job in jobs if job[key] is not None))
        if len(values) > 1 or (values and any(job[key] is None for job in jobs)):
            found[key] = tuple(sorted(values) if is_numeric(values) else values)  # type: ignore[type-var]
    return found


def _outcome(folder: Path) -> tuple[str, str, pd.DataFrame | None]:
    """State, problem and results of a job."""
    if (folder / DONE).is_file():
        try:
            return "done", "", read_results(folder / "results.csv")
        except (FileNotFoundError, ValueError) as error:
            return "failed", f"its results are damaged: {error}", None
    if (folder / FAILED).is_file():
        failed = _yaml(folder / FAILED)
        return "failed", f"{failed['error']}: {failed['message']}" if "error" in failed else "see its log", None
    if (folder / "config.yaml").is_file():
        return "unfinished", "running, or killed before its end", None
    return "missing", "not begun", None
