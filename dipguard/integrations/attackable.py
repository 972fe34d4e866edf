"""A defended classifier that attack libraries accept (foolbox, torchattacks), with BPDA's gradient."""

from __future__ import annotations

from torch import Tensor, nn

from dipguard.attacks.defense_aware import Purifies
from dipguard.attacks.gradients import Unsaturated
from dipguard.attacks.straight_through import straight_through
from dipguard.classifier import check_is_module, eval_mode
from dipguard.integrations.input_purifier import InputPurifier


class BPDAClassifier(Unsaturated):
    """``classifier(defense.purify(images))``, whose gradient by the given image is that by the purified one.

    That is the backward pass differentiable approximation by the identity (Athalye et al. 2018); where the defence
    changes the resolution, the gradient comes back by the adjoint of a bilinear resize. Where the classifier is so sure
    that cross-entropy's gradient has underflowed, it is given the direction of its limit: a confident classifier must
    not look like a robust one. Give it to foolbox as ``PyTorchModel(model, bounds=(0, 1), device=...)``, and to an
    attack of torchattacks as its model. The classifier answers in eval mode, and keeps its own modes.

    Accuracy under this attack alone proves little: an attacker who knows the defence can do better
    (`dipguard.attacks.DEFENSE_AWARE` offers expectation over draws, and attacks that ask for decisions only).

    Args:
        classifier: Takes images [N, 3, H, W] in [0, 1], returns logits [N, C]; normalisation belongs inside.
        defense: Has ``purify(images, *, indices)``.
        draws: How a random defence draws (:class:`~dipguard.integrations.indices.IndexRule`). ``content``: the same
            image, the same answer; a step of an attack makes another image, with draws of its own. ``position``: an
            image keeps the draws of its place in the batch all along, the strongest attack; only for attacks that
            never leave images out of a batch. ``fresh``: new draws at each look.

    Raises:
        TypeError, ValueError: A bad argument; the message names it.
    """

    def __init__(self, classifier: nn.Module, defense: Purifies, *, draws: str = "content") -> None:
        super().__init__(check_is_module(classifier, name="classifier"))
        self.purifier = InputPurifier(defense, draws=draws)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, C] on the purified images [N, 3, H, W].

        Raises:
            TypeError, ValueError: The images are none, or not in [0, 1].
        """
        purified = self.purifier(images)
        with eval_mode(self.victim):
            return super().forward(straight_through(images, purified))

    def train(self, mode: bool = True) -> BPDAClassifier:
        """Switch this module alone: attack libraries switch what they are given, and some forget to switch back."""
        self.training = mode
        return self
