"""Use any classifier without changing it: its modes, its device, its checked output, its logits for many images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from threading import Lock
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from dipguard.checks import check_int, check_not_forked
from dipguard.precision import full_precision

GOOD_BATCH = 64
"""Above so many images, a larger batch is no faster per image (ResNet-56 on two cores: 12 ms alone, 3.5 ms in 64)."""
MOST_IMAGES, MOST_PIXELS = 512, 64 * 224 * 224
"""Of a batch that a victim is asked about: images, or pixels if that is less."""
OUT_OF_MEMORY = (
    "DefaultCPUAllocator", "could not create a primitive", "not enough memory", "Cannot allocate memory",
    "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "_ALLOCATION_FAILED",
    "unable to find an engine to execute", "Unable to find a valid cuDNN algorithm",
)  # fmt: skip
"""What errors of other types than torch.OutOfMemoryError say. The last two are torch's where no memory is left for the
workspace of any of cuDNN's algorithms."""


_CONTIGUOUS_ONLY: WeakSet[nn.Module] = WeakSet()
"""Classifiers that have failed on channels-last images."""
_LOCK = Lock()
_HELD: dict[tuple[int, str], tuple[int, bool]] = {}
"""(Id of a module or parameter, flag) -> number of holders, value before the first one."""


@contextmanager
def _held_false(items: Iterable[nn.Module | nn.Parameter], flag: str) -> Iterator[None]:
    """Set a flag of each item to False; of several holders, such as threads, the last one restores it."""
    with _LOCK:
        before = [(item, getattr(item, flag)) for item in items]
        for item, value in before:
            count, first = _HELD.get((id(item), flag), (0, value))
            _HELD[id(item), flag] = (count + 1, first)
            setattr(item, flag, False)
    try:
        yield
    finally:
        with _LOCK:
            for item, _ in before:
                count, first = _HELD.pop((id(item), flag))
                if count > 1:
                    _HELD[id(item), flag] = (count - 1, first)
                else:
                    setattr(item, flag, first)


def input_size(classifier: nn.Module) -> tuple[int, int] | None:
    """Height and width of the images that a classifier says it reads, by an attribute ``size`` of two ints."""
    size: Any = getattr(classifier, "size", None)
    plain = isinstance(size, (tuple, list)) and len(size) == 2 and all(type(side) is int for side in size)
    return (size[0], size[1]) if plain else None


def class_names(classifier: nn.Module) -> tuple[str, ...]:
    """The class names that a classifier has as an attribute ``classes``; empty if there is none, or no strings."""
    names: Any = getattr(classifier, "classes", ())
    plain = isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names)
    return tuple(names) if plain else ()


@contextmanager
def eval_mode(classifier: nn.Module) -> Iterator[nn.Module]:
    """Put a classifier in eval mode, and restore the mode of every submodule (of frozen BatchNorms too) afterwards."""
    # Frozen TorchScript has no such flag, and eval() of what torch.export made raises an error.
    with _held_false((part for part in classifier.modules() if hasattr(part, "training")), "training"):
        yield classifier


@contextmanager
def frozen(classifier: nn.Module) -> Iterator[nn.Module]:
    """Put a classifier in eval mode without parameter gradients; restore modes and flags afterwards."""
    with eval_mode(classifier), _held_false(classifier.parameters(), "requires_grad"):
        yield classifier


def reference_of(classifier: nn.Module, default: Tensor) -> Tensor:
    """Return the first floating-point parameter or buffer, whose device and dtype a classifier's images must have."""
    tensors = chain(classifier.parameters(), classifier.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), default)


def device_of(classifier: nn.Module, default: torch.device | None = None) -> torch.device:
    """Return a classifier's device; ``default`` (or the CPU) if it has no floating-point parameters or buffers."""
    return reference_of(classifier, torch.empty(0, device=default or "cpu")).device


def asked(classifier: nn.Module, images: Tensor) -> Any:
    """Return a classifier's output for images, which it gets on its own device, in its own dtype; differentiable.

    It gets a copy, which it may change in place.
    """
    reference = reference_of(classifier, images)
    images = images.to(device=reference.device, dtype=reference.dtype)
    if reference.device.type != "cpu" or classifier in _CONTIGUOUS_ONLY:
        return classifier(images.clone(memory_format=torch.contiguous_format))
    # On a CPU convolutions are a sixth to a half faster on channels-last images; some victims cannot take them.
    laid = images.clone(memory_format=torch.channels_last)
    if laid.requires_grad:
        laid.register_hook(Tensor.contiguous)  # attacks .view() the gradient, which must lie as their images do
    try:
        return classifier(laid)
    except RuntimeError as error:  # such as .view() of a feature map; any other error comes again
        if is_out_of_memory(error):
            raise
        output = classifier(images.clone(memory_format=torch.contiguous_format))
    _CONTIGUOUS_ONLY.add(classifier)
    return output


def logits_of(classifier: nn.Module, images: Tensor) -> Tensor:
    """Return checked logits [n, C], float32 at least, on the device of ``images`` [n, 3, H, W]; differentiable."""
    return check_logits(asked(classifier, images), images).clone()  # some write each output to the same place


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


def check_logits(output: Any, images: Tensor, *, name: str = "victim") -> Tensor:
    """Return a classifier's output for n images, float32 at least, on their device.

    TypeError or ValueError if it is not finite floats [n, C] with C >= 2.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"`{name}` must return a floating-point tensor [B, C] of logits, got {kind}")
    if output.ndim != 2 or len(output) != len(images) or output.shape[1] < 2:
        got = f"shape {tuple(output.shape)} for {len(images)} images"
        raise ValueError(f"`{name}` must return logits [B, C] with C of at least 2, got {got}")
    if not bool(output.isfinite().all()):
        raise ValueError(f"`{name}` must return finite logits, got NaN or infinite values")
    return output.to(images.device, torch.promote_types(output.dtype, torch.float32))


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
    """Images to logits, at most ``batch`` at a time. The victim stays on its device and is not changed.

    Without ``batch``, at most 512 images, and at most the pixels of 64 images of 224x224. If memory runs out, batches
    are halved, down to one image.
    """

    def __init__(self, victim: nn.Module, *, batch: int | None = None) -> None:
        self.victim = check_is_module(victim)
        self._batch = None if batch is None else check_int(batch, name="batch", low=1)

    def batch(self, height: int, width: int) -> int:
        """How many images of this size are asked about at once."""
        return self._batch or max(1, min(MOST_IMAGES, MOST_PIXELS // (height * width)))

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [n, C] of ``images`` [n, 3, H, W] in [0, 1], float32 at least, on the images' device.

        TypeError or ValueError if the victim returns anything else, RuntimeError in a forked process that would hang.
        """
        check_not_forked()
        # A decision depends neither on the caller's autocast nor on TF32; the fit's are made without.
        full = full_precision(device_of(self.victim, images.device))
        with torch.inference_mode(False), torch.no_grad(), full, eval_mode(self.victim):
            chunks = images.detach().split(self.batch(*images.shape[-2:]))
            return torch.cat([self._logits_of(chunk) for chunk in chunks])

    def _logits_of(self, images: Tensor) -> Tensor:
        try:
            return logits_of(self.victim, images)
        except RuntimeError as error:
            if len(images) == 1 or not is_out_of_memory(error):
                raise
        halves = images.tensor_split(2)
        self._batch = len(halves[0])  # from now on
        return torch.cat([self._logits_of(half) for half in halves])

    def gradient(self, images: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [n] of the classes ``wanted``, int64 [n], for images [n, 3, H, W] in [0, 1], all at once.

        Also their gradients with respect to the images. RuntimeError or TypeError if the victim is not differentiable.
        """
        check_not_forked()
        full = full_precision(device_of(self.victim, images.device))
        with torch.inference_mode(False), torch.enable_grad(), full, eval_mode(self.victim):
            x, at = images.detach().clone().requires_grad_(), wanted.to(images.device).clone()
            likely = logits_of(self.victim, x).log_softmax(dim=1).gather(1, at[:, None]).squeeze(1)
            (gradients,) = torch.autograd.grad(likely.sum(), x)
        return likely.detach(), gradients


def steps_together(images: int) -> int:
    """How many steps of a stack of so many images make a good batch."""
    return -(-GOOD_BATCH // images)


def ask_together(decide: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """Logits of several steps' images, [n_i, 3, H, W] each, in one batch."""
    return list(decide(torch.cat(list(parts))).split([len(part) for part in parts]))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
