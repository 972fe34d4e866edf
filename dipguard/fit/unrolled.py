"""A short DIP fit that is differentiable with respect to the given image. Attacks use it, the defence never does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from dipguard.checks import Indices, check_float, check_images, check_int
from dipguard.engines.base import fit_errors
from dipguard.fit.module import init_networks, tolerance_of
from dipguard.fit.options import FitOptions
from dipguard.fit.runner import isolated_trainer
from dipguard.seeding import Jitter

BETAS = (0.9, 0.999)
EPS = 1e-8
"""Adam's constants, torch's defaults, as in the fit itself."""
FLOOR = 1e-3
"""A ``floor`` for attacks. Through 40 steps of a small network (4, 8 and 16 filters, no skips) the gradient is noise
without one: of two images' float32 and float64 gradients, the cosines were 1.00 and -0.40, with it 1.00 and 0.63; its
norm fell from 14,500 to 13."""


def unrolled_fit(
    images: Tensor, *, T: int, fit: FitOptions, indices: Indices | None = None, floor: float = 0.0
) -> Tensor:
    """Fit B networks to B images as :class:`~dipguard.fit.StackedDIP` does, in one graph that leads back to the images.

    The values are those of the ordinary fit, up to rounding. Each step stays in memory with its backward pass (about
    1.3 MB of float32 for a 32x32 image and a network of 4, 8 and 16 filters). The exact gradient soon becomes chaotic:
    Adam divides by a gradient's size, so a number whose gradient is nearly zero gets an enormous slope. A ``floor``
    above 0 leaves those slopes out; the values stay. Works under no_grad and inference_mode. Returns [B, 3, H, W] in
    (0, 1), of the images' dtype and on their device; TypeError or ValueError for bad images or options.

    Args:
        images: x0, [B, 3, H, W] in [0, 1]; where they require a gradient, the result has one.
        T: Optimiser steps of the ordinary fit, at least 1; the result is x(T - 1). With 1 there is no gradient, since
            x(0) does not depend on the image.
        fit: How to fit; its ``engine`` and ``matmul_precision`` are ignored.
        indices: The images' indices, which determine their random draws; 0 to B - 1 by default.
        floor: In the backward pass, weights whose gradient's running root mean square is at most this are taken to move
            independently of the image; 0 for the exact gradient, `FLOOR` for one that an attack can use.
    """
    images = check_images(images)
    check_int(T, name="T", low=1)
    check_float(floor, name="floor", low=0.0)
    differentiable = images.requires_grad and torch.is_grad_enabled()
    with isolated_trainer(images.device):
        given = (images if differentiable else images.detach().clone()).to(getattr(torch, fit.dtype))
        order, net, z = init_networks(given, indices, options=fit)
        net, z = net.to(given.device), z.to(given)
        tolerance = tolerance_of(given, options=fit)
        names = [name for name, _ in net.named_parameters()]
        values = [parameter.detach().clone().requires_grad_() for parameter in net.parameters()]
        values += [z.clone().requires_grad_()] if fit.optimise_z else []
        moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in values]
        shape = (z.shape[1], z.shape[2], z.shape[3])
        jitter = Jitter(shape, indices=order, seed=fit.seed, std=fit.jitter) if fit.jitter > 0 else None
        for t in range(T):  # lines 3 and 7 of Algorithm 1
            seed = values[-1] if fit.optimise_z else z
            entered = seed if jitter is None else jitter.next(seed)
            x: Tensor = functional_call(net, dict(zip(names, values, strict=False)), (entered,))
            if t < T - 1:
                loss = fit_errors(x, given, tolerance).sum()
                gradients = torch.autograd.grad(loss, values, create_graph=differentiable)
                for i, gradient in enumerate(gradients):
                    moments[i] = _moved(*moments[i], gradient)
                    values[i] = values[i] - _change(*moments[i], count=t + 1, lr=fit.lr, floor=floor)
                if not differentiable:
                    values = [value.detach().requires_grad_() for value in values]
        last = x.to(images.dtype)
    return last if differentiable else last.detach()


def _moved(first: Tensor, second: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Adam's running means of a gradient and of its square, after one more step."""
    return torch.lerp(first, gradient, 1 - BETAS[0]), BETAS[1] * second + (1 - BETAS[1]) * gradient.square()


def _change(first: Tensor, second: Tensor, *, count: int, lr: float, floor: float) -> Tensor:
    """What Adam's step number ``count`` takes off (Kingma and Ba 2015), as a part of the graph."""
    corrections = [1 - beta**count for beta in BETAS]
    # The square root, with the slope 0 at 0, where its own is infinite and would turn the gradient into NaN.
    positive = second > 0
    size = torch.where(positive, second, 1).sqrt() * positive / corrections[1] ** 0.5 + EPS
    change = lr / corrections[0] * first / size
    # The bias before a normalisation has no gradient but rounding: its slope is noise, and a large one.
    return torch.where(size > floor, change, change.detach()) if floor > 0 else change
