"""Stacked convolution, normalisation with LeakyReLU, and a scale's join, by Triton kernels with their gradients.

For NVIDIA GPUs; on a CPU they run only in Triton's interpreter. float32, bfloat16 and float64 are supported; sums run
in float32 (float64 for float64), and backward passes are deterministic. In float32 products are exact, unless TF32 is
switched on (:func:`dipguard.precision.precision`) or ``tf32x3`` is asked for. ``benchmarks/conv_forms.py`` measures
them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dipguard.networks.unet import Size, pad_border, padding_mode, same_padding

LARGEST_BLOCK = 4096  # numbers that a normalisation program holds at once: 32 per thread
PROGRAMS = 512  # fill a large GPU about four times over
GRADIENT_BLOCK = 64


def triton_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, *, stride: int = 1, padding: str = "zeros", products: str | None = None
) -> Tensor:
    """B convolutions with the arguments and result of :func:`dipguard.networks.unet.grouped_conv2d`.

    Float32 is multiplied as ``products`` says, ``ieee``, ``tf32`` or ``tf32x3`` (split into three TF32 products, nearly
    exact); by default ``tf32`` where that is switched on, else ``ieee``. Under autocast x is cast to autocast's dtype,
    as torch's convolution does; weights are cast tile by tile, and their gradient keeps their own dtype.
    """
    precision = products or ("tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if weight.shape[-1] == 1 and stride == 1:
        # Without neighbours, all pixels form one row: its length is more often a multiple of 16, which loads faster.
        y = _Conv.apply(x.flatten(2).unsqueeze(2), weight, bias, stride, padding, precision)
        return y.unflatten(3, x.shape[-2:]).squeeze(2)
    return _Conv.apply(x, weight, bias, stride, padding, precision)


def triton_norm_leaky_relu(x: Tensor, weight: Tensor, bias: Tensor, *, slope: float = 1.0, eps: float = 1e-5) -> Tensor:
    """Normalisation and LeakyReLU with the arguments and result of :func:`dipguard.networks.unet.norm_leaky_relu`.

    Weight and bias may be float32 where x is bfloat16.
    """
    return _Norm.apply(x, None, weight, bias, (x.shape[-2], x.shape[-1]), "none", slope, eps)


def triton_join_norm(
    low: Tensor, weight: Tensor, bias: Tensor, skip: Tensor | None = None, *, size: Size, upsample: str, eps: float
) -> Tensor:
    """Upsampling, concatenation and normalisation in one kernel, as :func:`dipguard.networks.unet.join_norm`.

    Neither the upsampled image nor its gradient is ever in memory.
    """
    return _Norm.apply(skip, low, weight, bias, size, upsample, 1.0, eps)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: str, precision: str) -> Tensor:
        kernel = weight.shape[-1]
        padded = pad_border(x, kernel=kernel, padding=padding)
        weight, bias = weight.contiguous(), bias.contiguous()
        ctx.save_for_backward(padded, weight)
        ctx.mode = padding_mode(padding, kernel=kernel, side=min(x.shape[-2:]))
        ctx.size, ctx.stride, ctx.precision = x.shape[-2:], stride, precision
        rows, columns = ((side - kernel) // stride + 1 for side in padded.shape[-2:])
        y = padded.new_empty(1, bias.numel(), rows, columns)
        _correlate(padded, weight, bias, y, stride=stride, precision=precision)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight = ctx.saved_tensors
        dy = dy.contiguous()
        options = {"stride": ctx.stride, "precision": ctx.precision}
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            before, after = same_padding(weight.shape[-1])
            if ctx.mode == "constant" or before + after == 0:
                dx = _input_gradient(dy, weight, size=ctx.size, first=before, **options)
            else:
                dx = _input_gradient(dy, weight, size=padded.shape[-2:], first=0, **options)
                dx = _fold(dx, before=before, after=after, reflect=ctx.mode == "reflect")
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dw, db = _weight_gradient(padded, dy, weight, **options)
        return dx, dw, db, None, None, None


class _Norm(torch.autograd.Function):
    """Normalises the planes of ``skip``, and those of ``low`` upsampled; either of the two may be None."""

    @staticmethod
    def forward(
        ctx: Any,
        skip: Tensor | None,
        low: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        size: Size,
        upsample: str,
        slope: float,
        eps: float,
    ) -> Tensor:
        from dipguard.engines._triton_kernels import norm_kernel

        skip, low = (None if t is None else t.contiguous() for t in (skip, low))
        weight, bias = weight.contiguous(), bias.contiguous()
        read = _pointers(skip, low)
        planes, x = weight.numel(), read[1]
        y = x.new_empty(1, planes, *size)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        means, scales = x.new_empty(planes, dtype=wide), x.new_empty(planes, dtype=wide)
        skips = 0 if skip is None else skip.shape[1] // len(weight)
        count = size[0] * size[1]
        ctx.sizes = weight.shape[1], skips, count, size[1], *x.shape[-2:]
        block = min(LARGEST_BLOCK, 1 << max(4, (count - 1).bit_length()))
        ctx.options = {"SLOPE": float(slope), "SUM": _sum_dtype(x), "SINGLE": count <= block, "BLOCK": block}
        ctx.options |= {"UPSAMPLE": upsample, "num_warps": max(1, min(8, block // 512))}
        arguments = (*read, weight, bias, y, means, scales, *ctx.sizes)
        _launch(norm_kernel, (planes,), arguments, {"EPS": float(eps), **ctx.options})
        ctx.save_for_backward(skip, low, weight, bias, means, scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from dipguard.engines._triton_kernels import norm_gradient_kernel

        skip, low, weight, bias, means, scales = ctx.saved_tensors
        dskip = None if skip is None else torch.empty_like(skip)
        dhigh = None if low is None else low.new_empty(1, low.shape[1], *dy.shape[-2:])
        dw, db = torch.empty_like(weight), torch.empty_like(bias)
        read, made = _pointers(skip, low), _pointers(dskip, dhigh)
        arguments = (*read, dy.contiguous(), weight, bias, means, scales, *made, dw, db, *ctx.sizes)
        _launch(norm_gradient_kernel, (weight.numel(),), arguments, ctx.options)
        dlow = None if dhigh is None else _upsampling_gradient(dhigh, low, upsample=ctx.options["UPSAMPLE"])
        return dskip, dlow, dw, db, None, None, None, None


def _correlate(padded: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, *, stride: int, precision: str) -> None:
    """Without a bias: the transposed convolution, from the weight's outputs to its inputs."""
    from dipguard.engines._triton_kernels import forward_kernel

    transposed = bias is None
    B, outputs, inputs, kernel, _ = weight.shape
    inputs, outputs = (outputs, inputs) if transposed else (inputs, outputs)
    pixels, block = y.shape[-2] * y.shape[-1], _output_block(outputs)
    sizes = inputs, outputs, pixels, y.shape[-1]
    _launch(
        forward_kernel,
        lambda tile: (-(-pixels // tile["BLOCK_P"]), -(-outputs // block), B),
        (padded, weight, weight if bias is None else bias, y, *sizes, *_strides(padded, inputs)),
        {"KERNEL": kernel, "STRIDE": stride, "TRANSPOSED": transposed, "BLOCK_O": block, **_sums(padded, precision)},
    )


def _input_gradient(dy: Tensor, weight: Tensor, *, size: Size, first: int, stride: int, precision: str) -> Tensor:
    """Gradient with respect to the padded input, or to its part of ``size`` from row and column ``first`` on."""
    from dipguard.engines._triton_kernels import strided_gradient_kernel

    B, outputs, inputs, kernel, _ = weight.shape
    height, width = size
    dx = dy.new_empty(1, B * inputs, height, width)
    if stride == 1:
        # The transposed convolution is a convolution of dy with a border of zeros.
        front = kernel - 1 - first
        below, right = height + first - dy.shape[-2], width + first - dy.shape[-1]
        if kernel > 1:
            dy = F.pad(dy, (front, right, front, below))
        _correlate(dy, weight, None, dx, stride=1, precision=precision)
        return dx
    pixels = -(-height // stride) * -(-width // stride)
    _launch(
        strided_gradient_kernel,
        lambda tile: (-(-pixels // tile["BLOCK_P"]), -(-inputs // tile["BLOCK_C"]) * stride**2, B),
        (dy, weight, dx, inputs, outputs, *dy.shape[-2:], height, width),
        {"FIRST": first, "KERNEL": kernel, "STRIDE": stride, **_sums(dy, precision)},
    )
    return dx


def _weight_gradient(
    padded: Tensor, dy: Tensor, weight: Tensor, *, stride: int, precision: str
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to weight and bias, in the weight's dtype; dy contiguous."""
    from dipguard.engines._triton_kernels import weight_gradient_kernel

    B, outputs, inputs, kernel, _ = weight.shape
    depth, pixels = inputs * kernel**2, dy.shape[-2] * dy.shape[-1]
    block = _output_block(outputs)
    programs = B * -(-depth // GRADIENT_BLOCK) * -(-outputs // block)
    splits = max(1, min(-(-PROGRAMS // programs), pixels // (4 * GRADIENT_BLOCK)))
    share = -(-pixels // (splits * GRADIENT_BLOCK)) * GRADIENT_BLOCK
    dw, db = weight.new_empty(splits, *weight.shape), weight.new_empty(splits, B, outputs)
    arguments = (padded, dy, dw, db, inputs, outputs, pixels, dy.shape[-1], share, splits, *_strides(padded, inputs))
    _launch(
        weight_gradient_kernel,
        lambda tile: (-(-depth // tile["BLOCK_K"]), -(-outputs // block) * splits, B),
        arguments,
        {"KERNEL": kernel, "STRIDE": stride, "BLOCK_O": block, **_sums(padded, precision)},
    )
    return (dw[0], db[0]) if splits == 1 else (dw.sum(0), db.sum(0))


def _fold(padded: Tensor, *, before: int, after: int, reflect: bool) -> Tensor:
    """Gradient of a reflected (or repeated) border: [1, C, H + before + after, W + ...] -> [1, C, H, W]."""
    from dipguard.engines._triton_kernels import fold_kernel

    height, width = (side - before - after for side in padded.shape[-2:])
    dx, block = padded.new_empty(1, padded.shape[1], height, width), 1024
    _launch(
        fold_kernel,
        lambda tile: (-(-dx.numel() // block),),
        (padded, dx, dx.numel(), height, width),
        {"BEFORE": before, "AFTER": after, "REFLECT": reflect, "BLOCK": block, "SUM": _sum_dtype(padded)},
    )
    return dx


def _pointers(skip: Tensor | None, low: Tensor | None) -> tuple[Any, Any]:
    """Both tensors; where one is missing, the other takes its place, since a kernel needs a pointer for each."""
    return low if skip is None else skip, skip if low is None else low


def _upsampling_gradient(dhigh: Tensor, low: Tensor, *, upsample: str) -> Tensor:
    """Gradient with respect to ``low`` of the image made of it."""
    from dipguard.engines._triton_kernels import upsampling_gradient_kernel

    dlow, block = torch.empty_like(low), 1024
    _launch(
        upsampling_gradient_kernel,
        (-(-low.numel() // block),),
        (dhigh, dlow, low.numel(), *dhigh.shape[-2:], *low.shape[-2:]),
        {"UPSAMPLE": upsample, "SUM": _sum_dtype(low), "BLOCK": block},
    )
    return dlow


def _output_block(channels: int) -> int:
    """As few idle channels in the last tile as possible, but a narrow tile loads more for each product."""
    return min((64, 32, 16), key=lambda block: -(-channels // block) * (block + 4))


def _strides(padded: Tensor, inputs: int) -> tuple[int, int, int, int]:
    """From network to network, channel to channel, row to row, pixel to pixel."""
    channel, row, column = padded.stride()[1:]
    return inputs * channel, channel, row, column


def _sums(x: Tensor, precision: str) -> dict[str, Any]:
    return {"SUM": _sum_dtype(x), "PRECISION": precision}


def _sum_dtype(x: Tensor) -> Any:
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _launch(kernel: Any, grid: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Run a kernel on the device of its first argument, a tensor."""
    device = arguments[0].device
    if device.type != "cuda":
        kernel[grid](*arguments, **options)
        return
    with torch.cuda.device(device):
        # Multiply-adds in one instruction: later versions of Triton leave that off by default.
        kernel[grid](*arguments, **options, enable_fp_fusion=True)
