"""The proposed defence as a row of the table of defences."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dipguard.decision import stitch
from dipguard.decision.readout import STITCHED, Readout
from dipguard.defenses.base import Purifier
from dipguard.defenses.dipguard import DIPGuard
from dipguard.fit import FitOptions
from dipguard.networks import resolve


class GuardRow(Purifier):
    """:class:`~dipguard.defenses.DIPGuard` (Ding et al. 2021, Algorithm 1), its defaults the paper's settings.

    No paper is devoted to breaking it; purifiers with no more evidence have fallen to adaptive attacks (Athalye et al.
    2018; Tramer et al. 2020; Croce et al. 2022).

    Args:
        victim: As in `Purifier`; it guides the reconstruction.
        seed: As in `Purifier`.
        options: Those of :class:`~dipguard.defenses.DIPGuard`.

    Attributes:
        guard: The guard itself.

    Raises:
        TypeError, ValueError: An option is out of range.
    """

    name: ClassVar[str] = "paper"
    __signature__ = inspect.signature(DIPGuard)  # the options are the guard's, by name

    def __init__(self, victim: nn.Module, *, seed: int = 0, **options: Any) -> None:
        super().__init__(victim, seed=seed)
        self.guard = DIPGuard(victim, seed=seed, **options)

    @property
    def random(self) -> bool:
        """Weights, z and jitter are drawn."""
        return True

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Purifier`, with the guard's settings."""
        return {**super().settings, **self.guard.settings}

    @property
    def steps_per_image(self) -> int:
        """T."""
        return self.guard.steps_per_image

    @property
    def dip_fits(self) -> tuple[FitOptions, ...]:
        """The guard's one."""
        return (self.guard.fit_options,)

    @property
    def readout_views(self) -> dict[str, int]:
        """x(T), the mean of the on-boundary images that are stitched, and the stitched image."""
        return {"last": 1, "on_boundary": 1, STITCHED: 1}

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """The images' own size.

        Raises:
            ValueError: The image is too small for the network.
        """
        resolve(self.guard.fit_options.network).check_size(height, width)
        return height, width

    def purify_images(self, images: Tensor, indices: list[int]) -> Tensor:
        """Fit and stitch, stack by stack."""
        return self.guard.purify(images, indices=indices)

    def readouts_of(self, images: Tensor, indices: list[int]) -> dict[str, Readout]:
        """Fit once; ``on_boundary`` is, for an image without a crossing, what is stitched in their place."""
        result = self.guard.defend(images, indices=indices)
        last, boundary = [], []
        for trace in result.traces:
            made = stitch(trace, **asdict(self.guard.stitch_options))
            crossed = len(made.used) > 0
            boundary.append(trace.on_boundary[made.used].mean(dim=0) if crossed else made.image)
            last.append(trace.last[-1])
        views = {"last": last, "on_boundary": boundary, STITCHED: list(result.reconstructions)}
        return {name: Readout(torch.stack(view)[None].to(images)) for name, view in views.items()}

    def purify_one(self, image: Tensor, index: int) -> Tensor:
        """A stack of one."""
        return self.purify_images(image[None], [index])[0]
