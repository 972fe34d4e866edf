"""Atomic file writes, values for JSON, and digests of files and tensors."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def write_bytes(path: Path, content: bytes, *, mode: int | None = None) -> Path:
    """Write ``content`` to ``path`` atomically: even after a kill there is the old file or the whole new one.

    ``mode`` are its permissions, such as 0o600; None leaves them to the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")  # not longer than a long name
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            temporary.chmod(mode)
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and not error.filename:
            error.filename = str(path)  # a full disk names no file
        temporary.unlink(missing_ok=True)
        raise
    return path


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text atomically."""
    return write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> Path:
    """Write indented JSON atomically. NaN is refused, since it is not valid JSON."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; FileNotFoundError, or ValueError if it does not hold JSON."""
    try:
        return json.loads(path.read_bytes(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold JSON, but it is damaged: {error}") from error


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def csv_text(fields: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV; None and what is missing are empty fields."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def write_npz(path: Path, **arrays: Any) -> Path:
    """Write arrays as a compressed NumPy archive, atomically."""
    import numpy as np

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return write_bytes(path, buffer.getvalue())


def as_json(value: Any) -> Any:
    """A value for JSON: of anything but plain values, collections and lengths of time, the name of its class."""
    if isinstance(value, Mapping):
        return {str(key): as_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(one) for one in value]
    if isinstance(value, timedelta):
        return str(value)
    if getattr(value, "ndim", None) == 0:  # a number of NumPy or torch
        return value.item()
    return value if isinstance(value, (str, int, float, type(None))) else type(value).__name__


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """Return the first 16 hex digits of the SHA-256 of the tensors' types, shapes and values, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{values.dtype}{tuple(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]
