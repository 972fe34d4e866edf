"""The plain DIP loop: one image, one network of torch.nn layers, Adam's defaults.

The stacked fit is measured and tested against it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dipguard.networks import NetworkSpec, StackedSkipNet
from dipguard.networks.unet import Scale


class _Pad(nn.Module):
    def __init__(self, kernel: int, mode: str) -> None:
        super().__init__()
        before, after = (kernel - 1) // 2, kernel // 2
        self.sides = (before, after, before, after)
        self.reflect = mode == "reflect"

    def forward(self, x: Tensor) -> Tensor:
        if not self.reflect:
            return F.pad(x, self.sides)
        return F.pad(x, self.sides, mode="reflect" if max(self.sides) < min(x.shape[-2:]) else "replicate")


def _conv(inputs: int, outputs: int, kernel: int, mode: str, stride: int = 1) -> nn.Sequential:
    if kernel == 1 or (kernel % 2 and mode == "zeros"):
        return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2))
    return nn.Sequential(_Pad(kernel, mode), nn.Conv2d(inputs, outputs, kernel, stride=stride))


def _block(inputs: int, outputs: int, kernel: int, mode: str, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, outputs, kernel, mode, stride), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2))


class PlainSkipNet(nn.Module):
    """Figure 8 for a single image, written with torch.nn's own layers: z [1, input_depth, H, W] -> [1, 3, H, W].

    Args:
        spec: Figure 8's hyper-parameters.
        padding: ``zeros`` or ``reflect``.
    """

    def __init__(self, spec: NetworkSpec, *, padding: str = "reflect") -> None:
        super().__init__()
        self.scales = spec.scales
        self.upsample = nn.Upsample(
            scale_factor=2, mode=spec.upsample, align_corners=False if spec.upsample == "bilinear" else None
        )
        self.skips, self.downs, self.norms, self.ups = (nn.ModuleList() for _ in range(4))
        inputs = spec.input_depth
        for level in range(spec.scales):
            n_d, n_u, n_s = spec.n_d[level], spec.n_u[level], spec.n_s[level]
            k_d, k_u, k_s = spec.k_d[level], spec.k_u[level], spec.k_s[level]
            below = n_d if level + 1 == spec.scales else spec.n_u[level + 1]
            self.skips.append(_block(inputs, n_s, k_s, padding) if n_s else nn.Identity())
            self.downs.append(
                nn.Sequential(_block(inputs, n_d, k_d, padding, stride=2), _block(n_d, n_d, k_d, padding))
            )
            self.norms.append(nn.BatchNorm2d(n_s + below))
            self.ups.append(nn.Sequential(_block(n_s + below, n_u, k_u, padding), _block(n_u, n_u, 1, padding)))
            inputs = n_d
        self.has_skip = [n > 0 for n in spec.n_s]
        self.head = nn.Conv2d(spec.n_u[0], 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        """One pass on one image."""
        return torch.sigmoid(self.head(self._level(z, 0)))

    def _level(self, x: Tensor, level: int) -> Tensor:
        low = self.downs[level](x)
        if level + 1 < self.scales:
            low = self._level(low, level + 1)
        high = self.upsample(low)[..., : x.shape[-2], : x.shape[-1]]
        joined = torch.cat([self.skips[level](x), high], dim=1) if self.has_skip[level] else high
        out: Tensor = self.ups[level](self.norms[level](joined))
        return out

    def copy_from(self, stack: StackedSkipNet, b: int) -> None:
        """Take the weights of the b-th network of a stack."""
        mine = dict(self.named_parameters())
        for name, theirs in _plain_names(stack):
            with torch.no_grad():
                mine.pop(name).copy_(theirs[b])
        if mine:
            raise ValueError(f"the stack has no parameters for {sorted(mine)}")


def _plain_names(stack: StackedSkipNet) -> list[tuple[str, Tensor]]:
    pairs: list[tuple[str, Tensor]] = [("head.weight", stack.head.weight), ("head.bias", stack.head.bias)]
    plain = dict(PlainSkipNet(stack.spec, padding=stack.padding).named_modules())
    scale: Scale | None = stack.body
    level = 0
    while scale is not None:
        blocks: list[tuple[str, Any]] = [(f"downs.{level}.{i}", block) for i, block in enumerate(scale.down)]
        blocks += [(f"ups.{level}.{i}", block) for i, block in enumerate(scale.up)]
        blocks += [(f"skips.{level}", scale.skip)] if scale.skip is not None else []
        for name, block in blocks:
            conv = next(n for n, m in plain.items() if n.startswith(f"{name}.0.") and isinstance(m, nn.Conv2d))
            pairs += [(f"{conv}.weight", block.conv.weight), (f"{conv}.bias", block.conv.bias)]
            pairs += [(f"{name}.1.weight", block.norm.weight), (f"{name}.1.bias", block.norm.bias)]
        pairs += [(f"norms.{level}.weight", scale.norm.weight), (f"norms.{level}.bias", scale.norm.bias)]
        scale, level = scale.deeper, level + 1
    return pairs


def plain_fit(
    net: PlainSkipNet,
    image: Tensor,
    z: Tensor,
    *,
    steps: int,
    lr: float = 0.01,
    noise: list[Tensor] | None = None,
    optimise_z: bool = False,
    tolerance: float = 0.0,
) -> list[Tensor]:
    """Lines 2-8 of Algorithm 1 on one image, for ``steps`` steps.

    Args:
        net: The network, changed in place.
        image: x0, [1, 3, H, W].
        z: [1, input_depth, H, W].
        steps: Optimiser steps.
        lr: Adam's learning rate.
        noise: What is added to z at each step, ``steps`` tensors of z's shape; nothing by default.
        optimise_z: Let Adam change z too (a copy of it), under whatever noise is added.
        tolerance: Errors of a pixel up to it cost nothing, and larger ones what exceeds it, squared.

    Returns:
        x(0) ... x(steps - 1), each [1, 3, H, W].
    """
    z = z.detach().clone().requires_grad_(optimise_z)
    optimiser = torch.optim.Adam([*net.parameters(), *([z] if optimise_z else [])], lr=lr)
    trace = []
    for t in range(steps):
        optimiser.zero_grad()
        x = net(z if noise is None else z + noise[t])
        F.softshrink(x - image, tolerance).square().mean().backward()
        optimiser.step()
        trace.append(x.detach())
    return trace
