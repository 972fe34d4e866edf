"""A run's folder: what is finished stays finished, whatever happens to the process.

    settings.json   what the results depend on; a run with other settings is refused
    given.npz       the attacked images, the decisions on them and on the clean ones
    fits.json       the finished fits: file, checksum, seconds
    stack_size.json how many images were fitted at once, where that was left to the program
    traces/         one decision trace an image

Traces are written first and entered into fits.json as a stack, in one step: a stack counts only when all of it is
there, so a continued run cuts the images into the same stacks as an uninterrupted one.
"""

from __future__ import annotations

import json
import logging
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dipguard.checks import check_int
from dipguard.decision import DecisionTrace
from dipguard.files import file_digest, read_json, write_json, write_npz

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Given:
    """The images that the defence is given.

    Attributes:
        images: After the attack, [N, 3, H, W] in [0, 1].
        decisions: The victim's decisions on them, [N] int64.
        decisions_clean: Its decisions on the clean images, [N] int64.
        seconds: What the attack took.
    """

    images: Tensor
    decisions: Tensor
    decisions_clean: Tensor
    seconds: float


class RunFolder:
    """The files of one run.

    Args:
        path: The folder; made if it is missing.
        settings: What the results depend on, nested dicts of values that JSON can hold.

    Raises:
        ValueError: The folder holds a run with other settings (the message names them), or settings.json is damaged.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.traces = self.path / "traces"
        saved = self.path / "settings.json"
        wanted = json.loads(json.dumps(settings))
        if saved.is_file():
            _check_same(flatten(read_json(saved)), flatten(wanted), self.path)
        else:
            write_json(saved, wanted)
        self.traces.mkdir(exist_ok=True)
        for leftover in self.traces.glob(".*.safetensors.*"):
            leftover.unlink()
        self._fits: dict[str, Any] = self._read_fits()

    def _read_fits(self) -> dict[str, Any]:
        path = self.path / "fits.json"
        if not path.is_file():
            return {}
        try:
            fits = read_json(path)
            return {str(int(index)): {**entry, "fit": float(entry["fit"])} for index, entry in fits.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            _log.warning("%s is damaged, so everything is fitted again: %s", path, error)
            return {}

    def load_given(self, count: int) -> Given | None:
        """The attacked images of an earlier session, or None where there are none or they are damaged."""
        path = self.path / "given.npz"
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as saved:
                images, decisions, clean = (
                    torch.from_numpy(saved[k]) for k in ("images", "decisions", "decisions_clean")
                )
                seconds = float(saved["seconds"])
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            _log.warning("%s is damaged, so the images are attacked again: %s", path, error)
            return None
        if not len(images) == len(decisions) == len(clean) == count:
            _log.warning("%s holds %d images where %d were expected: they are attacked again", path, len(images), count)
            return None
        return Given(images, decisions, clean, seconds)

    def save_given(self, given: Given) -> None:
        """Keep the attacked images, so that no later session attacks them again."""
        write_npz(
            self.path / "given.npz",
            images=given.images.numpy(),
            decisions=given.decisions.numpy(),
            decisions_clean=given.decisions_clean.numpy(),
            seconds=np.float64(given.seconds),
        )

    def trace_path(self, index: int) -> Path:
        """Where the trace of the image ``index`` is kept."""
        return self.traces / f"{index:06d}.safetensors"

    def is_fitted(self, index: int, given: Tensor) -> bool:
        """Whether the trace of the image ``index`` is entered, undamaged, and of this very image [3, H, W]."""
        entry = self._fits.get(str(index))
        if entry is None:
            return False
        path = self.trace_path(index)
        try:
            sound = file_digest(path) == entry["sha256"]
            trace = DecisionTrace.load(path) if sound else None
        except (FileNotFoundError, ValueError) as error:
            _log.warning("%s cannot be read, so image %d is fitted again: %s", path, index, error)
            return False
        if trace is None or trace.index != index or not torch.equal(trace.given, given.to(trace.given.dtype)):
            _log.warning("%s was changed since it was written, so image %d is fitted again", path, index)
            return False
        return True

    def load_trace(self, index: int) -> DecisionTrace:
        """The trace of the image ``index``."""
        return DecisionTrace.load(self.trace_path(index))

    def save_stack(self, traces: Sequence[DecisionTrace], *, seconds: Mapping[str, float]) -> None:
        """Keep a finished stack; its ``seconds`` (start, fit, decide) are shared out evenly among its images."""
        share = {name: value / len(traces) for name, value in seconds.items()}
        entries: dict[str, Any] = {}
        for trace in traces:
            path = trace.save(self.trace_path(trace.index))
            entries[str(trace.index)] = {"file": f"traces/{path.name}", "sha256": file_digest(path), **share}
        self._fits |= entries
        write_json(self.path / "fits.json", self._fits)

    def seconds(self, indices: Sequence[int]) -> dict[str, float]:
        """What the fits of these images took, over all sessions: seconds {start, fit, decide}."""
        parts = ("start", "fit", "decide")
        # A folder of an older version may hold entries without "start".
        return {name: float(sum(self._fits[str(i)].get(name, 0.0) for i in indices)) for name in parts}

    def load_stack_size(self) -> int | None:
        """How many images an earlier session fitted at once; None if there was none that chose it, or it is damaged.

        Another choice would change float32 results by rounding, where the engine's rounding depends on the stack.
        """
        path = self.path / "stack_size.json"
        if not path.is_file():
            return None
        try:
            return check_int(read_json(path)["stack_size"], name="stack_size", low=1)
        except (KeyError, TypeError, ValueError) as error:
            _log.warning("%s is damaged, so the stack size is chosen again: %s", path, error)
            return None

    def save_stack_size(self, size: int) -> None:
        """Keep how many images are fitted at once."""
        write_json(self.path / "stack_size.json", {"stack_size": size})


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict with dotted keys, as on the command line."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _check_same(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    absent = "not set"
    changed = [
        f"{key}: {saved.get(key, absent)} there, {now.get(key, absent)} now"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key, absent) != now.get(key, absent)
    ]
    if changed:
        raise ValueError(
            f"`hydra.run.dir` {path} holds a run with other settings; take another folder, or the same settings "
            f"to go on with it. What differs: {'; '.join(changed)}"
        )
