"""Use any classifier without changing it: its modes, its device, its checked output, its logits for many images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dipguard.checks import check_int

GOOD_BATCH = 64
"""Above so many images, a larger batch is no faster per image (ResNet-56 on two cores: 12 ms alone, 3.5 ms in 64)."""
OUT_OF_MEMORY = (
    "DefaultCPUAllocator",  # torch's on a CPU
    "could not create a primitive",  # oneDNN's convolutions
    "not enough memory",
    "Cannot allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What errors of other types than torch.OutOfMemoryError say."""


@contextmanager
def eval_mode(classifier: nn.Module) -> Iterator[nn.Module]:
    """Put a classifier in eval mode, and restore the mode of every submodule (of frozen BatchNorms too) afterwards."""
    # Flag by flag: frozen TorchScript has none, and eval() of what torch.export made raises an error.
    modes = [(part, part.training) for part in classifier.modules() if hasattr(part, "training")]
    for part, _ in modes:
        part.training = False
    try:
        yield classifier
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def frozen(classifier: nn.Module) -> Iterator[nn.Module]:
    """Put a classifier in eval mode without parameter gradients; restore modes and flags afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in classifier.parameters()]
    with eval_mode(classifier):
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield classifier
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def device_of(classifier: nn.Module, default: torch.device | None = None) -> torch.device:
    """Return the device of the first parameter or buffer; ``default`` (or the CPU) if there is none."""
    for tensor in chain(classifier.parameters(), classifier.buffers()):
        return tensor.device
    return default or torch.device("cpu")


def check_is_module(classifier: Any, *, name: str = "victim") -> nn.Module:
    """Return ``classifier``; TypeError if it is not a module, ValueError if it was exported for one size of batch."""
    if not isinstance(classifier, nn.Module):
        hint = "; take its .module()" if isinstance(classifier, torch.export.ExportedProgram) else ""
        raise TypeError(f"`{name}` must be a torch.nn.Module, got {type(classifier).__name__}{hint}")
    exported = [part for part in classifier.modules() if isinstance(part, torch.fx.GraphModule)]
    for node in [node for part in exported for node in part.graph.nodes if node.op == "placeholder"]:
        shape: Any = getattr(node.meta.get("val"), "shape", ())
        if len(shape) == 4 and isinstance(shape[0], int):
            raise ValueError(
                f"`{name}` must take any number of images, but it was exported for batches of {shape[0]}: give "
                "torch.export.export the argument dynamic_shapes"
            )
    return classifier


def check_logits(output: Any, *, count: int, name: str = "victim") -> Tensor:
    """Return a classifier's output if it has the type and shape of logits for ``count`` images.

    Raises:
        TypeError: It is not a floating-point tensor.
        ValueError: Its shape is not [count, C] with C >= 2.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"`{name}` must return a floating-point tensor [B, C] of logits, got {kind}")
    if output.ndim != 2 or len(output) != count or output.shape[1] < 2:
        raise ValueError(
            f"`{name}` must return logits [B, C] with C of at least 2, got shape {tuple(output.shape)} for {count} "
            "images"
        )
    return output


def probability_warning(logits: Tensor, *, name: str = "victim") -> str | None:
    """Return a warning text if the rows look like probabilities (in [0, 1], each summing to 1), else None."""
    low, high = torch.aminmax(logits)
    if low < 0 or high > 1 or bool(((logits.sum(dim=1) - 1).abs() >= 1e-3).any()):
        return None
    return (
        f"`{name}` must return logits, but its outputs lie in [0, 1] and sum to 1, as probabilities do: attacks would "
        "be weaker than they should be, and Eq. 5 would compare something else; drop the softmax"
    )


class Decider:
    """Images to logits. The victim stays on its device and is not changed.

    Args:
        victim: Takes [n, 3, H, W] in [0, 1], returns logits [n, C].
        batch: Largest batch, at least 1.

    Raises:
        TypeError, ValueError: An argument is out of range.
    """

    def __init__(self, victim: nn.Module, *, batch: int = 512) -> None:
        self.victim = check_is_module(victim)
        self.batch = check_int(batch, name="batch", low=1)
        self._channels_last = True

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [n, C] of ``images``, float32 at least, on the images' device.

        Raises:
            TypeError, ValueError: The victim returns something other than logits [n, C].
        """
        with torch.inference_mode(False), torch.no_grad(), eval_mode(self.victim):
            parts = [self._logits(chunk) for chunk in images.detach().split(self.batch)]
        return torch.cat(parts)

    def _logits(self, images: Tensor) -> Tensor:
        reference = next((p for p in self.victim.parameters() if p.is_floating_point()), images)
        output = self._output(images.to(device=reference.device, dtype=reference.dtype))
        logits = check_logits(output, count=len(images)).to(images.device)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _output(self, images: Tensor) -> Any:
        """On a CPU, convolutions are a sixth faster on channels-last images, which some victims cannot take."""
        if images.device.type == "cpu" and self._channels_last:
            try:
                return self.victim(images.contiguous(memory_format=torch.channels_last))
            except RuntimeError:  # such as .view() of a feature map; other errors come again below
                self._channels_last = False
        return self.victim(images.contiguous())


def steps_together(images: int) -> int:
    """How many steps of a stack of so many images make a good batch."""
    return -(-GOOD_BATCH // images)


def ask_together(decide: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """Logits of several steps' images, [n_i, 3, H, W] each: in one batch or, if memory runs out, one by one."""
    try:
        return list(decide(torch.cat(list(parts))).split([len(part) for part in parts]))
    except RuntimeError as error:
        if len(parts) == 1 or not is_out_of_memory(error):
            raise
    return [decide(part) for part in parts]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
