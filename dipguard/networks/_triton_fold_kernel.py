# ruff: noqa: ANN001, ANN202
# mypy: ignore-errors
"""Triton kernel of the gradient of padding; imported only where it runs (:mod:`dipguard.networks.triton_conv`)."""

from __future__ import annotations

import triton
import triton.language as tl


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
    padded,
    dx,
    count,
    height,
    width,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    REFLECT: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx[plane, h, w] = sum of ``padded`` over the positions that show that pixel; both contiguous.

    Each pixel collects what belongs to it, always in the same order. Torch's own kernel adds atomically, so that two
    runs round differently.
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
