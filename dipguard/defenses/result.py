"""What a defended set of images comes back as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dipguard.decision import DecisionTrace


@dataclass(frozen=True, eq=False)
class DefenseResult:
    """N defended images.

    Attributes:
        reconstructions: [N, 3, H, W] in [0, 1], on the given images' device and in their dtype.
        decisions_before: The victim's decisions on the given images, [N] int64.
        decisions_after: Its decisions on the reconstructions, [N] int64.
        traces: One decision trace an image.
        reasons: ``crossings`` or ``no_crossing``, one an image.
        crossings: Number of on-boundary images stitched, one an image.
        seconds: Wall time by part: ``start`` (choice of engine and stack size, compilation, the Trainer's start),
            ``fit`` and ``decide`` (victim, SSIM, localisation, stitching).
    """

    reconstructions: Tensor
    decisions_before: Tensor
    decisions_after: Tensor
    traces: list[DecisionTrace]
    reasons: list[str]
    crossings: list[int]
    seconds: dict[str, float]

    @classmethod
    def join(cls, parts: Sequence[DefenseResult]) -> DefenseResult:
        """Several results as one, in order; seconds add up.

        Raises:
            ValueError: No parts.
        """
        if not parts:
            raise ValueError("`parts` must hold at least one result, got none")
        return cls(
            reconstructions=torch.cat([p.reconstructions for p in parts]),
            decisions_before=torch.cat([p.decisions_before for p in parts]),
            decisions_after=torch.cat([p.decisions_after for p in parts]),
            traces=[t for p in parts for t in p.traces],
            reasons=[r for p in parts for r in p.reasons],
            crossings=[c for p in parts for c in p.crossings],
            seconds={key: sum(p.seconds[key] for p in parts) for key in parts[0].seconds},
        )
