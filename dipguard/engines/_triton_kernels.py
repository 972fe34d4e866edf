# ruff: noqa: ANN001, ANN202
# mypy: ignore-errors
"""The Triton kernels; imported only where they run (:mod:`dipguard.engines.triton_ops`).

Convolutions are implicit matrix products within one network: a program computes one tile of the product and reads the
entries of the unfolded input from where they lie. "Depth" is the product's inner dimension. Inputs are padded already,
so an entry's place is the sum of a pixel's and a tap's, without any check of borders. Normalisation runs one program
per plane, that is per channel of one network; planes are contiguous. A plane that fits into a block (SINGLE) is read
once, a larger one in each pass, mostly from the cache. The middle of a scale is a normalisation that reads its planes
from the skip or, upsampled, from below.

Sums run in float32 (float64 for float64), in an order that depends on tile and plane sizes and on no other network.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from dipguard.engines.kernel_choice import median_seconds


def _bench(call: Any, quantiles: Any) -> list[float]:
    # Triton's own default takes a tenth of a second per candidate: too long for dozens of layer shapes.
    return [median_seconds(call, device=torch.device("cuda"), best=math.inf)] * len(quantiles)


def _tune(*tiles: tuple[dict[str, int], int], key: list[str]) -> Any:
    # Interpreted kernels are far too slow to be tuned.
    tried = tiles[:1] if triton.knobs.runtime.interpret else tiles
    configs = [triton.Config(sizes, num_warps=warps, num_stages=2) for sizes, warps in tried]
    # The tile changes the order of sums: kept on disk, so that later processes give the same bits.
    return triton.autotune(configs, key=key, do_bench=_bench, cache_results=True)


@_tune(
    ({"BLOCK_P": 128, "BLOCK_K": 32}, 4),
    ({"BLOCK_P": 256, "BLOCK_K": 16}, 4),
    ({"BLOCK_P": 32, "BLOCK_K": 32}, 2),
    key=["inputs", "outputs", "pixels", "KERNEL", "STRIDE", "TRANSPOSED", "PRECISION"],
)
@triton.jit
def forward_kernel(
    x, w, bias, y,
    inputs, outputs, pixels, width, x_network, x_channel, x_row, x_column,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
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
    key=["inputs", "outputs", "height", "width", "KERNEL", "STRIDE", "PRECISION"],
)
@triton.jit
def strided_gradient_kernel(
    dy, w, dx,
    inputs, outputs, y_rows, y_columns, height, width,
    FIRST: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
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
    key=["inputs", "outputs", "pixels", "KERNEL", "STRIDE", "PRECISION"],
)
# A variant for each number of splits would be compiled for each size of image.
@triton.jit(do_not_specialize=["share", "splits"])
def weight_gradient_kernel(
    x, dy, dw, db,
    inputs, outputs, pixels, width, share, splits, x_network, x_channel, x_row, x_column,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw[split, b, o, k] = sum over the split's pixels of dy[b, o, p] x[b, unfolded k, p]; db[split, b, o] likewise.

    A split takes ``share`` pixels, so that a stack of few large images still fills the device; the caller adds the
    splits up. dy is contiguous.
    """
    network = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1) % splits
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    o = tl.program_id(1) // splits * BLOCK_O + tl.arange(0, BLOCK_O)
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


@triton.jit
def _source(position, side, BEFORE: tl.constexpr, REFLECT: tl.constexpr):
    """The pixel that a padded position shows, along one side (reflected or repeated border)."""
    at = position - BEFORE
    if REFLECT:  # noqa: SIM108 - the compiler takes one branch
        at = (side - 1) - tl.abs((side - 1) - tl.abs(at))
    else:
        at = tl.minimum(tl.maximum(at, 0), side - 1)
    return at


@triton.jit
def _position(pixel, side, border: tl.constexpr, BEFORE: tl.constexpr):
    """The padded position of a pixel (border -1), or of one of the border's rows or columns (0, 1, ...)."""
    if border < 0:
        at = pixel + BEFORE
    elif border < BEFORE:
        at = pixel * 0 + border
    else:
        at = pixel * 0 + border + side
    return at


@triton.jit
def fold_kernel(
    padded, dx, count, height, width,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, REFLECT: tl.constexpr,
    SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx[plane, h, w] = sum of ``padded`` over the positions that show that pixel; both contiguous.

    Each pixel collects its gradients in a fixed order. Torch's own kernel adds atomically, so two runs of it round
    differently.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = n // width % height
    w = n % width
    wide = width + BEFORE + AFTER
    padded += n // (height * width) * (height + BEFORE + AFTER) * wide
    total = tl.zeros((BLOCK,), dtype=SUM)
    for r in tl.static_range(-1, BEFORE + AFTER):
        row = _position(h, height, r, BEFORE)
        shows_row = (_source(row, height, BEFORE, REFLECT) == h) & (n < count)
        for s in tl.static_range(-1, BEFORE + AFTER):
            column = _position(w, width, s, BEFORE)
            shows = shows_row & (_source(column, width, BEFORE, REFLECT) == w)
            total += tl.load(padded + row * wide + column, mask=shows, other=0).to(SUM)
    tl.store(dx + n, total.to(dx.dtype.element_ty), mask=n < count)


@triton.jit
def _activated(unit, w, b, SLOPE: tl.constexpr):
    out = unit * w + b
    return tl.where(out > 0, out, out * SLOPE)


@triton.jit
def _before(came, unit, w, b, SLOPE: tl.constexpr):
    """The gradient before the activation; what stood there is computed anew."""
    return tl.where(unit * w + b > 0, came, came * SLOPE)


@triton.jit
def _upsampled(low, i, j, inside, rows, columns, UPSAMPLE: tl.constexpr, SUM: tl.constexpr):
    """Pixel (i, j) of a plane of ``rows`` x ``columns`` pixels, ``low``, upsampled by 2."""
    row = i // 2 * columns
    column = j // 2
    value = tl.load(low + row + column, mask=inside, other=0).to(SUM)
    if UPSAMPLE == "bilinear":
        # An even pixel takes a quarter from the pixel before its own, an odd one from the pixel after it.
        next_row = tl.minimum(tl.maximum(i // 2 + i % 2 * 2 - 1, 0), rows - 1) * columns
        next_column = tl.minimum(tl.maximum(column + j % 2 * 2 - 1, 0), columns - 1)
        beside = tl.load(low + row + next_column, mask=inside, other=0).to(SUM)
        below = tl.load(low + next_row + column, mask=inside, other=0).to(SUM)
        across = tl.load(low + next_row + next_column, mask=inside, other=0).to(SUM)
        value += (beside - value) * 0.25
        below += (across - below) * 0.25
        value += (below - value) * 0.25
    return value


@triton.jit
def _read(skip, low, n, own, count, width, rows, columns, UPSAMPLE: tl.constexpr, SUM: tl.constexpr):
    """Pixels n of a plane before the normalisation: the first ``own`` of the skip, the others upsampled."""
    value = tl.load(skip + n, mask=n < own, other=0).to(SUM)
    if UPSAMPLE != "none":
        value += _upsampled(low, n // width, n % width, (n >= own) & (n < count), rows, columns, UPSAMPLE, SUM)
    return value


@triton.jit
def _write(dskip, dhigh, n, own, count, out, UPSAMPLE: tl.constexpr):
    """Gradients of what `_read` gives."""
    tl.store(dskip + n, out.to(dskip.dtype.element_ty), mask=n < own)
    if UPSAMPLE != "none":
        tl.store(dhigh + n, out.to(dhigh.dtype.element_ty), mask=(n >= own) & (n < count))


@triton.jit(do_not_specialize=["channels", "skips", "width", "rows", "columns"])
def norm_kernel(
    skip, low, weight, bias, y, means, scales, channels, skips, count, width, rows, columns,
    EPS: tl.constexpr, SLOPE: tl.constexpr, UPSAMPLE: tl.constexpr,
    SUM: tl.constexpr, SINGLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = leaky((x - mean) * scale * weight + bias), with scale = 1 / sqrt(variance + EPS).

    x are each network's ``skips`` planes of the skip, then those of ``low``, upsampled; UPSAMPLE "none": only skips.
    """
    plane = tl.program_id(0).to(tl.int64)
    channel = plane % channels
    own = tl.where(channel < skips, count, 0)  # pixels from the skip: all or none
    skip += (plane // channels * skips + channel) * count
    low += (plane // channels * (channels - skips) + channel - skips) * rows * columns
    y += plane * count
    w = tl.load(weight + plane).to(SUM)
    b = tl.load(bias + plane).to(SUM)
    n = tl.arange(0, BLOCK)
    if SINGLE:
        value = _read(skip, low, n, own, count, width, rows, columns, UPSAMPLE, SUM)
        mean = tl.sum(value, axis=0) / count
        off = tl.where(n < count, value - mean, 0)
        scale = 1 / tl.sqrt(tl.sum(off * off, axis=0) / count + EPS)
        tl.store(y + n, _activated(off * scale, w, b, SLOPE).to(y.dtype.element_ty), mask=n < count)
    else:
        sums = tl.zeros((BLOCK,), dtype=SUM)
        for start in range(0, count, BLOCK):
            sums += _read(skip, low, start + n, own, count, width, rows, columns, UPSAMPLE, SUM)
        mean = tl.sum(sums, axis=0) / count
        squares = tl.zeros((BLOCK,), dtype=SUM)
        for start in range(0, count, BLOCK):
            value = _read(skip, low, start + n, own, count, width, rows, columns, UPSAMPLE, SUM)
            off = tl.where(start + n < count, value - mean, 0)
            squares += off * off
        scale = 1 / tl.sqrt(tl.sum(squares, axis=0) / count + EPS)
        for start in range(0, count, BLOCK):
            value = _read(skip, low, start + n, own, count, width, rows, columns, UPSAMPLE, SUM)
            out = _activated((value - mean) * scale, w, b, SLOPE)
            tl.store(y + start + n, out.to(y.dtype.element_ty), mask=start + n < count)
    tl.store(means + plane, mean)
    tl.store(scales + plane, scale)


@triton.jit(do_not_specialize=["channels", "skips", "width", "rows", "columns"])
def norm_gradient_kernel(
    skip, low, dy, weight, bias, means, scales, dskip, dhigh, dw, db, channels, skips, count, width, rows, columns,
    SLOPE: tl.constexpr, UPSAMPLE: tl.constexpr,
    SUM: tl.constexpr, SINGLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients with respect to the skip, to ``low`` after its upsampling, to weight and bias."""
    plane = tl.program_id(0).to(tl.int64)
    channel = plane % channels
    own = tl.where(channel < skips, count, 0)
    skip_plane = plane // channels * skips + channel
    low_plane = plane // channels * (channels - skips) + channel - skips
    skip += skip_plane * count
    dskip += skip_plane * count
    low += low_plane * rows * columns
    dhigh += low_plane * count
    dy += plane * count
    mean = tl.load(means + plane)
    scale = tl.load(scales + plane)
    w = tl.load(weight + plane).to(SUM)
    b = tl.load(bias + plane).to(SUM)
    n = tl.arange(0, BLOCK)
    if SINGLE:
        unit = (_read(skip, low, n, own, count, width, rows, columns, UPSAMPLE, SUM) - mean) * scale
        came = _before(tl.load(dy + n, mask=n < count, other=0).to(SUM), unit, w, b, SLOPE)
        plain = tl.sum(came, axis=0)
        along = tl.sum(came * unit, axis=0)
        out = (came - plain / count - unit * (along / count)) * (w * scale)
        _write(dskip, dhigh, n, own, count, out, UPSAMPLE)
    else:
        plains = tl.zeros((BLOCK,), dtype=SUM)
        alongs = tl.zeros((BLOCK,), dtype=SUM)
        for start in range(0, count, BLOCK):
            value = _read(skip, low, start + n, own, count, width, rows, columns, UPSAMPLE, SUM)
            unit = (value - mean) * scale
            came = _before(tl.load(dy + start + n, mask=start + n < count, other=0).to(SUM), unit, w, b, SLOPE)
            plains += came
            alongs += came * unit
        plain = tl.sum(plains, axis=0)
        along = tl.sum(alongs, axis=0)
        for start in range(0, count, BLOCK):
            value = _read(skip, low, start + n, own, count, width, rows, columns, UPSAMPLE, SUM)
            unit = (value - mean) * scale
            came = _before(tl.load(dy + start + n, mask=start + n < count, other=0).to(SUM), unit, w, b, SLOPE)
            out = (came - plain / count - unit * (along / count)) * (w * scale)
            _write(dskip, dhigh, start + n, own, count, out, UPSAMPLE)
    tl.store(dw + plane, along)
    tl.store(db + plane, plain)


@triton.jit(do_not_specialize=["height", "width", "rows", "columns"])
def upsampling_gradient_kernel(
    dhigh, dlow, count, height, width, rows, columns,
    UPSAMPLE: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each pixel of ``dlow`` collects, in a fixed order, from the pixels that it fed; both contiguous.

    Torch's own kernel for bilinear upsampling adds atomically, so two runs of it round differently.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dhigh += n // (rows * columns) * height * width
    # Pixels 2 k and 2 k + 1 show pixel k; bilinear ones beside them, 2 k - 1 and 2 k + 2, do so by a quarter.
    FED: tl.constexpr = 4 if UPSAMPLE == "bilinear" else 2
    total = tl.zeros((BLOCK,), dtype=SUM)
    for r in tl.static_range(FED):
        # Beyond an edge, the edge's own pixel shows k once more.
        i = tl.minimum(tl.maximum(n // columns % rows * 2 + r - (FED // 2 - 1), 0), 2 * rows - 1)
        for s in tl.static_range(FED):
            j = tl.minimum(tl.maximum(n % columns * 2 + s - (FED // 2 - 1), 0), 2 * columns - 1)
            came = tl.load(dhigh + i * width + j, mask=(n < count) & (i < height) & (j < width), other=0).to(SUM)
            if FED == 4:
                came *= (0.25 if r % 3 == 0 else 0.75) * (0.25 if s % 3 == 0 else 0.75)
            total += came
    tl.store(dlow + n, total.to(dlow.dtype.element_ty), mask=n < count)
