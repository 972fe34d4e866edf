"""The engine for NVIDIA GPUs: forms of the convolution chosen by measurement, the step replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from dipguard.engines.base import Engine, Step, join_networks, keep_networks
from dipguard.engines.cuda_graph import CudaGraphStep
from dipguard.engines.precision import precision
from dipguard.networks import StackedSkipNet
from dipguard.networks.form_choice import FormChoice, choose_forms
from dipguard.networks.norm_choice import NormChoice, choose_norms


class CudaGraphEngine(Engine):
    """Forward and backward pass as one CUDA graph (:class:`dipguard.engines.cuda_graph.CudaGraphStep`).

    The loss's ``backward()`` hands over gradients that are already there. A factor that somebody multiplies the loss by
    is not looked at: reading it would make the host wait for the GPU in every step.

    Args:
        net: The stack, on a CUDA device.
        given: x0, [B, 3, H, W], in the network's dtype.
        z_gradient: z is optimised too.
        products: ``float32``, ``tf32`` or ``bfloat16`` (:mod:`dipguard.engines.precision`).
        forms: Candidates for the convolutions' forms; None for all that the device can run.
        norms: Candidates for the normalisations' forms; None for all that the device can run.
        capture: False runs the step eagerly, on every device.

    Attributes:
        name: ``cuda_graph``; ``torch`` where nothing is recorded.

    Raises:
        RuntimeError: Not a CUDA device, or no candidate works for some layer.
    """

    def __init__(
        self,
        net: StackedSkipNet,
        given: Tensor,
        *,
        z_gradient: bool = False,
        products: str = "float32",
        forms: Collection[str] | None = None,
        norms: Collection[str] | None = None,
        capture: bool = True,
    ) -> None:
        self.name = "cuda_graph" if capture else "torch"
        self.net = net
        self._options: dict[str, Any] = {"products": products, "z_gradient": z_gradient, "capture": capture}
        self._handle = given.new_zeros((), requires_grad=True)
        net.set_layout(channels_last=given.device.type == "cpu")
        with precision(products, given.device):
            size = (given.shape[-2], given.shape[-1])
            self.choice: FormChoice = choose_forms(net, given.device, size=size, z_gradient=z_gradient, forms=forms)
            self.norm_choice: NormChoice = choose_norms(net, given.device, size=size, forms=norms)
        self.choice.apply(net)
        self.norm_choice.apply(net)
        self._given = given
        self._graph: CudaGraphStep | None = CudaGraphStep(net, given, **self._options)

    def parameters(self) -> list[nn.Parameter]:
        """The network's own."""
        return list(self.net.parameters())

    def step(self, z: Tensor) -> Step:
        """See :meth:`Engine.step`; the backward pass is already queued when this returns."""
        if self._graph is None:
            self._graph = CudaGraphStep(self.net, self._given, **self._options)
        x, errors, gradients = self._graph.compute(z)
        # The next step writes into the same memory: what callbacks keep must be a copy.
        loss: Tensor = _HandOver.apply(self._handle, z, errors.sum(), self.parameters(), gradients)
        return Step(loss, x.clone(), errors.clone())

    def keep(self, rows: Tensor) -> None:
        """See :meth:`Engine.keep`; the graph is recorded anew at the next step, the forms stay."""
        self._graph = None  # and its memory, before the next one takes as much
        self._given = self._given[rows]
        keep_networks(self.net, rows)

    def join(self, net: StackedSkipNet, given: Tensor) -> None:
        """See :meth:`Engine.join`; the graph is recorded anew at the next step, the forms stay."""
        self._graph = None
        self._given = torch.cat([self._given, given])
        join_networks(self.net, net)


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
