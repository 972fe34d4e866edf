"""What a finished run found: images, decisions and the figures drawn from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dipguard.data import ImageSet
from dipguard.decision import Reconstruction
from dipguard.evaluation.metrics import accuracy


@dataclass(frozen=True, eq=False)
class Outcome:
    """A run of N images.

    Attributes:
        clean: The clean images with labels, indices and class names.
        given: What the defence was given (after the attack), [N, 3, H, W].
        reconstructions: What it made of them, with the reason and the crossings that were stitched, N of them.
        decision_clean: The victim's decisions on the clean images, [N] int64.
        decision_given: On the given ones.
        decision_defended: On the reconstructions.
        ssim_given: SSIM of the given images to the clean ones, [N].
        ssim_defended: Of the reconstructions.
        seconds: ``attack``, ``start`` (compilation, choice of the stack size), ``fit`` and ``decide``, over all
            sessions of the run.
        settings: All that the run was made with, as JSON can hold it.
        folder: The run folder; traces lie at ``traces/<index>.safetensors``.
    """

    clean: ImageSet
    given: Tensor
    reconstructions: list[Reconstruction]
    decision_clean: Tensor
    decision_given: Tensor
    decision_defended: Tensor
    ssim_given: Tensor
    ssim_defended: Tensor
    seconds: Mapping[str, float]
    settings: Mapping[str, Any]
    folder: Path

    def __len__(self) -> int:
        return len(self.clean)

    def trace_path(self, position: int) -> Path:
        """Where the decision trace of the image at ``position`` of this run lies."""
        return self.folder / "traces" / f"{int(self.clean.indices[position]):06d}.safetensors"

    def class_name(self, label: int) -> str:
        """A class as a person reads it; its number where the data set names no classes."""
        names = self.clean.classes
        return names[label] if 0 <= label < len(names) else str(label)

    def metrics(self) -> dict[str, Any]:
        """The run's figures, as metrics.json holds them.

        ``crossings`` is the mean number of on-boundary images that were stitched, for ``dipguard`` that of windows that
        were averaged; ``images_per_second`` counts the
        seconds of the defence (start, fit and decide), not those of the attack.
        """
        labels = self.clean.labels
        used = [len(reconstruction.used) for reconstruction in self.reconstructions]
        return {
            "n": len(self),
            "accuracy": {
                "clean": accuracy(self.decision_clean, labels),
                "undefended": accuracy(self.decision_given, labels),
                "defended": accuracy(self.decision_defended, labels),
            },
            "ssim": {"given": float(self.ssim_given.mean()), "defended": float(self.ssim_defended.mean())},
            "crossings": sum(used) / len(used),
            "seconds": dict(self.seconds),
            "images_per_second": len(self) / sum(self.seconds[part] for part in ("start", "fit", "decide")),
            "settings": dict(self.settings),
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row an image, as images.csv holds them; ``why`` is the reconstruction's reason."""
        return [
            {
                "index": int(self.clean.indices[i]),
                "label": int(self.clean.labels[i]),
                "decision_clean": int(self.decision_clean[i]),
                "decision_given": int(self.decision_given[i]),
                "decision_defended": int(self.decision_defended[i]),
                "ssim_given": round(float(self.ssim_given[i]), 6),
                "ssim_defended": round(float(self.ssim_defended[i]), 6),
                "crossings_used": len(reconstruction.used),
                "why": reconstruction.reason,
            }
            for i, reconstruction in enumerate(self.reconstructions)
        ]
