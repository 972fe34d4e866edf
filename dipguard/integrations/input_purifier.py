"""A defence in the middle of somebody else's program: nothing of the program reaches it, nothing of it stays behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

from dipguard.attacks.defense_aware import Purifies, check_defense
from dipguard.checks import check_choice
from dipguard.integrations.indices import DRAWS, IndexRule
from dipguard.integrations.pixels import Pixels


class InputPurifier:
    """Purifies a classifier's input as it comes: of any float type, normalised or not, in any mode of torch.

    Autocast, the default dtype, inference mode and the gradient mode of the caller end here; random states are put
    back. It is no module, and the defence in it is nobody's child: no state dict, mode or device switch meets it.

    Args:
        defense: Has ``purify(images, *, indices)``: a :class:`~dipguard.DIPGuard` or any row of
            `dipguard.defenses.DEFENSES`.
        mean: Those that the input is normalised with; see :class:`~dipguard.integrations.pixels.Pixels`.
        std: The same.
        draws: Which index an image has that comes without one
            (:class:`~dipguard.integrations.indices.IndexRule`).
        quiet: Show no progress bar of the defence.

    Raises:
        TypeError, ValueError: A bad argument; the message names it.
    """

    def __init__(
        self,
        defense: Purifies,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        draws: str = "content",
        quiet: bool = False,
    ) -> None:
        self.defense: Any = check_defense(defense)
        self.pixels = Pixels(mean, std)
        self.index_rule = IndexRule(check_choice(draws, DRAWS, name="draws"))
        self.quiet = quiet

    def __call__(self, images: Tensor, *, indices: Tensor | None = None) -> Tensor:
        """Return purified images of the images' dtype and device, detached; [N, 3, H, W], or as the defence resizes.

        Args:
            images: Float [N, 3, H, W] as the classifier takes them.
            indices: Int [N], positions in the whole data set; by default, see ``draws``.

        Raises:
            TypeError, ValueError: Bad images or indices.
        """
        with torch.inference_mode(False), torch.no_grad(), apart(images), isolate_rng():
            pixels = self.pixels.restore(images)
            order = self.index_rule(pixels) if indices is None else indices.detach().cpu().clone()
            with silenced(self.defense) if self.quiet else nullcontext():
                purified: Tensor = self.defense.purify(pixels, indices=order)
            return self.pixels.normalise(purified).to(images)


@contextmanager
def apart(images: Any) -> Iterator[None]:
    """No autocast, and float32 as default dtype: what Lightning's precision settings change around a step."""
    kinds = {"cpu", images.device.type if isinstance(images, Tensor) else "cpu"}
    default = torch.get_default_dtype()
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_default_dtype, default)
        yield


@contextmanager
def silenced(defense: Any) -> Iterator[None]:
    """Switch a defence's own progress bar off, and on again: a Trainer has a bar of its own."""
    parts: list[Any] = [defense, getattr(defense, "guard", None)]
    bars = [part for part in parts if getattr(part, "progress", False) is True]
    for part in bars:
        part.progress = False
    try:
        yield
    finally:
        for part in bars:
            part.progress = True
