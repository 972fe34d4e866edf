"""The native engine: the whole step of one image in C++, an image a thread, or threads in teams where images are few.

A layer-by-layer stack carries every layer's activations of all images through memory. Here an image goes through the
whole network, forward and backward, before the next one starts, so that its tensors stay in the core's cache, and the
convolutions run from registers (native/convolution.h). Threads that have no image of their own help with another's,
row by row (native/team.h), where that is faster (native_teams.py). Nothing is shared between images, and no sum is cut
in two: a result does not depend on the stack or the number of threads, bit for bit.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dipguard.engines.base import Engine, Step, resize
from dipguard.engines.native_build import library
from dipguard.engines.native_plan import Instruction, Plan, UnsupportedError
from dipguard.engines.native_program import make_plan
from dipguard.engines.native_teams import TeamChoice
from dipguard.networks import StackedSkipNet
from dipguard.networks.layers import StackedConv2d, StackedNorm2d
from dipguard.networks.unet import SLOPE

DTYPES = {torch.float32: "float32", torch.float64: "float64"}


class NativeEngine(Engine):
    """Forward and backward pass in C++ (CPU, float32 or float64).

    All weights move into one flat parameter, [B, P]; the network's own parameters become views of it, so that they
    follow the fit.

    Args:
        net: The stack.
        given: x0, [B, 3, H, W], in the network's dtype.
        z_gradient: Whether the loss's backward pass also gives z a gradient.

    Raises:
        UnsupportedError, BuildError: See :meth:`check`.
    """

    name = "native"

    def __init__(self, net: StackedSkipNet, given: Tensor, *, z_gradient: bool = False) -> None:
        self.plan = self.check(net, given, z_gradient=z_gradient)
        self.z_gradient = z_gradient
        self.library = library(DTYPES[given.dtype])
        self.given = given.contiguous()
        self.eps = _eps(net)
        self.net = net
        self.flat = nn.Parameter(_moved(net, self.plan, given))
        self.gradient = torch.zeros_like(self.flat.data)
        self.threads = torch.get_num_threads()
        self.workspaces = given.new_zeros(min(len(given), self.threads), self.plan.room)
        self.team_choice = TeamChoice()
        self._frames = _integers(self.plan.frames)
        self.set_program(self.plan.program)
        self._handle = torch.zeros((), dtype=given.dtype, requires_grad=True)

    @staticmethod
    def check(net: StackedSkipNet, given: Tensor, *, z_gradient: bool = False) -> Plan:
        """The network's program, once it is known that it can run.

        Raises:
            UnsupportedError: Not a CPU, a dtype or a network that the engine cannot run.
            BuildError: The engine cannot be compiled here.
        """
        if given.device.type != "cpu" or given.dtype not in DTYPES:
            raise UnsupportedError(f"it needs float32 or float64 on a CPU, got {given.dtype} on {given.device.type}")
        height, width = given.shape[-2:]
        plan = make_plan(net.spec, padding=net.padding, height=height, width=width, z_gradient=z_gradient)
        library(DTYPES[given.dtype])
        return plan

    def set_program(self, program: Sequence[Instruction]) -> None:
        """Run this instead of the network's whole step (for profiling)."""
        self._program = _integers(program)
        self._length = len(program)

    def parameters(self) -> list[nn.Parameter]:
        """One flat parameter, [B, P]."""
        return [self.flat]

    def step(self, z: Tensor) -> Step:
        """See :meth:`Engine.step`; the backward pass is already done when this returns."""
        z = z.contiguous()
        z_gradient = torch.empty_like(z, requires_grad=False) if self.z_gradient else None
        reconstructions = torch.empty_like(self.given)
        errors = self.given.new_empty(len(z))
        plan = self.plan
        spare = len(z) % self.threads > 0
        start = time.perf_counter()
        self.library.stack_step(
            _pointer(self._frames),
            _pointer(self._program),
            ctypes.c_int64(self._length),
            ctypes.c_int64(len(z)),
            ctypes.c_int64(self.threads),
            ctypes.c_int64(spare and self.team_choice.teams),
            _pointer(z),
            ctypes.c_int64(z[0].numel()),
            _pointer(self.given),
            ctypes.c_int64(self.given[0].numel()),
            _pointer(self.flat),
            _pointer(self.gradient),
            ctypes.c_int64(plan.parameters),
            _pointer(reconstructions),
            _pointer(errors),
            None if z_gradient is None else _pointer(z_gradient),
            _pointer(self.workspaces),
            ctypes.c_int64(plan.room),
            ctypes.c_double(SLOPE),
            ctypes.c_double(self.eps),
        )
        if spare:
            self.team_choice.record(time.perf_counter() - start)
        loss: Tensor = _HandOver.apply(self._handle, errors.sum(), self, z, z_gradient)
        return Step(loss, reconstructions, errors)

    def keep(self, rows: Tensor) -> None:
        """See :meth:`Engine.keep`."""
        self.given = self.given[rows]
        self._set_flat(self.flat.data[rows])

    def join(self, net: StackedSkipNet, given: Tensor) -> None:
        """See :meth:`Engine.join`."""
        self.given = torch.cat([self.given, given])
        self._set_flat(torch.cat([self.flat.data, _moved(net, self.plan, given)]))

    def _set_flat(self, flat: Tensor) -> None:
        self.flat.grad = None
        self.flat.data = flat
        self.gradient = torch.zeros_like(flat)
        if len(self.workspaces) < min(len(flat), self.threads):
            self.workspaces = flat.new_zeros(min(len(flat), self.threads), self.plan.room)
        for parameter, view in _views(self.net, self.plan, flat):
            parameter.data = view
        resize(self.net, len(flat))
        self.team_choice = TeamChoice()


class _HandOver(torch.autograd.Function):
    """The loss, whose backward pass hands over the gradient that is already there."""

    @staticmethod
    def forward(
        ctx: Any, handle: Tensor, loss: Tensor, engine: NativeEngine, z: Tensor, z_gradient: Tensor | None
    ) -> Tensor:
        ctx.engine, ctx.z_gradient = engine, z_gradient
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, None, None, Tensor | None, None]:
        engine, factor = ctx.engine, float(upstream[0])
        gradient = engine.gradient if factor == 1 else engine.gradient * factor
        # Set, not returned: autograd would copy a tensor that someone else holds.
        engine.flat.grad = gradient if engine.flat.grad is None else engine.flat.grad + gradient
        z_gradient: Tensor | None = ctx.z_gradient
        return None, None, None, None if z_gradient is None else z_gradient * upstream[0], None


def _eps(net: StackedSkipNet) -> float:
    found = {module.eps for module in net.modules() if isinstance(module, StackedNorm2d)}
    assert len(found) == 1
    return found.pop()


def _views(net: StackedSkipNet, plan: Plan, flat: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The network's parameters, each with its place in ``flat`` [B, P]."""
    images = len(flat)
    modules = dict(net.named_modules())
    for name, layer in plan.layers.items():
        module = modules[name]
        assert isinstance(module, (StackedConv2d, StackedNorm2d))
        for parameter, slot in ((module.weight, layer.weight), (module.bias, layer.bias)):
            count = torch.Size(slot.shape).numel()
            view = flat[:, slot.offset : slot.offset + count].view(images, *slot.shape)[..., : slot.outputs]
            if len(slot.shape) == 4:  # [B, kernel, kernel, inputs, outputs]
                view = view.permute(0, 4, 3, 1, 2)
            yield parameter, view


def _moved(net: StackedSkipNet, plan: Plan, given: Tensor) -> Tensor:
    """A new flat parameter [B, P] with the network's numbers, whose parameters become views of it."""
    flat = given.new_zeros(len(given), plan.parameters)
    for parameter, view in _views(net, plan, flat):
        view.copy_(parameter.data)
        parameter.data = view
    return flat


def _integers(rows: Iterable[tuple[int, ...]]) -> Tensor:
    return torch.tensor([list(row) for row in rows], dtype=torch.int64)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
