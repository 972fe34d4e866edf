"""The networks of appendix B, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dipguard.checks import check_choice, check_int, check_positive

UPSAMPLINGS = ("bilinear", "nearest")


@dataclass(frozen=True)
class NetworkSpec:
    """Figure 8's hyper-parameters, one entry per scale, finest scale first.

    TypeError or ValueError if the lists differ in length or are empty, or a value is of another type or out of range.

    Attributes:
        n_d: Filters of the downsampling convolutions.
        n_u: Filters of the upsampling convolutions.
        n_s: Filters of the skip connections; 0 for a scale without one.
        k_d: Kernel sizes of the downsampling convolutions.
        k_u: Kernel sizes of the upsampling convolutions.
        k_s: Kernel sizes of the skip connections.
        input_depth: Channels of z.
        z_scale: Upper end of U(0, z_scale), from which z is drawn.
        upsample: ``bilinear`` (appendix B) or ``nearest``, by 2 from scale to scale.
    """

    n_d: tuple[int, ...]
    n_u: tuple[int, ...]
    n_s: tuple[int, ...]
    k_d: tuple[int, ...]
    k_u: tuple[int, ...]
    k_s: tuple[int, ...]
    input_depth: int = 4
    z_scale: float = 1 / 30
    upsample: str = "bilinear"

    def __post_init__(self) -> None:
        check_choice(self.upsample, UPSAMPLINGS, name="upsample")
        lists = ("n_d", "n_u", "n_s", "k_d", "k_u", "k_s")
        for name in lists:
            if isinstance(value := getattr(self, name), str) or not isinstance(value, Sequence):
                raise TypeError(f"`{name}` must be a list of integers, one a scale, got {value!r}")
        lengths = {name: len(getattr(self, name)) for name in lists}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"a network's lists must have one entry a scale, at least one, got lengths {lengths}")
        for name, low in (("n_d", 1), ("n_u", 1), ("n_s", 0), ("k_d", 1), ("k_u", 1), ("k_s", 1)):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # lists could not be hashed
            for number in getattr(self, name):
                check_int(number, name=name, low=low)
        check_int(self.input_depth, name="input_depth", low=1)
        check_positive(self.z_scale, name="z_scale")

    @property
    def scales(self) -> int:
        """Number of scales."""
        return len(self.n_d)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError for images that the scales would shrink to a single pixel, which normalises to 0."""
        least = 2**self.scales + 1
        if min(height, width) < least:
            raise ValueError(
                f"`images` must be at least {least}x{least} pixels for a network of {self.scales} scales (2x2 at the "
                f"deepest), got {height}x{width}"
            )


def hourglass(
    channels: tuple[int, ...],
    *,
    skips: int,
    input_depth: int,
    kernel: int = 3,
    upsample: str = "bilinear",
    z_scale: float = 0.1,
) -> NetworkSpec:
    """A network with the same filters ``channels``, finest scale first, down and up in each scale.

    The skip connections have ``skips`` filters (0: there are none) and 1x1 kernels, all other kernels are of one size;
    Dai et al. 2020 (DIPDefend) take 3.
    """
    n_s, k, ones = ((value,) * len(channels) for value in (skips, kernel, 1))
    return NetworkSpec(channels, channels, n_s, k, k, ones, input_depth, z_scale, upsample)


PRESETS: dict[str, NetworkSpec] = {
    "cifar10": hourglass((32,) * 3, skips=3, input_depth=4, z_scale=1 / 30),
    "imagenet": hourglass((64,) * 5, skips=4, input_depth=4, z_scale=1 / 100),
    # The paper lists four k_s for the two scales of the small network; all are 1.
    "small": hourglass((16,) * 2, skips=4, kernel=2, input_depth=4, z_scale=1 / 30),
    "medium": hourglass((32,) * 3, skips=3, input_depth=4, z_scale=1 / 30),
    "large": hourglass((48,) * 4, skips=4, kernel=4, input_depth=4, z_scale=1 / 30),
}
"""Appendix B; ``cifar10`` and ``medium`` are the same network."""


def network_spec(network: str | NetworkSpec) -> NetworkSpec:
    """The spec of a preset (ValueError for an unknown name); a spec is returned unchanged."""
    if isinstance(network, NetworkSpec):
        return network
    return PRESETS[check_choice(network, PRESETS, name="network")]
