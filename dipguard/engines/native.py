"""The native engine: the whole step of one image in C++, one image per thread, or threads in teams for few images.

An image goes through the whole network, forward and backward, before the next one starts: its tensors stay in the
core's cache. Threads without an image of their own help with another one, row by row (native/team.h). Images share
nothing, and no sum is split: results do not depend on the stack or on the number of threads, bit for bit.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dipguard.engines.base import Engine, HandOver, Step
from dipguard.engines.native_build import library
from dipguard.engines.native_plan import Instruction, Plan, UnsupportedError, make_plan
from dipguard.networks import StackedSkipNet
from dipguard.networks.unet import SLOPE, StackedJoin2d, StackedNorm2d

DTYPES = {torch.float32: "float32", torch.float64: "float64"}
TRIAL, PERIOD = 3, 500
"""Steps of a trial of one way of using threads, whose median counts, and steps until both ways are tried again."""


class NativeEngine(Engine):
    """Forward and backward pass in C++ (CPU, float32 or float64).

    All weights move into one flat parameter, [B, P]; the network's own parameters become views of it, so that they
    follow the fit. ``given`` is x0, [B, 3, H, W], in the network's dtype; ``tolerance`` [B] has the half widths of the
    loss's dead zones, none by default; with ``z_gradient`` the loss's backward pass also gives z a gradient.
    UnsupportedError for a device, dtype or network that the engine cannot run, BuildError if it cannot be compiled.
    """

    name = "native"

    def __init__(
        self, net: StackedSkipNet, given: Tensor, *, tolerance: Tensor | None = None, z_gradient: bool = False
    ) -> None:
        if given.device.type != "cpu" or given.dtype not in DTYPES:
            raise UnsupportedError(f"it needs float32 or float64 on a CPU, got {given.dtype} on {given.device.type}")
        height, width = given.shape[-2:]
        self.net = net
        self.plan = make_plan(net.spec, padding=net.padding, height=height, width=width, z_gradient=z_gradient)
        self.z_gradient = z_gradient
        self.library = library(DTYPES[given.dtype])
        self.given = given.contiguous()
        self.tolerance = given.new_zeros(len(given)) if tolerance is None else tolerance.to(given).contiguous()
        (self.eps,) = {module.eps for module in net.modules() if isinstance(module, StackedNorm2d | StackedJoin2d)}
        flat = given.new_zeros(len(given), self.plan.parameters)
        for parameter, view in _views(net, self.plan, flat):
            view.copy_(parameter.data)
            parameter.data = view
        self.flat = nn.Parameter(flat)
        self.gradient = torch.zeros_like(self.flat.data)
        self.threads = torch.get_num_threads()
        self.workspaces = given.new_zeros(min(len(given), self.threads), self.plan.room)
        self.team_choice = TeamChoice()
        self._frames = torch.tensor(self.plan.frames, dtype=torch.int64, device="cpu")
        self.set_program(self.plan.program)
        self._handle = torch.zeros((), dtype=given.dtype, requires_grad=True, device="cpu")

    def set_program(self, program: Sequence[Instruction]) -> None:
        """Run this instead of the network's whole step (for profiling)."""
        self._program = torch.tensor(program, dtype=torch.int64, device="cpu")
        self._length = len(program)

    def parameters(self) -> list[nn.Parameter]:
        """One flat parameter, [B, P]."""
        return [self.flat]

    def step(self, z: Tensor) -> Step:
        """One pass; the backward pass is already done when this returns."""
        z = z.contiguous()
        z_gradient = torch.empty_like(z, requires_grad=False) if self.z_gradient else None
        reconstructions = torch.empty_like(self.given)
        errors = self.given.new_empty(len(z))
        spare = len(z) % self.threads > 0
        start = time.perf_counter()
        program = self._frames, self._program, self._length
        images = z, z[0].numel(), self.given, self.given[0].numel(), self.tolerance
        weights = self.flat, self.gradient, self.plan.parameters
        made = reconstructions, errors, z_gradient, self.workspaces, self.plan.room
        how = len(z), self.threads, int(spare and self.team_choice.teams)
        arguments: tuple[Any, ...] = (*program, *how, *images, *weights, *made, SLOPE, self.eps)
        self.library.stack_step(*map(_as_c, arguments))
        if spare:
            self.team_choice.record(time.perf_counter() - start)
        loss: Tensor = HandOver.apply(self._handle, z, errors.sum(), [self.flat], [self.gradient], z_gradient)
        return Step(loss, reconstructions, errors)


class TeamChoice:
    """Whether threads without an image of their own help with another one (``teams``): the way that was faster lately.

    On idle cores helping pays: a single 224x224 image on two cores takes 156 ms per step instead of 309. But a team
    synchronises about a hundred times per step: on busy cores 14 ms instead of 2.5 were measured (32x32). So both ways
    are tried now and then. Results do not depend on the choice.
    """

    def __init__(self) -> None:
        self.teams = True
        self._seconds: list[float] = []

    def record(self, seconds: float) -> None:
        """Note the time of a step that was run as ``teams`` says."""
        self._seconds.append(seconds)
        done = len(self._seconds)
        if done == TRIAL:
            self.teams = False
        elif done == 2 * TRIAL:
            self.teams = statistics.median(self._seconds[:TRIAL]) <= statistics.median(self._seconds[TRIAL:])
        elif done == PERIOD:
            self.teams, self._seconds = True, []


def _views(net: StackedSkipNet, plan: Plan, flat: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The network's parameters, each with its place in ``flat`` [B, P]."""
    for name, slots in plan.layers.items():
        module: Any = net.get_submodule(name)
        for parameter, slot in zip((module.weight, module.bias), slots, strict=True):
            count = torch.Size(slot.shape).numel()
            view = flat[:, slot.offset : slot.offset + count].view(len(flat), *slot.shape)[..., : slot.outputs]
            if len(slot.shape) == 4:  # [B, kernel, kernel, inputs, outputs]
                view = view.permute(0, 4, 3, 1, 2)
            yield parameter, view


def _as_c(value: Tensor | int | float | None) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_double(value) if isinstance(value, float) else None if value is None else ctypes.c_int64(value)
