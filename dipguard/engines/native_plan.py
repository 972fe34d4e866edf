"""The fit step of one image as a short program over frames in a workspace, for the native engine.

A frame is a tensor of the network, [rows][columns][channels] with room for a border; channels are padded with zeros to
a multiple of 4. Backward passes work in place: a frame that held an activation then holds its gradient, so that the
whole step of an image fits into a core's cache (1 MB for the medium network at 32x32).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from dipguard.networks.presets import NetworkSpec
from dipguard.networks.unet import padding_mode, same_padding

MOST_KERNEL = 11  # MOST_TAPS of convolution.h
ALIGN = 16  # numbers: 64 bytes of float32


class UnsupportedError(ValueError):
    """The native engine cannot run this network here; the message says why."""


class Border(IntEnum):
    """How a frame's border is filled; the numbers of frame.h."""

    NONE = 0
    ZEROS = 1
    REFLECT = 2
    REPLICATE = 3


BORDERS = {"constant": Border.ZEROS, "reflect": Border.REFLECT, "replicate": Border.REPLICATE}


class Operation(IntEnum):
    """What an instruction does; the numbers of step.cpp."""

    READ_Z = 0
    CONVOLVE = 1
    NORMALISE = 2
    UPSAMPLE = 3
    LOSS = 4
    NORMALISE_BACK = 5
    WEIGHT_GRADIENT = 6
    BIAS_GRADIENT = 7
    NO_BIAS_GRADIENT = 8
    CLEAR = 9
    CONVOLVE_BACK = 10
    FOLD_BORDER = 11
    UPSAMPLE_BACK = 12
    WRITE_Z_GRADIENT = 13


class Frame(NamedTuple):
    """A tensor's place in the workspace; the fields of frame.h, counted in numbers and pixels."""

    offset: int
    height: int
    width: int
    channels: int
    padded: int
    pixel: int
    row: int
    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0
    border: int = Border.NONE


class Instruction(NamedTuple):
    """One operation; the fields of step.cpp, frames by their position in the plan."""

    operation: int
    source: int = 0
    target: int = 0
    weight: int = 0
    bias: int = 0
    kernel: int = 1
    stride: int = 1
    pad: int = 0
    statistics: int = 0
    first: int = 0
    leaky: int = 0
    room: int = 0


class Slot(NamedTuple):
    """Where a parameter of one network lies in its row of the flat parameter."""

    offset: int
    shape: tuple[int, ...]  # [kernel, kernel, inputs, padded outputs] for the weights of a convolution, else [padded]
    outputs: int  # without padding


def padded(channels: int) -> int:
    """Channels rounded up to a multiple of 4."""
    return -(-channels // 4) * 4


@dataclass
class Plan:
    """A network's program for images of one size."""

    spec: NetworkSpec
    padding: str
    frames: list[Frame] = field(default_factory=list)  # tensors in the workspace
    program: list[Instruction] = field(default_factory=list)  # forward, then backward
    layers: dict[str, tuple[Slot, Slot]] = field(default_factory=dict)  # weight and bias, by the module's name
    parameters: int = 0  # numbers in one network's row of the flat parameter
    room: int = 0  # numbers in one image's workspace

    def reserve(self, count: int) -> int:
        """Reserve numbers in the workspace; returns their offset."""
        offset = self.room
        self.room += -(-count // ALIGN) * ALIGN
        return offset

    def slot(self, *shape: int, outputs: int) -> Slot:
        """Reserve a parameter in the flat one."""
        offset = self.parameters
        self.parameters += -(-math.prod(shape) // ALIGN) * ALIGN
        return Slot(offset, shape, outputs)

    def frame(
        self, height: int, width: int, channels: int, *,
        rows: tuple[int, int] = (0, 0), columns: tuple[int, int] = (0, 0), border: Border = Border.NONE,
    ) -> int:  # fmt: skip
        """Add a frame with room before and after its rows and columns; returns its position."""
        lanes = padded(channels)
        row = (width + sum(columns)) * lanes
        offset = self.reserve((height + sum(rows)) * row)
        sides = (rows[0], columns[0], rows[1], columns[1], border)
        self.frames.append(Frame(offset, height, width, channels, lanes, lanes, row, *sides))
        return len(self.frames) - 1

    def activation(self, height: int, width: int, channels: int, *, kernels: tuple[int, ...] = ()) -> int:
        """Add a frame with the border that convolutions of these kernels read."""
        borders = {BORDERS[padding_mode(self.padding, kernel=k, side=min(height, width))] for k in kernels if k > 1}
        if len(borders) > 1:
            raise UnsupportedError(f"kernels {kernels} on {height}x{width} pixels need borders of different kinds")
        before, after = (max((same_padding(k)[side] for k in kernels), default=0) for side in (0, 1))
        border, room = borders.pop() if borders else Border.NONE, (before, after)
        return self.frame(height, width, channels, rows=room, columns=room, border=border)

    def joined(self, height: int, width: int, skips: int, channels: int) -> int:
        """Add a frame for the skip channels followed by the upsampled ones."""
        lanes = padded(skips + padded(channels))
        whole = self.frame(height, width, lanes)
        self.frames[whole] = self.frames[whole]._replace(channels=skips + channels)
        return whole

    def part(self, whole: int, channels: int) -> int:
        """Add a frame for the first channels of another one."""
        self.frames.append(self.frames[whole]._replace(channels=channels, padded=padded(channels)))
        return len(self.frames) - 1


def make_plan(spec: NetworkSpec, *, padding: str, height: int, width: int, z_gradient: bool = False) -> Plan:
    """The program of a network for images [3, height, width], optionally with the gradient with respect to z.

    UnsupportedError if the native engine cannot run this network.
    """
    if max(*spec.k_d, *spec.k_u, *spec.k_s) > MOST_KERNEL:
        raise UnsupportedError(f"kernels are at most {MOST_KERNEL}x{MOST_KERNEL}")
    if spec.upsample != "bilinear":
        raise UnsupportedError(f"upsampling is bilinear, got {spec.upsample!r}")
    plan = Plan(spec, padding)
    z = plan.activation(height, width, spec.input_depth, kernels=_readers(spec, 0))
    plan.program.append(Instruction(Operation.READ_Z, target=z))
    top, backward, readers = _scale(plan, 0, z, name="body")
    head = _convolution(plan, "head", top, 3, kernel=1)
    plan.program += [
        head,
        Instruction(Operation.LOSS, source=head.target),
        head._replace(operation=Operation.WEIGHT_GRADIENT),
        head._replace(operation=Operation.BIAS_GRADIENT),
        *_input_gradient(top, head),
        *backward,
    ]
    if z_gradient:
        plan.program += [*_input_gradient(z, *readers), Instruction(Operation.WRITE_Z_GRADIENT, source=z)]
    _share_room(plan)
    return plan


def _readers(spec: NetworkSpec, level: int) -> tuple[int, ...]:
    """Kernel sizes of the convolutions that read a scale's input."""
    return (spec.k_d[level], spec.k_s[level]) if spec.n_s[level] else (spec.k_d[level],)


def _convolution(plan: Plan, name: str, source: int, outputs: int, *, kernel: int, stride: int = 1) -> Instruction:
    frame = plan.frames[source]
    # Its gradient needs zeros on both sides.
    height, width, zeros = -(-frame.height // stride), -(-frame.width // stride), (kernel - 1, kernel - 1)
    target = plan.frame(height, width, outputs, columns=zeros)
    lanes = plan.frames[target].padded
    weight = plan.slot(kernel, kernel, frame.channels, lanes, outputs=outputs)
    bias = plan.slot(lanes, outputs=outputs)
    plan.layers[name] = (weight, bias)
    pad = same_padding(kernel)[0]
    return Instruction(Operation.CONVOLVE, source, target, weight.offset, bias.offset, kernel, stride, pad)


def _normalisation(plan: Plan, name: str, source: int, target: int, *, leaky: bool) -> Instruction:
    frame = plan.frames[source]
    weight, bias = (plan.slot(frame.padded, outputs=frame.channels) for _ in range(2))
    plan.layers[name] = (weight, bias)
    places = {"weight": weight.offset, "bias": bias.offset, "statistics": plan.reserve(2 * frame.padded)}
    return Instruction(Operation.NORMALISE, source, target, leaky=int(leaky), **places)


def _block(
    plan: Plan,
    name: str,
    source: int,
    outputs: int,
    *,
    kernel: int,
    stride: int = 1,
    target: int | None = None,
    readers: tuple[int, ...] = (),
) -> tuple[Instruction, Instruction]:
    """Append convolution, normalisation and LeakyReLU to the program; returns the first two."""
    convolution = _convolution(plan, f"{name}.conv", source, outputs, kernel=kernel, stride=stride)
    raw = plan.frames[convolution.target]
    if target is None:
        target = plan.activation(raw.height, raw.width, outputs, kernels=readers)
    normalisation = _normalisation(plan, f"{name}.norm", convolution.target, target, leaky=True)
    plan.program += [convolution, normalisation]
    return convolution, normalisation


def _parameter_gradients(convolution: Instruction, normalisation: Instruction) -> list[Instruction]:
    return [
        normalisation._replace(operation=Operation.NORMALISE_BACK),
        convolution._replace(operation=Operation.WEIGHT_GRADIENT),
        convolution._replace(operation=Operation.NO_BIAS_GRADIENT),
    ]


def _input_gradient(source: int, *convolutions: Instruction) -> list[Instruction]:
    """The gradient of a frame that these convolutions read, in place: its activation is not needed any more."""
    return [
        Instruction(Operation.CLEAR, source=source),
        *(convolution._replace(operation=Operation.CONVOLVE_BACK) for convolution in convolutions),
        Instruction(Operation.FOLD_BORDER, source=source),
    ]


def _back(convolution: Instruction, normalisation: Instruction) -> list[Instruction]:
    return _parameter_gradients(convolution, normalisation) + _input_gradient(convolution.source, convolution)


def _scale(plan: Plan, level: int, source: int, *, name: str) -> tuple[int, list[Instruction], list[Instruction]]:
    """Append a scale's forward pass; returns its output's frame, its backward pass and the convolutions on ``source``.

    The backward pass starts from the gradient in the output's frame. It leaves out the gradient with respect to
    ``source``, which the returned convolutions give (`_input_gradient`).
    """
    spec = plan.spec
    n_d, n_u, n_s = spec.n_d[level], spec.n_u[level], spec.n_s[level]
    k_d, k_u, k_s = spec.k_d[level], spec.k_u[level], spec.k_s[level]
    deeper = level + 1 < spec.scales
    frame = plan.frames[source]
    below_channels = spec.n_u[level + 1] if deeper else n_d
    joined = plan.joined(frame.height, frame.width, n_s, below_channels)
    skip = [_block(plan, f"{name}.skip", source, n_s, kernel=k_s, target=plan.part(joined, n_s))] if n_s else []
    down0 = _block(plan, f"{name}.down.0", source, n_d, kernel=k_d, stride=2, readers=(k_d,))
    below = _readers(spec, level + 1) if deeper else ()
    down1 = _block(plan, f"{name}.down.1", down0[1].target, n_d, kernel=k_d, readers=below)
    low = down1[1].target
    backward: list[Instruction] = []
    if deeper:
        low, backward, deeper_readers = _scale(plan, level + 1, low, name=f"{name}.deeper")
        backward += _input_gradient(down1[1].target, *deeper_readers)
    upsample = Instruction(Operation.UPSAMPLE, low, joined, first=n_s)
    normal = plan.activation(frame.height, frame.width, plan.frames[joined].channels, kernels=(k_u,))
    if plan.frames[normal].padded != plan.frames[joined].padded:
        name = "n_u" if deeper else "n_d"
        raise UnsupportedError(f"{name} must be a multiple of 4 below a scale with skips, got {below_channels}")
    norm = _normalisation(plan, f"{name}.norm", joined, normal, leaky=False)
    plan.program += [upsample, norm]
    up0 = _block(plan, f"{name}.up.0", normal, n_u, kernel=k_u, readers=(1,))
    up1 = _block(plan, f"{name}.up.1", up0[1].target, n_u, kernel=1)
    steps = [
        *_back(*up1),
        *_back(*up0),
        norm._replace(operation=Operation.NORMALISE_BACK),
        *(step for block in skip for step in _parameter_gradients(*block)),
        upsample._replace(operation=Operation.UPSAMPLE_BACK),
        *backward,
        *_back(*down1),
        *_parameter_gradients(*down0),
    ]
    return up1[1].target, steps, [block[0] for block in (*skip, down0)]


def _share_room(plan: Plan) -> None:
    """Give all operations one scratch area: each uses it only while it runs."""
    needs: dict[int, int] = {}
    for position, op in enumerate(plan.program):
        source, target = plan.frames[op.source], plan.frames[op.target]
        if op.operation == Operation.CONVOLVE_BACK:
            needs[position] = op.kernel**2 * target.channels * source.padded
        elif op.operation in (Operation.NORMALISE, Operation.NORMALISE_BACK):
            needs[position] = 2 * source.height * source.padded
    room = plan.reserve(max(needs.values()))
    plan.program = [op._replace(room=room) if n in needs else op for n, op in enumerate(plan.program)]
