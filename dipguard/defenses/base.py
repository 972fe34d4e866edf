"""What every defence is, images in and images out, and what all rows of the table of defences share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dipguard.checks import check_images, check_int, check_labels
from dipguard.classifier import check_is_module
from dipguard.decision.readout import STITCHED, Readout

if TYPE_CHECKING:
    from dipguard.fit import FitOptions


@runtime_checkable
class Defense(Protocol):
    """A purifier: takes images that may be adversarial, returns images that the victim shall read correctly."""

    def purify(self, images: Tensor, *, indices: Tensor | None = None) -> Tensor:
        """[N, 3, H, W] in [0, 1] -> the same shape and range.

        ``indices`` int [N] are the images' positions in the whole data set, which settle their random draws; 0 to
        N - 1 by default.
        """
        ...


class Purifier(ABC):
    """A row of `dipguard.defenses.DEFENSES`: ``purify(images)`` with checked images, a checked result and settings.

    A subclass sets ``name``, implements `purify_one` (or, for images that are fitted together, overrides
    `purify_images`), and adds to `settings` whatever else its result depends on.

    Args:
        victim: classifier of images [B, 3, H, W] in [0, 1]; networks of a defence run where it is.
        seed: of the defence's random draws, at least 0.

    Raises:
        TypeError, ValueError: ``victim`` is not a module, or ``seed`` is not an integer in range.
    """

    name: ClassVar[str]

    def __init__(self, victim: nn.Module, *, seed: int = 0) -> None:
        self.victim = check_is_module(victim)
        self.seed = check_int(seed, name="seed", low=0)

    @property
    def random(self) -> bool:
        """Whether draws are made. Given seed and index they are the same each time: new draws need another index."""
        return False

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that a result depends on besides image, index and victim, ready for JSON."""
        return {"name": self.name, "seed": self.seed} if self.random else {"name": self.name}

    @property
    def steps_per_image(self) -> int:
        """Optimiser steps of a deep image prior that one image costs."""
        return 0

    @property
    def dip_fits(self) -> tuple[FitOptions, ...]:
        """The fits of a deep image prior that it makes of each image; none where it is no such thing."""
        return ()

    @property
    def readout_views(self) -> dict[str, int]:
        """What `readouts` returns: names, and how many views an image has in each at most."""
        return {STITCHED: 1}

    @property
    def unavailable(self) -> str | None:
        """Why `purify` cannot run (such as weights that were not supplied); None if it can."""
        return None

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result for images of the given size, pixels.

        Raises:
            ValueError: images of this size cannot be purified.
        """
        return height, width

    def purify(self, images: Tensor, *, indices: Tensor | None = None) -> Tensor:
        """Return purified images [N, 3, *output_size(H, W)] of the images' dtype and device, in [0, 1], detached.

        Works under ``no_grad`` and ``inference_mode`` too; the caller's random state stays as it was. An image's result
        depends on neither its batch mates nor their number.

        Args:
            images: float [N, 3, H, W] in [0, 1].
            indices: int [N], positions in the whole data set, at least 0; by default 0 to N - 1.

        Raises:
            TypeError, ValueError: bad images or indices, or a size that the defence cannot take.
            RuntimeError: the defence is unavailable, or broke its promise (shape, dtype, range, finite values).
        """
        positions = self._check_given(images, indices)
        # Tensors made in inference mode could never again take part in autograd: neither the result nor, should they
        # be moved to another device meanwhile, the weights of a network.
        with torch.inference_mode(False), torch.no_grad():
            return self._check_result(images, self.purify_images(images.detach().clone(), positions))

    def readouts(self, images: Tensor, *, indices: Tensor | None = None) -> dict[str, Readout]:
        """What the defence looked at on its way to its answer, from one purification; for attacks that know it.

        Args and errors are those of `purify`.

        Returns:
            A readout for each name of `readout_views`. ``stitched`` is always among them: one view, which is what
            `purify` returns for the same images and indices.
        """
        positions = self._check_given(images, indices)
        with torch.inference_mode(False), torch.no_grad():
            made = self.readouts_of(images.detach().clone(), positions)
            self._check_result(images, made[STITCHED].views[0])
            return made

    def readouts_of(self, images: Tensor, indices: list[int]) -> dict[str, Readout]:
        """Purify checked images [N, 3, H, W] once and say what was looked at."""
        return {STITCHED: Readout(self.purify_images(images, indices)[None])}

    def purify_images(self, images: Tensor, indices: list[int]) -> Tensor:
        """Purify checked images [N, 3, H, W]. One at a time: convolutions round differently with the batch's size."""
        return torch.stack([self.purify_one(image, index) for image, index in zip(images, indices, strict=True)])

    @abstractmethod
    def purify_one(self, image: Tensor, index: int) -> Tensor:
        """Purify one image [3, H, W] (the defence's own copy); the result is of its dtype and on its device."""

    def _check_given(self, images: Tensor, indices: Tensor | None) -> list[int]:
        if self.unavailable is not None:
            raise RuntimeError(f"the defence {self.name!r} cannot run: {self.unavailable}")
        check_images(images)
        self.output_size(*images.shape[-2:])
        order = torch.arange(len(images)) if indices is None else indices
        positions: list[int] = check_labels(order, count=len(images), name="indices").tolist()
        return positions

    def _check_result(self, given: Tensor, purified: Tensor) -> Tensor:
        expected = (len(given), 3, *self.output_size(*given.shape[-2:]))
        got = (tuple(purified.shape), purified.dtype, purified.device)
        if got != (expected, given.dtype, given.device):
            raise RuntimeError(
                f"defence {self.name!r} returned {got[0]} of {got[1]} on {got[2]}, not {expected} of {given.dtype} on "
                f"{given.device}"
            )
        if not bool(torch.isfinite(purified).all()):
            raise RuntimeError(f"defence {self.name!r} returned NaN or infinite values")
        low, high = (float(value) for value in torch.aminmax(purified))
        if low < 0 or high > 1:
            raise RuntimeError(f"defence {self.name!r} left [0, 1]: its values go from {low:.4g} to {high:.4g}")
        return purified


def library(module: str, *, defense: str) -> Any:
    """Import a library that only some defences need.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the defence {defense!r} needs {module}, which could not be imported ({error}): "
            "pip install 'dipguard[defenses]'"
        ) from error
