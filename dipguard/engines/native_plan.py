"""The fit step of one image as a short program over frames in a workspace, for the native engine.

A frame is a tensor of the network, [rows][columns][channels] with room for a border; channels are padded to a multiple
of 4 with zeros. Backward passes work in place: a frame that held an activation then holds its gradient, so that an
image's whole step fits a core's cache (1 MB for the medium network at 32x32).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from dipguard.networks.layers import padding_mode, same_padding
from dipguard.networks.presets import NetworkSpec

MOST_KERNEL = 11  # MOST_TAPS of convolution.h
ALIGN = 16  # numbers: 64 bytes of float32


class UnsupportedError(ValueError):
    """The native engine cannot run this network; the message says what it cannot do."""


class Border(IntEnum):
    """As in frame.h."""

    NONE = 0
    ZEROS = 1
    REFLECT = 2
    REPLICATE = 3


class Operation(IntEnum):
    """As in step.cpp."""

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
    """A tensor's place in the workspace; the fields are those of frame.h, in numbers and pixels."""

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
    """One operation; the fields are those of step.cpp, frames by number."""

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
    """Where a parameter of one network lies in its row of the flat parameter, in the order of the network's modules.

    ``shape`` is the stored one: [kernel][kernel][inputs][padded outputs] for weights of a convolution, else [padded].
    """

    offset: int
    shape: tuple[int, ...]
    outputs: int


class Layer(NamedTuple):
    """A convolution or normalisation: slots of weight and bias."""

    weight: Slot
    bias: Slot


class Block(NamedTuple):
    """Convolution, normalisation, LeakyReLU: what its backward pass needs."""

    convolution: Instruction
    normalisation: Instruction


def padded(channels: int) -> int:
    """Up to a multiple of 4."""
    return -(-channels // 4) * 4


@dataclass
class Plan:
    """A network's program for images of one size.

    Attributes:
        frames: Tensors in the workspace.
        program: Forward, then backward.
        layers: By the module's name in :class:`~dipguard.networks.StackedSkipNet`.
        parameters: Numbers in one network's row of the flat parameter.
        room: Numbers in the workspace of one image.
    """

    spec: NetworkSpec
    padding: str
    frames: list[Frame] = field(default_factory=list)
    program: list[Instruction] = field(default_factory=list)
    layers: dict[str, Layer] = field(default_factory=dict)
    parameters: int = 0
    room: int = 0

    def reserve(self, count: int) -> int:
        """Room in the workspace; returns its offset."""
        offset = self.room
        self.room += -(-count // ALIGN) * ALIGN
        return offset

    def slot(self, *shape: int, outputs: int) -> Slot:
        """Room in the flat parameter."""
        offset, count = self.parameters, 1
        for size in shape:
            count *= size
        self.parameters += -(-count // ALIGN) * ALIGN
        return Slot(offset, shape, outputs)

    def add(self, frame: Frame) -> int:
        """The frame's number."""
        self.frames.append(frame)
        return len(self.frames) - 1

    def activation(self, height: int, width: int, channels: int, *, kernels: tuple[int, ...] = ()) -> int:
        """A frame with the border that convolutions of these kernels read."""
        borders = {padding_mode(self.padding, kernel=k, side=min(height, width)) for k in kernels if k > 1}
        if len(borders) > 1:
            raise UnsupportedError(f"kernels {kernels} on {height}x{width} pixels need borders of different kinds")
        before, after = (max((same_padding(k)[side] for k in kernels), default=0) for side in (0, 1))
        names = {"constant": Border.ZEROS, "reflect": Border.REFLECT, "replicate": Border.REPLICATE}
        border = names[borders.pop()] if borders else Border.NONE
        return self._frame(height, width, channels, before, after, before, after, border)

    def raw(self, height: int, width: int, channels: int, *, kernel: int) -> int:
        """A convolution's output; zeros beside it serve its gradient."""
        return self._frame(height, width, channels, 0, 0, kernel - 1, kernel - 1, Border.NONE)

    def joined(self, height: int, width: int, skips: int, channels: int) -> int:
        """Skip channels, then the upsampled ones."""
        lanes = padded(skips + padded(channels))
        offset = self.reserve(height * width * lanes)
        return self.add(Frame(offset, height, width, skips + channels, lanes, lanes, width * lanes))

    def part(self, whole: int, channels: int) -> int:
        """The first channels of a frame, as a frame."""
        return self.add(self.frames[whole]._replace(channels=channels, padded=padded(channels)))

    def _frame(
        self, height: int, width: int, channels: int, top: int, bottom: int, left: int, right: int, border: int
    ) -> int:
        lanes = padded(channels)
        row = (width + left + right) * lanes
        offset = self.reserve((height + top + bottom) * row)
        return self.add(
            Frame(offset, height, width, channels, lanes, lanes, row, top, left, bottom, right, int(border))
        )
