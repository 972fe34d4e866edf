"""The victim as the callbacks use it: in eval mode, without gradients, and left as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dipguard.checks import check_int
from dipguard.classifier import check_is_module, check_logits, eval_mode
from dipguard.fit.memory import is_out_of_memory

GOOD_BATCH = 64
"""Above so many images, a larger batch is no faster per image (ResNet-56 on two cores: 12 ms alone, 3.5 ms in 64)."""


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
