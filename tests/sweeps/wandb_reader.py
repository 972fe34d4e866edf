"""Reads an offline run of W&B back, with W&B's own record format.

Newer versions of W&B read their files in a program of their own; what Python has of it is the format of a record.
Records lie in blocks of 32 KiB as in LevelDB's log: a head of 7 bytes (check sum, length, kind), then a part of one.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEAD = 32 * 1024, 7
FULL, LAST = 1, 4


@dataclass
class Run:
    """What a record holds; axes are (axis, metric), artifacts (name, files by path)."""

    id: str = ""
    name: str = ""
    notes: str = ""
    tags: list[str] = field(default_factory=list)
    commit: str = ""
    resumes: bool = False
    group: str = ""
    job_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    axes: list[tuple[str, str]] = field(default_factory=list)
    artifacts: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    files: set[str] = field(default_factory=set)
    exit_code: int | None = None


def read_run(folder: Path) -> Run:
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("run-*.wandb")
    run = Run()
    for content in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id, run.group, run.job_type = record.run.run_id, record.run.run_group, record.run.job_type
            run.name, run.notes, run.tags = record.run.display_name, record.run.notes, list(record.run.tags)
            run.commit, run.resumes = record.run.git.commit, record.run.resume
            run.config = _items(record.run.config.update)
        elif kind == "config":
            run.config |= _items(record.config.update)
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "summary":
            run.summary |= _items(record.summary.update)
        elif kind == "metric":
            run.axes.append((record.metric.step_metric, record.metric.glob_name or record.metric.name))
        elif kind == "files":
            run.files |= {item.path for item in record.files.files}
        elif kind == "artifact":
            files = record.artifact.manifest.contents
            run.artifacts.append((record.artifact.name, {file.path: file.local_path for file in files}))
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _items(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _records(content: bytes) -> Iterator[bytes]:
    place, record = HEAD, b""  # the file begins with a head of its own, as long
    while place + HEAD <= len(content):
        if BLOCK - place % BLOCK < HEAD:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + HEAD])
        record += content[place + HEAD : place + HEAD + length]
        place += HEAD + length
        if kind in (FULL, LAST):
            yield record
            record = b""
