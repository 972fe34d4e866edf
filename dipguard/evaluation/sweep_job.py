"""One job of a sweep: the name of its folder, the key of its settings, and how it ended.

    DONE     written last: the job is finished, with the key of its settings
    FAILED   the job ended in an error, with its traceback
    neither  it has not run yet, is running, or was killed

Hydra cannot resume a sweep: here a job that is DONE with the same settings returns at once.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dipguard.config import RunConfig, names_of
from dipguard.files import file_digest, read_json
from dipguard.registry import constant_of, file_of
from dipguard.version import __version__

DONE, FAILED = "DONE", "FAILED"
PLAN = "sweep.json"
"""The list of a sweep's jobs, in its folder."""
ASIDE = (
    "logger", "trainer.accelerator", "trainer.enable_progress_bar", "store", "store_T", "store_samples", "processes",
    "rebuild", "objective",
)  # fmt: skip
"""Settings that change no result, or only its rounding: a finished job stays finished when they change."""
PATHS = ("path", "weights", "labels_csv")
"""Keys whose values are paths, if something of that name exists."""
NAME_LENGTH = 100  # of the readable part of a folder's name; file systems allow 255 bytes


def job_folder(overrides: Sequence[str]) -> str:
    """The name of a job's folder: its overrides (``tau=0.5`` for ``defense.tau=0.5``), and a digest of them.

    The sweep's own name and settings that no result depends on are left out, so that another logger continues a sweep.
    """
    kept = [text.lstrip("+") for text in overrides]
    kept = [text for text in kept if not is_aside(text)]
    digest = hashlib.sha256("\n".join(sorted(kept)).encode()).hexdigest()[:8]
    name = ",".join(_readable(text) for text in kept) or "job"
    return f"{name[-NAME_LENGTH:].lstrip(',.')}-{digest}"  # what is swept mostly stands last


def plan_of(folder: Path) -> dict[str, Any]:
    """What a sweep's sweep.json holds; empty if there is none, or it is damaged."""
    try:
        return dict(read_json(folder / PLAN))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def swept(folder: Path) -> str:
    """The overrides in which the job of a folder differs from the others of its sweep; empty where they are unknown."""
    jobs = {job["folder"]: list(job["overrides"]) for job in plan_of(folder.parent).get("jobs") or []}
    own = [text for text in jobs.get(folder.name, []) if not is_aside(text)]
    differing = [text for text in own if any(text not in job for job in jobs.values())]
    return ",".join(map(_readable, differing))[-NAME_LENGTH:].lstrip(",.")


def is_aside(override: str) -> bool:
    """Whether no result depends on an override or its key; a sweep's name is none of them."""
    key = re.split("[=@/]", override.lstrip("~+"), maxsplit=1)[0]
    return any(key == name or key.startswith(f"{name}.") for name in (*ASIDE, "sweep"))


def _readable(override: str) -> str:
    key, _, value = override.partition("=")
    short = re.split(r"[./@]", key)[-1]
    if key.startswith("~"):
        text = f"no_{short.lstrip('~')}"
    elif value.startswith("{") and value.endswith("}"):
        text = value[1:-1].replace(":", "=").replace(" ", "")
    else:
        text = f"{short}={value.rstrip('/').rsplit('/', 1)[-1]}"
    return re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", text)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings that a result depends on."""
    return without_aside(config.to_dict())


def without_aside(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` of a config, from which the settings of `ASIDE` are taken."""
    for name in ASIDE:
        group, _, key = name.rpartition(".")
        (values[group] if group else values).pop(key, None)
    return values


def may_be_path(key: str, value: str) -> bool:
    """Whether a setting may name a file or folder.

    A plain word does only under a key of `PATHS`, since a folder may be called like a setting (``test``, ``cifar10``):
    the name of a checkpoint under another key needs a dot or a slash.
    """
    return key in PATHS or re.search(r"[./\\]", value) is not None


def job_key(config: RunConfig, *, sweep: Path | None = None) -> str:
    """A digest of a job's settings, of the content of the files and folders that they name, and of the versions.

    The modules of other people's classes are such files. What the job itself writes is not: of a folder that holds the
    ``sweep``'s folder or the store, these are left out.
    """
    values = settings_of(config)
    numerics = constant_of("dipguard.store.keys:NUMERICS")
    versions = [__version__, numerics, version("torch"), version("torchmetrics")]
    own = [Path(folder).expanduser().resolve() for folder in (sweep, config.store) if folder is not None]
    named = [(str(file), file) for file in _files(values, but=own)]
    files = {(name, _content(file, file.stat().st_ctime_ns)) for name, file in [*named, *_modules(values)]}
    return digest_of({"settings": values, "files": sorted(files), "versions": versions})


def digest_of(values: Any) -> str:
    """A digest of plain values, without importing torch."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _modules(values: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """The import path and the file of each class or function that settings name, but for dipguard's own."""
    kinds = {"data": "data", "victim": "victim", "surrogate": "victim", "baseline": "victim"}
    named = [(kind, values[key]) for key, kind in kinds.items()]
    named += [(kind, node) for kind in ("attack", "defense") for node in values[f"{kind}s"].values()]
    paths = [names_of(kind).get(node["name"], "") for kind, node in named if node is not None and "name" in node]
    for path in {*paths, *targets_in(values)}:
        if path.split(".")[0] != "dipguard" and (file := file_of(path)) is not None:
            yield path, file


def targets_in(value: Any) -> Iterator[str]:
    """The values of ``_target_`` anywhere in settings."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield str(value["_target_"])
        value = list(value.values())
    for one in value if isinstance(value, list) else ():
        yield from targets_in(one)


def _files(value: Any, key: str = "", *, but: Sequence[Path]) -> Iterator[Path]:
    """The files that settings name, or that are in a folder that they name, without the folders ``but`` inside it."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _files(one, name, but=but)
    elif isinstance(value, list):
        for one in value:
            yield from _files(one, key, but=but)
    elif isinstance(value, str) and may_be_path(key, value):
        path = Path(os.path.expanduser(value))  # Path's own raises an error for a user that does not exist
        if not os.path.exists(path):
            return
        inside = [folder for folder in but if path.resolve() in folder.parents]
        for file in (path, *path.rglob("*")):
            if file.is_file() and not any(file.resolve().is_relative_to(folder) for folder in inside):
                yield file


@cache
def _content(file: Path, changed: int) -> str:
    """A digest of a file, which a process reads once unless it changes."""
    return file_digest(file)


def is_done(folder: Path, key: str) -> bool:
    """Whether the job with this key is finished in this folder."""
    try:
        return bool(read_json(folder / DONE)["key"] == key) and (folder / "results.csv").is_file()
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def objective(folder: Path, label: str | None) -> float | None:
    """The mean accuracy of a run over the cells of an attack or a defence, or over all; None if it has none.

    The worst case and the checks of an attack suite count only if they are asked for.
    """
    if not (folder / "results.csv").is_file():
        return None
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        # With several budgets, the last and largest.
        rows = {(row["attack"], row["defense"]): row for row in csv.DictReader(file) if row["accuracy"]}
    kept = [
        float(row["accuracy"])
        for (attack, defense), row in rows.items()
        if label == attack or (label in (None, defense) and not row["check"] and attack != "worst_case")
    ]
    return sum(kept) / len(kept) if kept else None
