"""A short real fit that shows whether dipguard works here, and how fast."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dipguard.defenses import DIPGuard

IMAGES, STEPS = 4, 200


@dataclass(frozen=True)
class SelfTest:
    """What the fit gave.

    Attributes:
        victim: Who read along: ``digits_cnn``, or ``an untrained network`` where scikit-learn is missing.
        engine: ``native`` or ``torch``.
        device: Where the fit ran.
        milliseconds: Of one step of one image, the victim's share left out.
        rise: By how much the mean SSIM to the given images rose from the first sampled step to the last.
    """

    victim: str
    engine: str
    device: str
    milliseconds: float
    rise: float

    @property
    def problem(self) -> str | None:
        """What is wrong; None if all is well."""
        if not math.isfinite(self.rise) or self.rise < 0.1:
            return f"the fit did not approach its images (SSIM rose by {self.rise:.3f} in {STEPS} steps)"
        return None


def self_test(device: torch.device) -> SelfTest:
    """Fit four digits for 200 steps on ``device`` (the torch engine on a GPU; the fastest that works on a CPU).

    Raises:
        Exception: Whatever a broken installation raises.
    """
    victim, images, name = _victim_and_images()
    guard = DIPGuard(victim.to(device), T=STEPS, decisions=20, seed=0, stack_size=IMAGES, progress=False)
    result = guard.defend(images)
    first, last = (torch.stack([trace.quality[at] for trace in result.traces]).mean() for at in (0, -1))
    if not bool(torch.isfinite(result.reconstructions).all()):
        raise ArithmeticError("the reconstructions hold NaN or infinite values")
    return SelfTest(
        victim=name,
        engine=_engine(device),
        device=str(device),
        milliseconds=1000 * result.seconds["fit"] / (STEPS * IMAGES),
        rise=float(last - first),
    )


def _engine(device: torch.device) -> str:
    from dipguard.engines.native_build import BuildError, library

    if device.type != "cpu":
        return "torch"
    try:
        library("float32")
    except BuildError:
        return "torch"
    return "native"


def _victim_and_images() -> tuple[torch.nn.Module, torch.Tensor, str]:
    from importlib.util import find_spec

    from dipguard.victims import build_victim

    if find_spec("sklearn") is not None:
        from dipguard.data import load_data

        return build_victim("digits_cnn", progress=False), load_data("digits", limit=IMAGES).images, "digits_cnn"
    draws = torch.Generator().manual_seed(0)
    coarse = torch.rand(IMAGES, 3, 4, 4, generator=draws)
    images = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear").clamp(0, 1)
    layer = torch.nn.utils.skip_init(torch.nn.Linear, 3 * 32 * 32, 10)
    torch.nn.init.normal_(layer.weight, std=0.02, generator=draws)
    torch.nn.init.zeros_(layer.bias)
    return torch.nn.Sequential(torch.nn.Flatten(), layer), images, "an untrained network"
