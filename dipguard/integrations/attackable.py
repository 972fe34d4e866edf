"""A defended classifier that attack libraries accept (foolbox, torchattacks), with BPDA's gradient."""

from __future__ import annotations

from torch import Tensor, nn

from dipguard.attacks.backward import straight_through
from dipguard.attacks.libraries import Unsaturated
from dipguard.attacks.target import Purifies
from dipguard.classifier import check_is_module, eval_mode
from dipguard.integrations.inputs import InputPurifier


class BPDAClassifier(Unsaturated):
    """``classifier(defense.purify(images))``, with the gradient of BPDA by the identity.

    The gradient with respect to the purified image is passed to the given one (Athalye et al. 2018); if the defence
    changes the resolution, through the adjoint of a bilinear resize. Where it has underflowed, `Unsaturated` replaces
    it. Use it in foolbox as ``PyTorchModel(model, bounds=(0, 1), device=...)``, and as the model of an attack of
    torchattacks. The classifier runs in eval mode; its modes are restored afterwards. Accuracy under this attack alone
    proves little: adaptive attacks (`dipguard.attacks`) are stronger.

    ``classifier`` takes images [N, 3, H, W] in [0, 1] and returns logits [N, C]; normalisation belongs inside.
    ``draws`` is how a random defence draws. With ``content``, equal images get equal draws, so that each step of an
    attack draws anew. With ``position``, an image keeps the draws of its position in the batch: the stronger attack,
    only for attacks that never drop images from a batch. TypeError or ValueError for other arguments.
    """

    def __init__(self, classifier: nn.Module, defense: Purifies, *, draws: str = "content") -> None:
        super().__init__(check_is_module(classifier, name="classifier"))
        self.purifier = InputPurifier(defense, draws=draws)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, C] on the purified images [N, 3, H, W]."""
        purified = self.purifier(images)
        with eval_mode(self.victim):
            return super().forward(straight_through(images, purified))
