"""The engine for NVIDIA GPUs: forms of the convolution chosen by measurement, the step replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from dipguard.engines.base import Engine, Step, kept_rows, resize
from dipguard.engines.cuda_graph import CudaGraphStep
from dipguard.engines.precision import precision
from dipguard.networks import StackedSkipNet
from dipguard.networks.form_choice import FormChoice, choose_forms


class CudaGraphEngine(Engine):
    """Forward and backward pass as one CUDA graph (:class:`dipguard.engines.cuda_graph.CudaGraphStep`).

    The loss's ``backward()`` hands over gradients that are already there. A factor that somebody multiplies the loss by
    is not looked at: reading it would make the host wait for the GPU in every step.

    Args:
        net: The stack, on a CUDA device.
        given: x0, [B, 3, H, W], in the network's dtype.
        z_gradient: z is optimised too.
        products: ``float32``, ``tf32`` or ``bfloat16`` (:mod:`dipguard.engines.precision`).
        forms: Candidates for the layers' forms; None for all that the device can run.
        capture: False runs the step eagerly, on every device.

    Raises:
        RuntimeError: Not a CUDA device, or no candidate works for some layer.
    """

    name = "cuda_graph"

    def __init__(
        self,
        net: StackedSkipNet,
        given: Tensor,
        *,
        z_gradient: bool = False,
        products: str = "float32",
        forms: Collection[str] | None = None,
        capture: bool = True,
    ) -> None:
        self.net = net
        self._options: dict[str, Any] = {"products": products, "z_gradient": z_gradient, "capture": capture}
        self._handle = given.new_zeros((), requires_grad=True)
        net.set_layout(channels_last=given.device.type == "cpu")
        with precision(products, given.device):
            size = (given.shape[-2], given.shape[-1])
            self.choice: FormChoice = choose_forms(net, given.device, size=size, z_gradient=z_gradient, forms=forms)
        self.choice.apply(net)
        self._graph = CudaGraphStep(net, given, **self._options)

    def parameters(self) -> list[nn.Parameter]:
        """The network's own."""
        return list(self.net.parameters())

    def step(self, z: Tensor) -> Step:
        """See :meth:`Engine.step`; the backward pass is already queued when this returns."""
        x, errors, gradients = self._graph.compute(z)
        # The next step writes into the same memory: what callbacks keep must be a copy.
        loss: Tensor = _HandOver.apply(self._handle, z, errors.sum(), self.parameters(), gradients)
        return Step(loss, x.clone(), errors.clone())

    def keep(self, rows: Tensor) -> None:
        """See :meth:`Engine.keep`; the graph is recorded anew, the forms stay."""
        given = self._graph.given[rows]
        for parameter in self.parameters():
            parameter.grad = None
            parameter.data = kept_rows(parameter.data, rows)
        resize(self.net, len(rows))
        del self._graph  # and its memory, before the next one takes as much
        self._graph = CudaGraphStep(self.net, given, **self._options)


class _HandOver(torch.autograd.Function):
    """The loss, whose backward pass hands over the gradients that are already there."""

    @staticmethod
    def forward(
        ctx: Any, handle: Tensor, z: Tensor, loss: Tensor, parameters: list[nn.Parameter], gradients: list[Tensor]
    ) -> Tensor:
        ctx.parameters, ctx.gradients = parameters, gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Set, not returned: autograd would copy tensors that someone else holds.
        for parameter, gradient in zip(ctx.parameters, ctx.gradients, strict=False):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return None, ctx.gradients[-1].clone() if ctx.needs_input_grad[1] else None, None, None, None
