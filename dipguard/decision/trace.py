"""The decision trace: what one image's DIP fit leaves behind, and what stitching needs of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from dipguard.checks import check_int
from dipguard.files import write_bytes

FORMAT = "dipguard.trace/2"


def sampled_steps(T: int, *, decisions: int | None = 200, every: int | None = None) -> tuple[int, ...]:
    """The 0-based optimiser steps t, 0 <= t < T, whose reconstruction x(t) the victim classifies.

    Section 4.1 takes 200 steps at equal intervals. With ``decisions=S``, at least 2, they are ceil((i+1) T/S) - 1 for
    i = 0 ... S-1, which spreads S samples as evenly as whole steps allow; if S is larger than T, every step is sampled.
    With ``every=n``, from 1 to T // 2, they are n-1, 2n-1, ...: a shorter T then gives a prefix of a longer one. Both
    end on or near step T-1, since Algorithm 1 falls back on the last reconstructions when no boundary was crossed.
    TypeError for what is no integer, or if neither ``decisions`` nor ``every`` is given, ValueError if out of range.
    """
    check_int(T, name="T", low=1)
    if every is not None:
        check_int(every, name="every", low=1, high=max(1, T // 2))
        return tuple(range(every - 1, T, every))
    if decisions is None:
        raise TypeError("`decisions` must be an integer when `every` is not given, got None")
    S = min(check_int(decisions, name="decisions", low=2), T)
    return tuple(-(-(i + 1) * T // S) - 1 for i in range(S))


@dataclass(frozen=True, eq=False)
class DecisionTrace:
    """One image's fit, as seen from the victim's decision space.

    S is the number of sampled steps, M that of kept crossings, L that of kept last reconstructions, C that of classes.
    If several networks were fitted to the image one after the other, their steps are numbered consecutively.

    Attributes:
        index: The image's index in its data set; with the seed, and the number of a vote, it determines every random
            draw of the fit.
        given: The given image x0, [3, H, W] in [0, 1].
        given_scores: The victim's logits on it, [C].
        steps: Sampled optimiser steps t, 0-based, increasing, [S] int64.
        scores: The victim's logits on x(t), [S, C].
        quality: v(t) = SSIM(x(t), x0), [S].
        loss: The fit's error at t (mean square of what exceeds the dead zone, if it has one), [S].
        crossing_at: Sample number i of each kept crossing, which lies between samples i and i + 1, [M] int64.
        alpha: Weight of the earlier sample in the on-boundary image (Eq. 4), [M].
        on_boundary: On-boundary images, [M, 3, H, W].
        last: The last L sampled reconstructions, oldest first (the defence mirror: each network's last), [L, 3, H, W].
        samples: All sampled reconstructions [S, 3, H, W], or None if they were not kept.
        mirrored_logits: The victim's logits on mirrored copies of the samples
            (:mod:`dipguard.decision.class_scores`), [S, C], or None.
        settings: Options of the fit, of the decisions and of the stitch; JSON values. ``settings["K_max"]`` bounds the
            K of a replay.
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
    mirrored_logits: Tensor | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        S, M, C = len(self.steps), len(self.crossing_at), len(self.given_scores)
        image = tuple(self.given.shape)
        wanted: dict[str, tuple[int, ...]] = {"scores": (S, C), "quality": (S,), "loss": (S,), "alpha": (M,)}
        wanted |= {"on_boundary": (M, *image), "last": (len(self.last), *image)}
        wanted |= {"samples": (S, *image), "mirrored_logits": (S, C)}
        for name, tensor in self.tensors().items():
            shape, got = wanted.get(name), tuple(tensor.shape)
            if shape is not None and got != shape:
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
        """The tensors by name, without those that are None."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("index", "settings")}
        return {name: value for name, value in values.items() if value is not None}

    def equals(self, other: DecisionTrace) -> bool:
        """Whether both hold the same numbers, bit for bit, and the same settings."""
        mine, theirs = self.tensors(), other.tensors()
        return (self.index, self.settings, mine.keys()) == (other.index, other.settings, theirs.keys()) and all(
            mine[k].dtype == theirs[k].dtype and torch.equal(mine[k], theirs[k]) for k in mine
        )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically."""
        header = {"format": FORMAT, "index": str(self.index), "settings": json.dumps(self.settings, sort_keys=True)}
        # Copies: the format has no place for two tensors that share memory.
        order = torch.contiguous_format
        tensors = {name: t.detach().cpu().clone(memory_format=order) for name, t in self.tensors().items()}
        return write_bytes(Path(path), serialise(tensors, metadata=header))

    @classmethod
    def load(cls, path: str | Path) -> DecisionTrace:
        """Read what :meth:`save` wrote; FileNotFoundError, or ValueError if it is damaged or no decision trace."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"`path` must be a saved decision trace, got {path}, which is no file")
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
