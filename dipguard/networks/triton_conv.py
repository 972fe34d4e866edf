"""The stacked convolution by Triton kernels, with its gradients.

Written for NVIDIA GPUs (Hopper first) and, at the time of writing, never run on one: its results were checked in
Triton's interpreter on a CPU, and its kernels compiled for that architecture. ``benchmarks/conv_forms.py`` measures it.

In float32 the products are exact float32 (``ieee``), whatever torch's own switches say, unless TF32 is switched on
(:mod:`dipguard.engines.precision`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dipguard.checks import check_choice
from dipguard.networks.convolution import padding_mode, same_padding
from dipguard.networks.triton_launch import check_device, fold, forward, input_gradient, weight_gradient

PRECISIONS = ("ieee", "tf32x3", "tf32")
"""Of a float32 product: exact, three TF32 products that make up for most of the rounding, one TF32 product."""
LARGEST_STACK = 65_535  # of the third axis of a CUDA grid


def triton_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    padding: str = "zeros",
    input_precision: str | None = None,
) -> Tensor:
    """B convolutions, as :func:`dipguard.networks.convolution.stacked_conv2d` does them.

    float32, bfloat16 and float64; sums run in float32 (in float64 for that). Under autocast x is cast to autocast's
    dtype, as torch's convolution does it; weights are cast tile by tile, and their gradient stays in their own dtype.
    The backward pass is deterministic.

    Args:
        x: [1, B * inputs, H, W] on an NVIDIA GPU (elsewhere only in Triton's interpreter), any strides.
        weight: [B, outputs, inputs, kernel, kernel].
        bias: [B, outputs].
        stride: 1 or 2.
        padding: ``zeros`` or ``reflect``.
        input_precision: ``ieee``, ``tf32x3`` or ``tf32``; None takes ``tf32`` where torch's matrix products may, else
            ``ieee``.

    Raises:
        ValueError: Unknown precision, or more than 65,535 networks.
        RuntimeError: Triton cannot run on x's device.
    """
    precision = _default_precision() if input_precision is None else input_precision
    check_choice(precision, PRECISIONS, name="input_precision")
    if len(weight) > LARGEST_STACK:
        raise ValueError(f"`weight` must be of at most {LARGEST_STACK} networks, got {len(weight)}")
    check_device(x.device)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if weight.shape[-1] == 1 and stride == 1:
        # Without neighbours, all pixels are one row: its length is more often a multiple of 16, which loads faster.
        y = _Conv.apply(x.flatten(2).unsqueeze(2), weight, bias, stride, padding, precision)
        return y.unflatten(3, x.shape[-2:]).squeeze(2)
    out: Tensor = _Conv.apply(x, weight, bias, stride, padding, precision)
    return out


def _default_precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: str, precision: str) -> Tensor:
        kernel = weight.shape[-1]
        before, after = same_padding(kernel)
        mode = padding_mode(padding, kernel=kernel, side=min(x.shape[-2:]))
        padded = F.pad(x, (before, after, before, after), mode=mode) if kernel > 1 else x
        weight, bias = weight.contiguous(), bias.contiguous()
        ctx.save_for_backward(padded, weight)
        ctx.size, ctx.mode, ctx.stride, ctx.precision = x.shape[-2:], mode, stride, precision
        return forward(padded, weight, bias, stride=stride, precision=precision)

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
                dx = input_gradient(dy, weight, size=ctx.size, first=before, **options)
            else:
                dx = input_gradient(dy, weight, size=padded.shape[-2:], first=0, **options)
                dx = fold(dx, before=before, after=after, reflect=ctx.mode == "reflect")
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dw, db = weight_gradient(padded, dy, weight, **options)
        return dx, dw, db, None, None, None
