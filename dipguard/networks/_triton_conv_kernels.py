# ruff: noqa: ANN001, ANN202
# mypy: ignore-errors
"""Triton kernels of the stacked convolution; imported only where they run (:mod:`dipguard.networks.triton_conv`).

Each is an implicit matrix product within one network: a program makes one tile of the product, and reads the entries of
the unfolded input from where they lie. "Depth" is the product's inner dimension. Inputs are padded already, so that
an entry's place is the sum of a pixel's and a tap's: no border is looked at inside. Sums run in float32 (float64 for
float64), in an order that depends on the tile sizes and on no other network.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from dipguard.networks.timing import median_seconds


def _bench(call: Any, quantiles: Any) -> list[float]:
    # The library's own default takes a tenth of a second for each candidate: too long for dozens of layer shapes.
    return [median_seconds(call, device=torch.device("cuda"))] * len(quantiles)


def _tune(*tiles: tuple[dict[str, int], int], key: list[str]) -> Any:
    # Interpreted kernels run on a CPU at a snail's pace: nothing to tune.
    kept = tiles[:1] if triton.knobs.runtime.interpret else tiles
    configs = [triton.Config(sizes, num_warps=warps, num_stages=2) for sizes, warps in kept]
    return triton.autotune(configs, key=key, do_bench=_bench)


@_tune(
    ({"BLOCK_P": 128, "BLOCK_K": 32}, 4),
    ({"BLOCK_P": 256, "BLOCK_K": 16}, 4),
    ({"BLOCK_P": 32, "BLOCK_K": 32}, 2),
    key=["inputs", "outputs", "pixels", "KERNEL", "STRIDE", "TRANSPOSED"],
)
@triton.jit
def forward_kernel(
    x,
    w,
    bias,
    y,
    inputs,
    outputs,
    pixels,
    width,
    x_network,
    x_channel,
    x_row,
    x_column,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[b, o, p] = bias[b, o] + sum over k of w[b, o, k] x[b, unfolded k, p]; y is contiguous, ``width`` pixels wide.

    TRANSPOSED gives the transposed convolution: w is then [b, inputs, outputs, tap], its taps are taken back to front,
    and there is no bias.
    """
    network = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    taps: tl.constexpr = KERNEL * KERNEL
    depth = inputs * taps
    pixel = (p // width) * STRIDE * x_row + (p % width) * STRIDE * x_column
    x += network * x_network
    w += network * outputs * depth
    total = tl.zeros((BLOCK_P, BLOCK_O), dtype=SUM)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tap = k // taps * x_channel + k // KERNEL % KERNEL * x_row + k % KERNEL * x_column
        seen = tl.load(x + pixel[:, None] + tap[None, :], mask=(p < pixels)[:, None] & (k < depth)[None, :], other=0)
        if TRANSPOSED:
            weight = (k // taps * outputs * taps + (taps - 1) - k % taps)[:, None] + o[None, :] * taps
        else:
            weight = k[:, None] + o[None, :] * depth
        taken = tl.load(w + weight, mask=(o < outputs)[None, :] & (k < depth)[:, None], other=0)
        total = tl.dot(seen, taken.to(seen.dtype), total, input_precision=PRECISION, out_dtype=SUM)
    if not TRANSPOSED:
        total += tl.load(bias + network * outputs + o, mask=o < outputs, other=0).to(SUM)[None, :]
    place = y + (network * outputs + o)[None, :] * pixels + p[:, None]
    tl.store(place, total.to(y.dtype.element_ty), mask=(p < pixels)[:, None] & (o < outputs)[None, :])


@_tune(
    ({"BLOCK_P": 64, "BLOCK_C": 32, "BLOCK_K": 16}, 4),
    ({"BLOCK_P": 32, "BLOCK_C": 32, "BLOCK_K": 32}, 2),
    key=["inputs", "outputs", "height", "width", "KERNEL", "STRIDE"],
)
@triton.jit
def strided_gradient_kernel(
    dy,
    w,
    dx,
    inputs,
    outputs,
    y_rows,
    y_columns,
    height,
    width,
    FIRST: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx[b, c, i, j] = sum over o and taps (r, s) of w[b, o, c, r, s] dy[b, o, (i + FIRST - r) / STRIDE, ...].

    dx and dy are contiguous. FIRST is the padded input's row that dx's first row stands for. A pixel meets only the
    taps of its own parity: a program takes the pixels of one parity, and those taps alone.
    """
    network = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) // (STRIDE * STRIDE) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_parity = tl.program_id(1) // STRIDE % STRIDE
    column_parity = tl.program_id(1) % STRIDE
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    per_row = (width + STRIDE - 1) // STRIDE
    i = p // per_row
    j = p % per_row
    inside = (i * STRIDE + row_parity < height) & (j * STRIDE + column_parity < width)
    first_r = (row_parity + FIRST) % STRIDE
    first_s = (column_parity + FIRST) % STRIDE
    r_taps = (KERNEL - first_r + STRIDE - 1) // STRIDE
    s_taps = (KERNEL - first_s + STRIDE - 1) // STRIDE
    blocks = (outputs + BLOCK_K - 1) // BLOCK_K
    taps: tl.constexpr = KERNEL * KERNEL
    dy += network * outputs * y_rows * y_columns
    w += network * outputs * inputs * taps
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=SUM)
    for step in range(0, r_taps * s_taps * blocks):
        r = step // blocks // s_taps
        s = step // blocks % s_taps
        o = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        y = i + (row_parity + FIRST) // STRIDE - r
        z = j + (column_parity + FIRST) // STRIDE - s
        pixel = y * y_columns + z
        met = inside & (y >= 0) & (y < y_rows) & (z >= 0) & (z < y_columns)
        came = tl.load(
            dy + pixel[:, None] + o[None, :] * (y_rows * y_columns), mask=met[:, None] & (o < outputs)[None, :], other=0
        )
        tap = (first_r + STRIDE * r) * KERNEL + first_s + STRIDE * s
        taken = tl.load(
            w + (o[:, None] * inputs + c[None, :]) * taps + tap,
            mask=(o < outputs)[:, None] & (c < inputs)[None, :],
            other=0,
        )
        total = tl.dot(came, taken.to(came.dtype), total, input_precision=PRECISION, out_dtype=SUM)
    pixel = (i * STRIDE + row_parity) * width + j * STRIDE + column_parity
    place = dx + (network * inputs + c)[None, :] * (height * width) + pixel[:, None]
    tl.store(place, total.to(dx.dtype.element_ty), mask=inside[:, None] & (c < inputs)[None, :])


@_tune(
    ({"BLOCK_P": 32, "BLOCK_K": 64}, 4),
    ({"BLOCK_P": 32, "BLOCK_K": 128}, 4),
    ({"BLOCK_P": 32, "BLOCK_K": 32}, 2),
    key=["inputs", "outputs", "pixels", "KERNEL", "STRIDE"],
)
@triton.jit
def weight_gradient_kernel(
    x,
    dy,
    dw,
    db,
    inputs,
    outputs,
    pixels,
    width,
    share,
    x_network,
    x_channel,
    x_row,
    x_column,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dw[split, b, o, k] = sum over the split's pixels of dy[b, o, p] x[b, unfolded k, p]; db[split, b, o] likewise.

    A split takes ``share`` pixels, so that a stack of few large images still fills the device; the caller adds the
    splits up. dy is contiguous.
    """
    network = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1) % SPLITS
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    o = tl.program_id(1) // SPLITS * BLOCK_O + tl.arange(0, BLOCK_O)
    depth = inputs * KERNEL * KERNEL
    tap = k // (KERNEL * KERNEL) * x_channel + k // KERNEL % KERNEL * x_row + k % KERNEL * x_column
    x += network * x_network
    dy += network * outputs * pixels
    last = tl.minimum(pixels, (split + 1) * share)
    total = tl.zeros((BLOCK_K, BLOCK_O), dtype=SUM)
    sums = tl.zeros((BLOCK_O,), dtype=SUM)
    for start in range(split * share, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        pixel = (p // width) * STRIDE * x_row + (p % width) * STRIDE * x_column
        seen = tl.load(x + tap[:, None] + pixel[None, :], mask=(k < depth)[:, None] & (p < last)[None, :], other=0)
        came = tl.load(
            dy + p[:, None] + o[None, :] * pixels, mask=(p < last)[:, None] & (o < outputs)[None, :], other=0
        )
        total = tl.dot(seen, came, total, input_precision=PRECISION, out_dtype=SUM)
        sums += tl.sum(came.to(SUM), axis=0)
    row = (split * tl.num_programs(2) + network) * outputs + o
    tl.store(dw + row[None, :] * depth + k[:, None], total, mask=(k < depth)[:, None] & (o < outputs)[None, :])
    if tl.program_id(0) == 0:
        tl.store(db + row, sums, mask=o < outputs)
