"""Any classifier behind a defence, as one module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dipguard.attacks.defense_aware import Purifies
from dipguard.classifier import check_is_module
from dipguard.integrations.input_purifier import InputPurifier


class DefendedClassifier(nn.Module):
    """``classifier(defense.purify(images))``.

    Its parameters are the classifier's; the defence is no part of the module, so that nothing of it stands in a state
    dict. Purified images have no gradient towards the given ones: for attacks take
    :class:`~dipguard.integrations.attackable.BPDAClassifier`.

    Args:
        classifier: Takes images [N, 3, H, W], returns logits [N, C], or whatever else.
        defense: Has ``purify(images, *, indices)``.
        mean: Those that the classifier's input is normalised with, three numbers; None for input in [0, 1].
        std: The same.
        draws: ``content`` (an image's pixels settle its draws), ``position`` (its place in the batch does) or ``fresh``
            (:class:`~dipguard.integrations.indices.IndexRule`), where no indices are given.

    Raises:
        TypeError, ValueError: A bad argument; the message names it.
    """

    def __init__(
        self,
        classifier: nn.Module,
        defense: Purifies,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        draws: str = "content",
    ) -> None:
        super().__init__()
        self.classifier = check_is_module(classifier, name="classifier")
        self.purifier = InputPurifier(defense, mean=mean, std=std, draws=draws)

    def forward(self, images: Tensor, *, indices: Tensor | None = None) -> Tensor:
        """Return the classifier's output on the purified images.

        Args:
            images: Float [N, 3, H, W], in [0, 1] or normalised with ``mean`` and ``std``.
            indices: Int [N], the images' positions in the whole data set.

        Raises:
            TypeError, ValueError: Bad images or indices.
        """
        output: Tensor = self.classifier(self.purifier(images, indices=indices))
        return output
