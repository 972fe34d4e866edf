"""Normalisation and LeakyReLU in one pass over memory, by Triton kernels.

Torch's two operations read and write a layer's activations five times forward and eight times backward; these kernels
do it twice and three times, and keep one tensor less for the backward pass. At the time of writing never run on a GPU:
checked in Triton's interpreter on a CPU, and compiled for Hopper. ``benchmarks/conv_forms.py`` measures it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dipguard.networks.triton_launch import check_device, launch, sum_dtype

LARGEST_BLOCK = 4096
"""Entries that a program holds at once: 32 a thread."""


def triton_norm_leaky_relu(x: Tensor, weight: Tensor, bias: Tensor, *, slope: float = 1.0, eps: float = 1e-5) -> Tensor:
    """Batch normalisation in train mode of each network's channels (biased variance), then LeakyReLU.

    float32, bfloat16 (weight and bias may stay in float32) and float64; sums run in float32 (float64 for that). The
    backward pass is deterministic.

    Args:
        x: [1, B * channels, H, W] on an NVIDIA GPU (elsewhere only in Triton's interpreter).
        weight: [B, channels].
        bias: [B, channels].
        slope: LeakyReLU's for negative values; 1 leaves the activation out.
        eps: Added to the variance.

    Raises:
        ValueError: x does not have B * channels channels.
        RuntimeError: Triton cannot run on x's device.
    """
    if x.shape[1] != weight.numel():
        raise ValueError(f"`x` must have {weight.numel()} channels, got shape {tuple(x.shape)}")
    check_device(x.device)
    out: Tensor = _Norm.apply(x, weight, bias, slope, eps)
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, slope: float, eps: float) -> Tensor:
        from dipguard.networks._triton_norm_kernels import norm_kernel

        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        planes, count = x.shape[1], x.shape[-2] * x.shape[-1]
        y = torch.empty_like(x)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        means, scales = x.new_empty(planes, dtype=wide), x.new_empty(planes, dtype=wide)
        options = {"SLOPE": float(slope), "SUM": sum_dtype(x), **_block(count)}
        launch(norm_kernel, (planes,), (x, weight, bias, y, means, scales, count), {"EPS": float(eps), **options})
        ctx.save_for_backward(x, weight, bias, means, scales)
        ctx.options = options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from dipguard.networks._triton_norm_kernels import norm_gradient_kernel

        x, weight, bias, means, scales = ctx.saved_tensors
        dx, dw, db = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        arguments = (x, dy.contiguous(), weight, bias, means, scales, dx, dw, db, x.shape[-2] * x.shape[-1])
        launch(norm_gradient_kernel, (x.shape[1],), arguments, ctx.options)
        return dx, dw, db, None, None


def _block(count: int) -> dict[str, Any]:
    block = min(LARGEST_BLOCK, 1 << max(4, (count - 1).bit_length()))
    return {"SINGLE": count <= block, "BLOCK": block, "num_warps": max(1, min(8, block // 512))}
