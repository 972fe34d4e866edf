"""Figure 8's U-Net with skip connections, as a stack of B independent networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dipguard.checks import check_choice, check_int
from dipguard.networks.layers import INITS, StackedConv2d, StackedNorm2d, from_stack, join, to_stack
from dipguard.networks.presets import NetworkSpec

SLOPE = 0.2
"""Negative slope of LeakyReLU in the official DIP implementation, which appendix B follows."""


class ConvBlock(nn.Module):
    """Convolution, normalisation, LeakyReLU."""

    def __init__(
        self, stack: int, inputs: int, outputs: int, *, kernel: int, stride: int = 1, padding: str = "zeros"
    ) -> None:
        super().__init__()
        self.conv = StackedConv2d(stack, inputs, outputs, kernel=kernel, stride=stride, padding=padding)
        self.norm = StackedNorm2d(stack, outputs, slope=SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        """[1, B * inputs, H, W] -> [1, B * outputs, H', W']."""
        out: Tensor = self.norm(self.conv(x))
        return out


class Scale(nn.Module):
    """One scale: skip branch beside (down, down, deeper scale, up), concatenated, normalised, convolved twice.

    Args:
        deeper: The next scale, or None at the bottom.
    """

    def __init__(
        self, stack: int, spec: NetworkSpec, level: int, *, inputs: int, deeper: Scale | None, padding: str
    ) -> None:
        super().__init__()
        self.stack = stack
        n_d, n_u, n_s = spec.n_d[level], spec.n_u[level], spec.n_s[level]
        below = n_d if deeper is None else spec.n_u[level + 1]
        self.skip = ConvBlock(stack, inputs, n_s, kernel=spec.k_s[level], padding=padding) if n_s else None
        self.down = nn.Sequential(
            ConvBlock(stack, inputs, n_d, kernel=spec.k_d[level], stride=2, padding=padding),
            ConvBlock(stack, n_d, n_d, kernel=spec.k_d[level], padding=padding),
        )
        self.deeper = deeper
        self.upsample = spec.upsample
        self.norm = StackedNorm2d(stack, n_s + below)
        self.up = nn.Sequential(
            ConvBlock(stack, n_s + below, n_u, kernel=spec.k_u[level], padding=padding),
            ConvBlock(stack, n_u, n_u, kernel=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[1, B * inputs, H, W] -> [1, B * n_u, H, W]."""
        low = self.down(x)
        if self.deeper is not None:
            low = self.deeper(low)
        corners = False if self.upsample == "bilinear" else None  # torch takes no other value where it has no meaning
        high = F.interpolate(low, scale_factor=2, mode=self.upsample, align_corners=corners)
        if high.shape[-2:] != x.shape[-2:]:
            # An odd side comes back one pixel longer. An even one is not sliced: the slice's backward would copy it.
            high = high[..., : x.shape[-2], : x.shape[-1]]
        joined = high if self.skip is None else join(self.skip(x), high, stack=self.stack)
        return self.up(self.norm(joined))


class StackedSkipNet(nn.Module):
    """B independent DIP networks: z [B, input_depth, H, W] -> reconstructions [B, 3, H, W] in (0, 1).

    Args:
        spec: Figure 8's hyper-parameters.
        stack_size: B, at least 1.
        padding: ``zeros`` or ``reflect`` at the borders of the image.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(self, spec: NetworkSpec, *, stack_size: int, padding: str = "reflect") -> None:
        super().__init__()
        check_int(stack_size, name="stack_size", low=1)
        self.spec = spec
        self.stack_size = stack_size
        self.padding = padding
        scale: Scale | None = None
        for level in reversed(range(spec.scales)):
            inputs = spec.n_d[level - 1] if level else spec.input_depth
            scale = Scale(stack_size, spec, level, inputs=inputs, deeper=scale, padding=padding)
        assert scale is not None
        self.body = scale
        self.head = StackedConv2d(stack_size, spec.n_u[0], 3, kernel=1)
        self.channels_last = False

    def init_one(self, b: int, *, generator: torch.Generator, init: str = "default") -> None:
        """Initialise the b-th network from ``generator`` alone.

        Args:
            b: Position in the stack.
            generator: A CPU generator.
            init: ``default`` (PyTorch's for convolutions) or ``xavier`` (Algorithm 1, line 1).

        Raises:
            ValueError: Unknown ``init``.
        """
        check_choice(init, INITS, name="init")
        for module in self.modules():
            if isinstance(module, (StackedConv2d, StackedNorm2d)):
                module.init_one(b, generator=generator, init=init)

    def set_layout(self, *, channels_last: bool) -> None:
        """Choose how activations and weights lie in memory: no number changes, only the speed.

        Call it before making an optimiser, whose moments take the weights' layout.
        """
        self.channels_last = channels_last
        for module in self.modules():
            if isinstance(module, StackedConv2d):
                module.set_layout(channels_last=channels_last)

    def parameters_per_image(self) -> int:
        """Number of parameters of one network."""
        return sum(p.numel() for p in self.parameters()) // self.stack_size

    def forward(self, z: Tensor) -> Tensor:
        """One pass of all B networks, each on its own z."""
        x = self.head(self.body(to_stack(z, channels_last=self.channels_last)))
        return from_stack(torch.sigmoid(x), stack=self.stack_size)
