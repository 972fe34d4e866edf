"""The decision trace: all that one image's DIP fit leaves behind, and the only thing that stitching reads."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from dipguard.files import write_bytes

FORMAT = "dipguard.trace/1"


@dataclass(frozen=True, eq=False)
class DecisionTrace:
    """One image's fit, as seen from the victim's decision space.

    S is the number of sampled steps, M that of kept crossings, L that of kept last reconstructions, C that of classes.
    Where several networks were fitted to the image, one after the other, the steps are counted through.

    Attributes:
        index: The image's index in its data set; with the seed it settles every random draw of its fit.
        given: The given image x0, [3, H, W] in [0, 1].
        given_scores: The victim's logits on it, [C].
        steps: Sampled optimiser steps t, 0-based, increasing, [S] int64.
        scores: The victim's logits on x(t), [S, C].
        quality: v(t) = SSIM(x(t), x0), [S].
        loss: The fit's mean squared error at t, [S].
        crossing_at: Sample number i of each kept crossing, which lies between the samples i and i + 1, [M] int64.
        alpha: Weight of the earlier sample in the on-boundary image (Eq. 4), [M].
        on_boundary: On-boundary images, [M, 3, H, W].
        last: The last L sampled reconstructions, oldest first, [L, 3, H, W].
        samples: All sampled reconstructions [S, 3, H, W], or None unless they were asked for.
        turned: The victim's logits on their mirrored copies (:mod:`dipguard.decision.evidence`), [S, C], or None.
        settings: What the fit was made with; values that JSON can hold. ``settings["K_max"]`` bounds the K of a replay.
    """

    index: int
    given: Tensor
    given_scores: Tensor
    steps: Tensor
    scores: Tensor
    quality: Tensor
    loss: Tensor
    crossing_at: Tensor
    alpha: Tensor
    on_boundary: Tensor
    last: Tensor
    samples: Tensor | None = None
    turned: Tensor | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        S, M = len(self.steps), len(self.crossing_at)
        image = tuple(self.given.shape)
        wanted = {
            "scores": (S, len(self.given_scores)),
            "quality": (S,),
            "loss": (S,),
            "alpha": (M,),
            "on_boundary": (M, *image),
            "last": (len(self.last), *image),
            **({} if self.samples is None else {"samples": (S, *image)}),
            **({} if self.turned is None else {"turned": (S, len(self.given_scores))}),
        }
        for name, shape in wanted.items():
            got = tuple(getattr(self, name).shape)
            if got != shape:
                raise ValueError(f"`{name}` of a trace must have shape {shape}, got {got}")
        if M and not (0 <= int(self.crossing_at.min()) and int(self.crossing_at.max()) < S - 1):
            raise ValueError(f"`crossing_at` of a trace must lie in [0, {S - 2}], got {self.crossing_at.tolist()}")

    @property
    def decisions(self) -> Tensor:
        """y(t), [S] int64."""
        return self.scores.argmax(dim=1)

    @property
    def given_decision(self) -> int:
        """The victim's decision on the given image."""
        return int(self.given_scores.argmax())

    @property
    def K_max(self) -> int:
        """The largest K that this trace can be replayed with."""
        return int(self.settings.get("K_max", len(self.last)))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name; ``samples`` and ``turned`` only when there are some."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("index", "settings")}
        return {name: value for name, value in values.items() if value is not None}

    def equals(self, other: DecisionTrace) -> bool:
        """Whether both hold the same numbers, bit for bit, and the same settings."""
        mine, theirs = self.tensors(), other.tensors()
        return (self.index, self.settings, mine.keys()) == (other.index, other.settings, theirs.keys()) and all(
            mine[k].dtype == theirs[k].dtype and torch.equal(mine[k], theirs[k]) for k in mine
        )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; a reader sees the whole file or none, also after a kill."""
        header = {"format": FORMAT, "index": str(self.index), "settings": json.dumps(self.settings, sort_keys=True)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        return write_bytes(Path(path), serialise(tensors, metadata=header))

    @classmethod
    def load(cls, path: str | Path) -> DecisionTrace:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The file is damaged, or is no decision trace.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"`path` must be a saved decision trace, got {path}, which does not exist")
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise ValueError(f"{path} must be a decision trace ({FORMAT}), got {header.get('format')!r}")
                # Copied: a tensor that still lay in the file would change, or crash, with it.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no dict
            return cls(index=int(header["index"]), settings=json.loads(header["settings"]), **tensors)
        except (SafetensorError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{path} must be a decision trace, but it is damaged: {error}") from error
