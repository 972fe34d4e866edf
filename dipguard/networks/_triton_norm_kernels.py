# ruff: noqa: ANN001, ANN202
# mypy: ignore-errors
"""Triton kernels of normalisation and LeakyReLU in one; imported only where they run.

One program a plane, that is a channel of one network; planes are contiguous. One that fits a block (SINGLE) is read
once, a larger one anew in each pass, mostly from the cache. Sums run in float32 (float64 for float64), in an order that
the plane's size fixes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _activated(unit, w, b, SLOPE: tl.constexpr):
    out = unit * w + b
    return tl.where(out > 0, out, out * SLOPE)


@triton.jit
def _before(came, unit, w, b, SLOPE: tl.constexpr):
    """The gradient before the activation; what stood there is computed anew."""
    return tl.where(unit * w + b > 0, came, came * SLOPE)


@triton.jit
def norm_kernel(
    x,
    weight,
    bias,
    y,
    means,
    scales,
    count,
    EPS: tl.constexpr,
    SLOPE: tl.constexpr,
    SUM: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = leaky((x - mean) * scale * weight + bias), with scale = 1 / sqrt(variance + EPS)."""
    plane = tl.program_id(0).to(tl.int64)
    x += plane * count
    y += plane * count
    w = tl.load(weight + plane).to(SUM)
    b = tl.load(bias + plane).to(SUM)
    n = tl.arange(0, BLOCK)
    if SINGLE:
        value = tl.load(x + n, mask=n < count, other=0).to(SUM)
        mean = tl.sum(value, axis=0) / count
        off = tl.where(n < count, value - mean, 0)
        scale = 1 / tl.sqrt(tl.sum(off * off, axis=0) / count + EPS)
        tl.store(y + n, _activated(off * scale, w, b, SLOPE).to(y.dtype.element_ty), mask=n < count)
    else:
        sums = tl.zeros((BLOCK,), dtype=SUM)
        for start in range(0, count, BLOCK):
            sums += tl.load(x + start + n, mask=start + n < count, other=0).to(SUM)
        mean = tl.sum(sums, axis=0) / count
        squares = tl.zeros((BLOCK,), dtype=SUM)
        for start in range(0, count, BLOCK):
            value = tl.load(x + start + n, mask=start + n < count, other=0).to(SUM)
            off = tl.where(start + n < count, value - mean, 0)
            squares += off * off
        scale = 1 / tl.sqrt(tl.sum(squares, axis=0) / count + EPS)
        for start in range(0, count, BLOCK):
            value = tl.load(x + start + n, mask=start + n < count, other=0).to(SUM)
            out = _activated((value - mean) * scale, w, b, SLOPE)
            tl.store(y + start + n, out.to(y.dtype.element_ty), mask=start + n < count)
    tl.store(means + plane, mean)
    tl.store(scales + plane, scale)


@triton.jit
def norm_gradient_kernel(
    x,
    dy,
    weight,
    bias,
    means,
    scales,
    dx,
    dw,
    db,
    count,
    SLOPE: tl.constexpr,
    SUM: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients with respect to x, weight and bias."""
    plane = tl.program_id(0).to(tl.int64)
    x += plane * count
    dy += plane * count
    dx += plane * count
    mean = tl.load(means + plane)
    scale = tl.load(scales + plane)
    w = tl.load(weight + plane).to(SUM)
    b = tl.load(bias + plane).to(SUM)
    n = tl.arange(0, BLOCK)
    if SINGLE:
        unit = (tl.load(x + n, mask=n < count, other=0).to(SUM) - mean) * scale
        came = _before(tl.load(dy + n, mask=n < count, other=0).to(SUM), unit, w, b, SLOPE)
        plain = tl.sum(came, axis=0)
        along = tl.sum(came * unit, axis=0)
        out = (came - plain / count - unit * (along / count)) * (w * scale)
        tl.store(dx + n, out.to(dx.dtype.element_ty), mask=n < count)
    else:
        plains = tl.zeros((BLOCK,), dtype=SUM)
        alongs = tl.zeros((BLOCK,), dtype=SUM)
        for start in range(0, count, BLOCK):
            inside = start + n < count
            unit = (tl.load(x + start + n, mask=inside, other=0).to(SUM) - mean) * scale
            came = _before(tl.load(dy + start + n, mask=inside, other=0).to(SUM), unit, w, b, SLOPE)
            plains += came
            alongs += came * unit
        plain = tl.sum(plains, axis=0)
        along = tl.sum(alongs, axis=0)
        for start in range(0, count, BLOCK):
            inside = start + n < count
            unit = (tl.load(x + start + n, mask=inside, other=0).to(SUM) - mean) * scale
            came = _before(tl.load(dy + start + n, mask=inside, other=0).to(SUM), unit, w, b, SLOPE)
            out = (came - plain / count - unit * (along / count)) * (w * scale)
            tl.store(dx + start + n, out.to(dx.dtype.element_ty), mask=inside)
    tl.store(dw + plane, along)
    tl.store(db + plane, plain)
