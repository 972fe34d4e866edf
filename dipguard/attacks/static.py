"""Attacks on a victim that know nothing of a defence: those of torchattacks and foolbox, noise, and none at all.

The libraries' attacks have the libraries' defaults. `Attack` and this module correct what is wrong in torchattacks
3.5.1: it raises under ``no_grad``, leaves BatchNorms that were in eval mode in train mode, fixes the device when
constructed, adds to the victim's gradients, and takes any eps without complaint.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dipguard.attacks.base import Attack, kept_options
from dipguard.attacks.libraries import LogitsAboveZero, NeverFlat, Unsaturated, VictimView, foolbox, torchattacks
from dipguard.checks import check_bool, check_choice, check_float, check_int, check_positive
from dipguard.victims.base import check_victim

AUTOATTACK_VERSIONS = {"standard": 4, "rand": 3}
"""AutoAttack's versions, and the fewest classes that their losses are defined for."""


class NoAttack(Attack):
    """Returns a copy of the images."""

    name: ClassVar[str] = "none"

    @property
    def eps(self) -> float:
        """Nothing may change: 0."""
        return 0.0

    def attack_batch(self, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Return the images."""
        return images


class Noise(Attack):
    """x + eps times random signs, clipped to [0, 1]: the control of attacks with the same ``eps_255``."""

    name: ClassVar[str] = "noise"

    def __init__(self, target: nn.Module, *, eps_255: float = 8, **options: Any) -> None:
        super().__init__(target, **options)
        self.eps_255 = check_positive(eps_255, name="eps_255", high=255)

    def attack_batch(self, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Add the noise; it is drawn on the CPU, so that it is the same on every device."""
        signs = torch.randint(2, images.shape, device="cpu").to(images) * 2 - 1
        return (images + self.eps * signs).clamp(0, 1)


class TorchAttack(Attack):
    """An attack of torchattacks; the library's object is made anew for each batch, on the victim's device.

    The subclass, or a base of it, has the name of the library's class, which gets the subclass's options: those that
    end in ``_255`` are divided by 255, and lose this ending.
    """

    library: ClassVar[str] = "torchattacks"
    view: ClassVar[type[VictimView]] = VictimView

    def make(self, victim: nn.Module, **further: Any) -> Any:
        """Return torchattacks' object on ``victim``, called with the attack's options and ``further`` ones."""
        for name, value in kept_options(self).items():
            if name.endswith("_255"):
                further[name.removesuffix("_255")] = value / 255
            elif name not in ("seed", "batch_size"):
                further[name] = value
        library = torchattacks()
        kind = next(kind for kind in type(self).__mro__ if hasattr(library, kind.__name__))
        return getattr(library, kind.__name__)(victim, **further)

    def attack_batch(self, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Run torchattacks on one batch."""
        return self.make(self.view(self.victim))(images, labels)


class LinfAttack(TorchAttack):
    """An attack inside the L-inf ball of radius ``eps_255``, in levels of 0 to 255, above 0 and at most 255."""

    def __init__(self, target: nn.Module, *, eps_255: float = 8, **options: Any) -> None:
        super().__init__(target, **options)
        self.eps_255 = check_positive(eps_255, name="eps_255", high=255)


class FGSM(LinfAttack):
    """Fast gradient sign method (Goodfellow et al. 2015): one step of size eps. It draws nothing."""

    name: ClassVar[str] = "fgsm"
    view: ClassVar[type[VictimView]] = Unsaturated


class BIM(FGSM):
    """Basic iterative method (Kurakin et al. 2017): FGSM in small steps from the image itself. It draws nothing.

    ``alpha_255`` is the size of a step in levels of 0 to 255, above 0; ``steps`` is at least 1.
    """

    name: ClassVar[str] = "bim"

    def __init__(self, target: nn.Module, *, alpha_255: float = 2, steps: int = 10, **options: Any) -> None:
        super().__init__(target, **options)
        self.alpha_255 = check_positive(alpha_255, name="alpha_255", high=255)
        self.steps = check_int(steps, name="steps", low=1)


class PGD(BIM):
    """Projected gradient descent (Madry et al. 2018); by default from a uniformly drawn point of the ball."""

    name: ClassVar[str] = "pgd"

    def __init__(self, target: nn.Module, *, random_start: bool = True, **options: Any) -> None:
        super().__init__(target, **options)
        self.random_start = check_bool(random_start, name="random_start")


class MIFGSM(BIM):
    """Momentum iterative FGSM (Dong et al. 2018), from the image itself. It draws noise only where the victim is flat.

    There torchattacks' division of the gradient by its mean size is 0/0, and the image would never move.
    """

    name: ClassVar[str] = "mifgsm"
    view: ClassVar[type[VictimView]] = NeverFlat


class CW(TorchAttack):
    """Carlini and Wagner's L2 attack (2017), in tanh space, with a fixed c (torchattacks has no binary search for it).

    Images that it cannot fool the victim on come back unchanged; pixels at exactly 0 or 1 never move. It stops when the
    summed cost of a batch rises, so an image's result depends on its batch. It draws nothing. ``c``, above 0, weighs
    misclassification against the squared L2 distance; ``kappa``, at least 0, is the logit margin aimed at; ``steps``,
    at least 1, and ``lr``, above 0, are those of Adam.
    """

    name: ClassVar[str] = "cw"
    view: ClassVar[type[VictimView]] = LogitsAboveZero

    def __init__(
        self, target: nn.Module, *, c: float = 1, kappa: float = 0, steps: int = 50, lr: float = 0.01, **options: Any
    ) -> None:
        super().__init__(target, **options)
        self.c = check_positive(c, name="c")
        self.kappa = check_float(kappa, name="kappa", low=0)
        self.steps = check_int(steps, name="steps", low=1)
        self.lr = check_positive(lr, name="lr")


class Square(LinfAttack):
    """Square attack (Andriushchenko et al. 2020): random search by squares of colour, no gradients.

    ``n_queries``, at least 1, limits the queries an image. All images of a batch get the same squares.
    """

    name: ClassVar[str] = "square"

    def __init__(self, target: nn.Module, *, n_queries: int = 5000, **options: Any) -> None:
        super().__init__(target, **options)
        self.n_queries = check_int(n_queries, name="n_queries", low=1)

    def make(self, victim: nn.Module, **further: Any) -> Any:
        """Return torchattacks' Square; it sets the global seed itself, so it is given the batch's."""
        return super().make(victim, norm="Linf", seed=torch.initial_seed(), **further)


class AutoAttack(LinfAttack):
    """AutoAttack (Croce and Hein 2020) in L-inf; an image that withstands one part goes on to the next.

    ``standard`` is APGD-CE, targeted APGD, targeted FAB and Square; ``rand``, for random victims, APGD-CE and APGD-DLR
    on gradients averaged over 20 looks. torchattacks runs 10 steps where the authors run 100: set ``steps`` to 100 for
    a figure comparable with theirs. The targeted parts try at most ``targets`` classes, the likeliest first; 9 is the
    authors' number. The victim must have at least 4 classes (``rand``: 3).
    """

    name: ClassVar[str] = "autoattack"

    def __init__(
        self, target: nn.Module, *, version: str = "standard", steps: int = 10, targets: int = 9, **options: Any
    ) -> None:
        super().__init__(target, **options)
        self.version = check_choice(version, AUTOATTACK_VERSIONS, name="version")
        self.steps = check_int(steps, name="steps", low=1)
        self.targets = check_int(targets, name="targets", low=1)

    def make(self, victim: nn.Module, *, num_classes: int = 10, **further: Any) -> Any:
        """Return torchattacks' AutoAttack on a victim of ``num_classes`` classes."""
        seed = torch.initial_seed()  # it would take the clock's
        further |= {"version": self.version, "n_classes": min(num_classes, self.targets + 1)}
        attack = torchattacks().AutoAttack(victim, norm="Linf", eps=self.eps, seed=seed, **further)
        for part in attack._autoattack.attacks:
            if hasattr(part, "steps"):  # Square counts queries
                part.steps = self.steps
        return attack

    def attack_batch(self, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Run torchattacks' AutoAttack on one batch."""
        least = AUTOATTACK_VERSIONS[self.version]
        num_classes = check_classes(self.victim, images, least=least, needed_by=self.version)
        attack = self.make(self.view(self.victim), num_classes=num_classes)
        made: Tensor = attack(images.float(), labels)  # its FAB computes in float32 whatever it is given
        return made.to(images)


class DDN(Attack):
    """Decoupled direction and norm (Rony et al. 2019): the smallest L2 change that it finds to fool the victim.

    It takes ``steps`` steps, at least 1. Images that it cannot fool the victim on come back unchanged. It draws noise
    only in the place of a gradient of zero; otherwise the images of a batch do not influence each other.
    """

    name: ClassVar[str] = "ddn"
    library: ClassVar[str] = "foolbox"

    def __init__(self, target: nn.Module, *, steps: int = 100, **options: Any) -> None:
        super().__init__(target, **options)
        self.steps = check_int(steps, name="steps", low=1)

    def attack_batch(self, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Run foolbox's DDN on one batch."""
        made = foolbox()
        model = made.PyTorchModel(Unsaturated(self.victim), bounds=(0, 1), device=images.device)
        attack = made.attacks.DDNAttack(steps=self.steps)
        attacked: Tensor = attack.run(model, images, made.criteria.Misclassification(labels))
        return attacked.clamp(0, 1)  # it returns x + (y - x), which may round to just outside


def check_classes(victim: nn.Module, images: Tensor, *, least: int, needed_by: str) -> int:
    """Return the victim's number of classes; ValueError if there are fewer than ``least``."""
    num_classes = check_victim(victim, images[:1]).shape[1]
    if num_classes < least:
        raise ValueError(f"`victim` must have at least {least} classes for {needed_by!r}, got {num_classes}")
    return num_classes
