"""One fit step's forward and backward pass as a CUDA graph: recorded once, then handed to the GPU as a whole.

A step of the medium network is some 300 kernels, most of them shorter than it takes Python to launch one. Replayed as a
graph they follow each other without the host. At the time of writing this has never run on a GPU: what the tests check
on a CPU is the recorded function itself, run eagerly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dipguard.checks import check_int
from dipguard.engines.precision import precision
from dipguard.networks import StackedSkipNet


class CudaGraphStep:
    """Forward and backward pass of a stack on given images (Eq. 2), always in the same memory.

    Make it after the network has its device, memory layout and forms of convolution: the graph holds the addresses of
    the parameters, so an optimiser must update them in place (all of torch's do), and none may be replaced.

    Args:
        net: The stack, on a CUDA device (on any device without ``capture``).
        given: x0, [B, 3, H, W], on the same device and in the same dtype; copied.
        products: ``float32``, ``tf32`` or ``bfloat16`` (:mod:`dipguard.engines.precision`).
        z_gradient: Compute z's gradient too.
        capture: False runs the same function eagerly, on every device.
        warmup: Eager runs before the recording, at least 1. Libraries choose algorithms and kernels are compiled in
            the first; torch's documentation asks for a few, on a side stream.

    Raises:
        ValueError: Images and network do not fit together, unknown ``products``, or ``warmup`` out of range.
        RuntimeError: ``capture`` elsewhere than on a CUDA device.
    """

    def __init__(
        self,
        net: StackedSkipNet,
        given: Tensor,
        *,
        products: str = "float32",
        z_gradient: bool = False,
        capture: bool = True,
        warmup: int = 3,
    ) -> None:
        check_int(warmup, name="warmup", low=1)
        if given.ndim != 4 or len(given) != net.stack_size:
            raise ValueError(
                f"`given` must be one image a network, [{net.stack_size}, 3, H, W], got shape {tuple(given.shape)}"
            )
        if capture and given.device.type != "cuda":
            raise RuntimeError(
                f"a CUDA graph needs images and network on a CUDA device, got {given.device}; with capture=False the "
                "step runs eagerly"
            )
        self.net = net
        self.products = products
        # Tensors made under inference_mode can neither be written to nor saved for a backward pass outside of it.
        with torch.inference_mode(False):
            self.given = given.detach().clone()
            self.z = given.new_zeros(len(given), net.spec.input_depth, *given.shape[-2:])
            self.z.requires_grad_(z_gradient)
        self._wanted = [*net.parameters(), *([self.z] if z_gradient else [])]
        with precision(products, given.device):
            pass  # an unknown name is an error here, not at the first step
        self._graph: torch.cuda.CUDAGraph | None = None
        self._results: tuple[Tensor, Tensor, list[Tensor]] | None = None
        if capture:
            self._capture(warmup)

    def compute(self, z: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """One pass for z [B, input_depth, H, W]; the host does not wait for the GPU.

        Write z into the attribute ``z`` itself, and pass that, to save a copy.

        Returns:
            x [B, 3, H, W], each image's mean squared error [B], and the gradients of the errors' sum in the order of
            ``net.parameters()``, z's last if asked for. The next call overwrites all of them: clone what must last.

        Raises:
            ValueError: z is of another shape.
        """
        if z.shape != self.z.shape:
            raise ValueError(f"`z` must have shape {tuple(self.z.shape)}, got {tuple(z.shape)}")
        if z is not self.z:
            with torch.no_grad():
                self.z.copy_(z, non_blocking=True)
        if self._graph is None:
            return self._step()
        assert self._results is not None
        self._graph.replay()
        return self._results

    def _step(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        with torch.inference_mode(False), torch.enable_grad(), precision(self.products, self.given.device):
            x = self.net(self.z).to(self.given.dtype)
            errors = (x - self.given).square().flatten(1).mean(dim=1)
            # Not ``backward()``: fresh tensors each time, in the graph's own memory, and nothing to set to zero.
            gradients = torch.autograd.grad(errors.sum(), self._wanted)
        return x.detach(), errors.detach(), list(gradients)

    def _capture(self, warmup: int) -> None:
        device = self.given.device
        with torch.cuda.device(device):
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(warmup):
                    self._step()
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads (a logger's, the jitter's) may allocate or wait meanwhile without breaking the recording.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                self._results = self._step()
        self._graph = graph
