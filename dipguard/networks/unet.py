"""Figure 8's U-Net with skip connections, as a stack of B independent networks.

Every parameter has a leading axis of length B, one entry per network. Activations are one image of B * C channels,
[1, B * C, H, W]: one grouped convolution and one batch normalisation then treat every network separately, since no sum
runs across groups or across channels. On a CPU activations are channels-last, which halves the time of a grouped
convolution's backward pass where C is no multiple of 16 (benchmarks/README.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dipguard.checks import check_choice, check_int
from dipguard.networks.presets import NetworkSpec, network_spec
from dipguard.seeding import image_generator

Size: TypeAlias = tuple[int, int]
"""Height and width in pixels."""
PADDINGS = ("zeros", "reflect")
INITS = ("default", "xavier")
SLOPE = 0.2
"""Negative slope of LeakyReLU in the official DIP implementation, which appendix B follows."""


def same_padding(kernel: int) -> tuple[int, int]:
    """Pixels to add before and after a side to keep its size, also for even kernels: the odd one after."""
    return (kernel - 1) // 2, kernel // 2


def padding_mode(padding: str, *, kernel: int, side: int) -> str:
    """The mode of torch's ``pad`` for a side of this many pixels.

    A side too small to be reflected (2x2 pixels in the large network on 32x32 images) repeats its border instead.
    """
    if padding == "zeros":
        return "constant"
    return "reflect" if kernel // 2 < side else "replicate"


def pad_border(x: Tensor, *, kernel: int, padding: str) -> Tensor:
    """Add the border that keeps a convolution's size: [..., H, W] -> [..., H + kernel - 1, W + kernel - 1]."""
    if kernel == 1:
        return x
    before, after = same_padding(kernel)
    mode = padding_mode(padding, kernel=kernel, side=min(x.shape[-2:]))
    if mode != "constant" and x.is_cuda and torch.is_grad_enabled():  # the gradient of torch's own adds atomically
        return bordered(bordered(x, before, after, mode=mode, dim=-1), before, after, mode=mode, dim=-2)
    return F.pad(x, (before, after, before, after), mode=mode)


def bordered(x: Tensor, before: int, after: int, *, mode: str, dim: int) -> Tensor:
    """Torch's ``reflect`` or ``replicate`` along a dimension, by operations whose gradients have one order on a GPU."""
    last = x.shape[dim] - 1
    if mode == "reflect":
        parts = [x.narrow(dim, 1, before).flip(dim), x, x.narrow(dim, last - after, after).flip(dim)]
    else:
        parts = [*[x.narrow(dim, 0, 1)] * before, x, *[x.narrow(dim, last, 1)] * after]
    return torch.cat(parts, dim)


def doubled(x: Tensor, *, dim: int) -> Tensor:
    """Torch's bilinear upsampling by 2 along a dimension, by operations whose gradients have one order on a GPU."""
    side, padded = x.shape[dim], bordered(x, 1, 1, mode="replicate", dim=dim)
    before, after = padded.narrow(dim, 0, side), padded.narrow(dim, 2, side)
    pairs = [0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after]
    place = dim % x.ndim
    return torch.stack(pairs, place + 1).flatten(place, place + 1)


def grouped_conv2d(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int = 1, padding: str = "zeros") -> Tensor:
    """B convolutions as one of B groups; network b's is applied to its own channels only.

    x is [1, B * inputs, H, W] with any strides, weight [B, outputs, inputs, kernel, kernel], bias [B, outputs].
    Returns [1, B * outputs, ceil(H / stride), ceil(W / stride)], also for even kernels.
    """
    kernel = weight.shape[-1]
    before, after = same_padding(kernel)
    inside = before if before == after and padding == "zeros" else 0  # the convolution adds the zeros itself
    if not inside:
        x = pad_border(x, kernel=kernel, padding=padding)
    return F.conv2d(x, weight.flatten(0, 1), bias.flatten(), stride=stride, padding=inside, groups=len(weight))


def norm_leaky_relu(x: Tensor, weight: Tensor, bias: Tensor, *, slope: float = 1.0, eps: float = 1e-5) -> Tensor:
    """Batch normalisation in train mode of each network's channels (biased variance), then LeakyReLU.

    x is [1, B * channels, H, W], weight and bias are [B, channels]; ``eps`` is added to the variance, and a ``slope``
    of 1 means no activation. Returns the shape of x.
    """
    y = F.batch_norm(x, None, None, weight.flatten(), bias.flatten(), training=True, eps=eps)
    return y if slope == 1 else F.leaky_relu_(y, slope)


def join_norm(
    low: Tensor, weight: Tensor, bias: Tensor, skip: Tensor | None = None, *, size: Size, upsample: str, eps: float
) -> Tensor:
    """Upsample by 2, concatenate behind each network's skip channels, and normalise.

    low is [1, B * channels, h, w], skip [1, B * n_s, H, W] with ``size`` (H, W), to which the upsampled image is cut,
    and weight and bias are [B, n_s + channels]. Returns [1, B * (n_s + channels), H, W].
    """
    if upsample == "bilinear" and low.is_cuda and torch.is_grad_enabled():  # torch's own gradient adds atomically
        high = doubled(doubled(low, dim=-1), dim=-2)
    else:
        corners = False if upsample == "bilinear" else None  # torch accepts it only where it has a meaning
        high = F.interpolate(low, scale_factor=2, mode=upsample, align_corners=corners)
    if high.shape[-2:] != size:
        # An odd side is one pixel too long. An even one is not sliced: the slice's backward pass would copy it.
        high = high[..., : size[0], : size[1]]
    joined = high if skip is None else _join(skip, high, stack=len(weight))
    return norm_leaky_relu(joined, weight, bias, eps=eps)


class StackedConv2d(nn.Module):
    """B convolutions, each applied to its own network's channels only; stride 2 halves the size, rounding up.

    An engine may set another ``compute``, with the arguments of :func:`grouped_conv2d`.
    """

    def __init__(
        self, stack: int, inputs: int, outputs: int, *, kernel: int, stride: int = 1, padding: str = "zeros"
    ) -> None:
        super().__init__()
        self.stride, self.kernel = stride, kernel
        self.padding = check_choice(padding, PADDINGS, name="padding")
        self.compute: Callable[..., Tensor] = grouped_conv2d
        self.weight = nn.Parameter(torch.empty(stack, outputs, inputs, kernel, kernel, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(stack, outputs, dtype=torch.float32))

    def bounds(self, *, init: str) -> tuple[float, float]:
        """Of U(-bound, bound) for weight and bias: PyTorch's default, or Xavier (Algorithm 1, line 1) with bias 0."""
        fan_in = self.weight[0, 0].numel()
        if init == "xavier":
            return math.sqrt(6 / (fan_in + self.weight.shape[1] * self.kernel**2)), 0.0
        return 1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in)

    def forward(self, x: Tensor) -> Tensor:
        """[1, B * inputs, H, W] -> [1, B * outputs, ceil(H / stride), ceil(W / stride)]."""
        return self.compute(x, self.weight, self.bias, stride=self.stride, padding=self.padding)


class StackedNorm2d(nn.Module):
    """B batch normalisations in train mode, each over its own network's image (biased variance), then LeakyReLU.

    There are no running statistics: a DIP network is never used outside its own fit, so ``eval()`` changes nothing.
    An engine may set another ``compute``, with the arguments of :func:`norm_leaky_relu`.
    """

    def __init__(self, stack: int, channels: int, *, slope: float = 1.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.slope, self.eps = slope, eps
        self.compute: Callable[..., Tensor] = norm_leaky_relu
        self.weight = nn.Parameter(torch.ones(stack, channels, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(stack, channels, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """[1, B * channels, H, W] -> the same shape."""
        return self.compute(x, self.weight, self.bias, slope=self.slope, eps=self.eps)


class StackedJoin2d(nn.Module):
    """The middle of B scales: what comes from below is upsampled, joined with the skip channels, and normalised.

    An engine may set another ``compute``, with the arguments of :func:`join_norm`.
    """

    def __init__(self, stack: int, channels: int, *, upsample: str, eps: float = 1e-5) -> None:
        super().__init__()
        self.upsample, self.eps = upsample, eps
        self.compute: Callable[..., Tensor] = join_norm
        self.weight = nn.Parameter(torch.ones(stack, channels, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(stack, channels, dtype=torch.float32))

    def forward(self, low: Tensor, skip: Tensor | None, size: Size) -> Tensor:
        """[1, B * (channels - n_s), h, w] and [1, B * n_s, H, W] -> [1, B * channels, H, W], the size."""
        return self.compute(low, self.weight, self.bias, skip, size=size, upsample=self.upsample, eps=self.eps)


class ConvBlock(nn.Module):
    """Convolution (``options`` are those of :class:`StackedConv2d`), normalisation, LeakyReLU."""

    def __init__(self, stack: int, inputs: int, outputs: int, **options: Any) -> None:
        super().__init__()
        self.conv = StackedConv2d(stack, inputs, outputs, **options)
        self.norm = StackedNorm2d(stack, outputs, slope=SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        """[1, B * inputs, H, W] -> [1, B * outputs, H', W']."""
        return self.norm(self.conv(x))


class Scale(nn.Module):
    """One scale: skip branch and (down, down, ``deeper`` scale, up) concatenated, normalised, convolved twice.

    ``level`` counts the scales from 0, the finest.
    """

    def __init__(
        self, stack: int, spec: NetworkSpec, level: int, *, inputs: int, deeper: Scale | None, padding: str
    ) -> None:
        super().__init__()
        n_d, n_u, n_s = spec.n_d[level], spec.n_u[level], spec.n_s[level]
        below = n_d if deeper is None else spec.n_u[level + 1]
        self.skip = ConvBlock(stack, inputs, n_s, kernel=spec.k_s[level], padding=padding) if n_s else None
        self.down = nn.Sequential(
            ConvBlock(stack, inputs, n_d, kernel=spec.k_d[level], stride=2, padding=padding),
            ConvBlock(stack, n_d, n_d, kernel=spec.k_d[level], padding=padding),
        )
        self.deeper = deeper
        self.norm = StackedJoin2d(stack, n_s + below, upsample=spec.upsample)
        self.up = nn.Sequential(
            ConvBlock(stack, n_s + below, n_u, kernel=spec.k_u[level], padding=padding),
            ConvBlock(stack, n_u, n_u, kernel=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[1, B * inputs, H, W] -> [1, B * n_u, H, W]."""
        low = self.down(x)
        if self.deeper is not None:
            low = self.deeper(low)
        skip = None if self.skip is None else self.skip(x)
        return self.up(self.norm(low, skip, (x.shape[-2], x.shape[-1])))


class StackedSkipNet(nn.Module):
    """B independent DIP networks: z [B, input_depth, H, W] -> reconstructions [B, 3, H, W] in (0, 1).

    ``padding`` at the image's border is ``zeros`` or ``reflect``.
    """

    def __init__(self, spec: NetworkSpec, *, stack_size: int, padding: str) -> None:
        super().__init__()
        check_int(stack_size, name="stack_size", low=1)
        self.spec, self.stack_size, self.padding = spec, stack_size, padding
        scale: Scale | None = None
        for level in reversed(range(spec.scales)):
            inputs = spec.n_d[level - 1] if level else spec.input_depth
            scale = Scale(stack_size, spec, level, inputs=inputs, deeper=scale, padding=padding)
        assert scale is not None
        self.body = scale
        self.head = StackedConv2d(stack_size, spec.n_u[0], 3, kernel=1)
        self.channels_last = False

    def convolutions(self) -> Iterator[StackedConv2d]:
        """All convolutions, in the order of their draws."""
        return (module for module in self.modules() if isinstance(module, StackedConv2d))

    def set_layout(self, *, channels_last: bool) -> None:
        """Choose the memory layout of activations and weights: this changes the speed, not the numbers.

        Call it before creating an optimiser, because its moments copy the layout of the weights.
        """
        self.channels_last = channels_last
        layout = torch.channels_last if channels_last else torch.contiguous_format
        for weight in (convolution.weight for convolution in self.convolutions()):
            weight.data = weight.data.flatten(0, 1).contiguous(memory_format=layout).unflatten(0, weight.shape[:2])

    def parameters_per_image(self) -> int:
        """Number of parameters of one network."""
        return sum(p.numel() for p in self.parameters()) // self.stack_size

    def forward(self, z: Tensor) -> Tensor:
        """One pass of all B networks, each on its own z."""
        x = self.head(self.body(_to_stack(z, channels_last=self.channels_last)))
        return _from_stack(torch.sigmoid(x), stack=self.stack_size)


def build(
    network: str | NetworkSpec,
    *,
    stack_size: int,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    init: str = "default",
    padding: str = "zeros",
    dtype: torch.dtype = torch.float32,
) -> StackedSkipNet:
    """A stack of B initialised networks; the weights of network b depend only on (seed, indices[b]).

    ``stack_size`` is B, at least 1, ``indices`` are the images' in their data set, 0 ... B-1 by default. ``network``,
    ``init`` and ``padding`` are those of :class:`dipguard.fit.FitOptions`; ``dtype`` is float32 or float64, which start
    from the same float32 draws. ValueError if an option is out of range, or the number of indices is not B.
    """
    with torch.device("cpu"):  # whatever the caller's default device is
        stack = StackedSkipNet(network_spec(network), stack_size=stack_size, padding=padding).to(dtype)
    order = list(range(stack_size)) if indices is None else list(indices)
    if len(order) != stack_size:
        raise ValueError(f"`indices` must hold stack_size={stack_size} numbers, got {len(order)}")
    check_choice(init, INITS, name="init")
    _draw(stack, order, seed=seed, init=init)
    return stack


def _to_stack(x: Tensor, *, channels_last: bool) -> Tensor:
    """[B, C, H, W] -> [1, B * C, H, W]."""
    B, C, H, W = x.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.reshape(1, B * C, H, W).contiguous(memory_format=layout)


def _from_stack(x: Tensor, *, stack: int) -> Tensor:
    """[1, B * C, H, W] -> [B, C, H, W]."""
    return x.view(stack, -1, *x.shape[-2:])


def _join(first: Tensor, second: Tensor, *, stack: int) -> Tensor:
    """Concatenate channels network by network: [1, B * C1, H, W] and [1, B * C2, H, W] -> [1, B * (C1 + C2), H, W].

    Concatenating the two as they are would mix the networks' channels.
    """
    if first.is_contiguous():
        both = torch.cat([_from_stack(first, stack=stack), _from_stack(second, stack=stack)], dim=1)
        return _to_stack(both, channels_last=False)
    parts = [x.permute(0, 2, 3, 1).unflatten(3, (stack, -1)) for x in (first, second)]
    return torch.cat(parts, dim=4).flatten(3).permute(0, 3, 1, 2)


def _draw(stack: StackedSkipNet, indices: Sequence[int], *, seed: int, init: str) -> None:
    """Draw in float32 on the CPU for every dtype and device, so that all of them start from the same weights."""
    sizes = [parameter[0].numel() for c in stack.convolutions() for parameter in (c.weight, c.bias)]
    with torch.inference_mode(False):  # else the threads, which do not inherit the mode, could not write
        draws = torch.empty(len(indices), sum(sizes), dtype=torch.float32, device="cpu")

    def fill(row: Tensor, index: int) -> None:
        row.uniform_(generator=image_generator(seed=seed, index=index, purpose="weights"))

    try:  # a network's stream is serial, but the networks do not depend on each other
        with ThreadPoolExecutor() as pool:
            list(pool.map(fill, draws, indices))
    except RuntimeError:  # too little memory to start a thread
        for row, index in zip(draws, indices, strict=True):
            fill(row, index)
    parts = iter(draws.split(sizes, dim=1))
    with torch.no_grad():
        for convolution in stack.convolutions():
            bounds = convolution.bounds(init=init)
            for parameter, bound in zip((convolution.weight, convolution.bias), bounds, strict=True):
                # One fused multiply and add, as in ``uniform_(-bound, bound)``: the same bits.
                part = torch.add(draws.new_tensor(-bound), next(parts), alpha=2 * bound)
                parameter.copy_(part.view(parameter.shape))
