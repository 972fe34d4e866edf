"""Layers of B independent networks at once: every parameter has a leading axis of length B, one entry a network.

Activations travel as one image of B * C channels, [1, B * C, H, W], so that a grouped convolution and a batch
normalisation, each a single call, treat every network by itself: no sum runs across groups, and none across channels.
On a CPU they lie in memory channels-last: the grouped convolution's backward then runs at twice the speed where C is
no multiple of 16, as behind the skips (benchmarks/README.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dipguard.checks import check_choice
from dipguard.networks.convolution import padding_mode as padding_mode
from dipguard.networks.convolution import same_padding as same_padding
from dipguard.networks.convolution import stacked_conv2d

PADDINGS = ("zeros", "reflect")
INITS = ("default", "xavier")
NORM_FORMS = ("torch", "triton")


def to_stack(x: Tensor, *, channels_last: bool) -> Tensor:
    """[B, C, H, W] -> [1, B * C, H, W]."""
    B, C, H, W = x.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.reshape(1, B * C, H, W).contiguous(memory_format=layout)


def from_stack(x: Tensor, *, stack: int) -> Tensor:
    """[1, B * C, H, W] -> [B, C, H, W]."""
    return x.view(stack, -1, *x.shape[-2:])


def join(first: Tensor, second: Tensor, *, stack: int) -> Tensor:
    """Concatenate channels network by network: [1, B * C1, H, W] and [1, B * C2, H, W] -> [1, B * (C1 + C2), H, W].

    A concatenation of the two as they are would mix the networks' channels.
    """
    if first.is_contiguous():
        both = torch.cat([from_stack(first, stack=stack), from_stack(second, stack=stack)], dim=1)
        return to_stack(both, channels_last=False)
    parts = [x.permute(0, 2, 3, 1).unflatten(3, (stack, -1)) for x in (first, second)]
    return torch.cat(parts, dim=4).flatten(3).permute(0, 3, 1, 2)


class StackedConv2d(nn.Module):
    """B convolutions, the b-th applied to the b-th network's channels alone.

    Keeps the size at stride 1, halves it (rounding up) at stride 2. The attribute ``form`` says how it is computed
    (:mod:`dipguard.networks.convolution`); no number depends on it but for rounding.

    Args:
        stack: B.
        inputs: Channels in.
        outputs: Channels out.
        kernel: Kernel size, odd or even.
        stride: 1 or 2.
        padding: ``zeros`` or ``reflect``.
    """

    def __init__(
        self, stack: int, inputs: int, outputs: int, *, kernel: int, stride: int = 1, padding: str = "zeros"
    ) -> None:
        super().__init__()
        self.stride = stride
        self.kernel = kernel
        self.padding = check_choice(padding, PADDINGS, name="padding")
        self.form = "grouped"
        self.weight = nn.Parameter(torch.empty(stack, outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(stack, outputs))

    def set_layout(self, *, channels_last: bool) -> None:
        """Lay the weights out as the activations are; the numbers stay the same."""
        flat = self.weight.data.flatten(0, 1)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.weight.data = flat.contiguous(memory_format=layout).unflatten(0, self.weight.shape[:2])

    def init_one(self, b: int, *, generator: torch.Generator, init: str) -> None:
        """Draw the b-th network's weights: PyTorch's default, or Xavier (Algorithm 1, line 1) with bias 0."""
        fan_in = self.weight[b, 0].numel()
        fan_out = self.weight.shape[1] * self.kernel**2
        bound = math.sqrt(6 / (fan_in + fan_out)) if init == "xavier" else 1 / math.sqrt(fan_in)
        _uniform_(self.weight[b], bound, generator)
        _uniform_(self.bias[b], 0.0 if init == "xavier" else bound, generator)

    def forward(self, x: Tensor) -> Tensor:
        """[1, B * inputs, H, W] -> [1, B * outputs, ceil(H / stride), ceil(W / stride)]."""
        return stacked_conv2d(x, self.weight, self.bias, stride=self.stride, padding=self.padding, form=self.form)


class StackedNorm2d(nn.Module):
    """B batch normalisations in train mode, each over the one image of its network (biased variance); then LeakyReLU.

    There are no running statistics: a DIP network is never used outside its own fit, so module.eval() changes nothing.
    The attribute ``form`` says how it is computed; no number depends on it but for rounding.

    Args:
        stack: B.
        channels: Channels of one network.
        slope: LeakyReLU's for negative values; 1 leaves the activation out.
        eps: Added to the variance.
    """

    def __init__(self, stack: int, channels: int, *, slope: float = 1.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.slope = slope
        self.eps = eps
        self.form = "torch"
        self.weight = nn.Parameter(torch.ones(stack, channels))
        self.bias = nn.Parameter(torch.zeros(stack, channels))

    def init_one(self, b: int, *, generator: torch.Generator, init: str) -> None:
        """Weight 1, bias 0; nothing is drawn."""
        with torch.no_grad():
            self.weight[b].fill_(1)
            self.bias[b].zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[1, B * channels, H, W] -> the same shape."""
        return stacked_norm(x, self.weight, self.bias, slope=self.slope, eps=self.eps, form=self.form)


def stacked_norm(x: Tensor, weight: Tensor, bias: Tensor, *, slope: float, eps: float, form: str = "torch") -> Tensor:
    """Normalisation and LeakyReLU of [1, B * channels, H, W] with weight and bias [B, channels].

    Raises:
        RuntimeError: The form cannot run on x's device.
    """
    if form == "triton":
        from dipguard.networks.triton_norm import triton_norm_leaky_relu

        return triton_norm_leaky_relu(x, weight, bias, slope=slope, eps=eps)
    y = F.batch_norm(x, None, None, weight.flatten(), bias.flatten(), training=True, eps=eps)
    return y if slope == 1 else F.leaky_relu_(y, slope)


def _uniform_(target: Tensor, bound: float, generator: torch.Generator) -> None:
    # Drawn in float32 on the CPU for every dtype and device, so that all of them start from the same weights.
    draw = torch.empty(target.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
    with torch.no_grad():
        target.copy_(draw)
