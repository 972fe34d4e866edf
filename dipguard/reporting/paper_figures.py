"""The figures that Ding et al. 2021 print in Tables 1 and 2.

Every number is the paper's, in its order: section 4.2.1, Table 1 (accuracy, %), and section 4.2.2, Table 2 (SSIM to the
clean image). Table 2 has no row without a defence. The paper prints 71.5 as the mean accuracy of DIPDefend on CIFAR-10;
the mean of its 15 figures is 72.5.
"""

from __future__ import annotations

import re
from typing import NamedTuple

SOURCE = "Ding et al. 2021"


class PaperAttack(NamedTuple):
    """An attack: the paper's name of it, dipguard's name, and its L-inf budget in levels of 0 to 255, if any."""

    family: str
    name: str
    eps_255: float | None = None


_LINF = (("FGSM", "fgsm"), ("PGD", "pgd"), ("BIM", "bim"), ("MIFGSM", "mifgsm"))

ATTACKS: dict[str, PaperAttack] = {
    "clean": PaperAttack("Clean", "none"),
    **{f"{name}_{eps}": PaperAttack(family, name, eps) for family, name in _LINF for eps in (2, 4, 8)},
    "cw": PaperAttack("C&W", "cw"),
    "ddn": PaperAttack("DDN", "ddn"),
}
"""The 15 columns of both tables by label, in the paper's order. The paper's means are over all of them."""

VICTIMS: dict[str, tuple[str, str]] = {
    "CIFAR-10": ("cifar10_resnet50", "a ResNet-50, 1000 images drawn from the test set"),
    "ImageNet": (
        "torchvision:resnet101",
        "torchvision's ResNet-101, the 1000 images of the NeurIPS 2017 competition at 224x224",
    ),
}
"""What a data set's figures were measured on (section 4.1): dipguard's name of the victim, and the whole in words."""

DEFENSES: dict[str, str] = {
    "none": "No defense",
    "comdefend": "ComDefend",
    "sr": "SR",
    "nrp": "NRP",
    "dipdefend": "DIPDefend",
    "paper": "Proposed",
    "mirror": "Proposed",
}
"""A defence's name in dipguard -> its name in the paper. Others have no figures in the paper.

`mirror`, which is not in the paper, is shown beside the proposed method.
"""


def _rows(**figures: tuple[float, ...]) -> dict[str, dict[str, float]]:
    """Rows by the paper's names of the defences: the 15 figures by label of the attack."""
    return {DEFENSES[key]: dict(zip(ATTACKS, values, strict=True)) for key, values in figures.items()}


# fmt: off
TABLE_1: dict[str, dict[str, dict[str, float]]] = {
    "CIFAR-10": _rows(
        none=(92.9, 57.5, 49.2, 44.4, 24.6, 1.9, 0, 49.8, 19.2, 2.4, 46.7, 29.7, 11.5, 0.9, 0.4),
        comdefend=(89.5, 72.6, 60.5, 51.0, 75.7, 62.0, 50.1, 70.5, 57.0, 36.7, 69.3, 51.1, 30.4, 86.4, 57.4),
        sr=(45.2, 44.2, 42.1, 37.7, 41.4, 36.8, 30.3, 43.4, 40.0, 33.0, 43.8, 40.5, 34.4, 35.3, 33.5),
        nrp=(90.9, 65.1, 56.8, 57.7, 58.4, 35.1, 35.9, 61.5, 31.2, 13.0, 59.4, 39.4, 23.1, 30.5, 15.5),
        dipdefend=(83.2, 78.6, 72.6, 58.4, 79.0, 77.6, 73.6, 79.2, 72.0, 67.6, 76.2, 69.4, 51.6, 71.2, 76.6),
        paper=(85.6, 80.4, 79.8, 60.1, 87.5, 86.9, 83.1, 84.6, 86.7, 76.1, 83.4, 79.9, 60.4, 80.8, 83.4),
    ),
    "ImageNet": _rows(
        none=(90.3, 6.7, 5.2, 5.8, 0, 0, 0, 0.8, 0.1, 0, 0.2, 0.1, 0.1, 0, 1),
        comdefend=(81.1, 34.2, 19.7, 12.7, 42.2, 18.4, 2.8, 30.2, 11.7, 3.8, 23.9, 4.8, 0.6, 77.8, 63.1),
        sr=(73.3, 64.0, 56.6, 43.7, 68.1, 63.4, 49.3, 65.6, 59.1, 53.3, 63.7, 53.5, 38.2, 70.7, 70.5),
        nrp=(86.7, 32.4, 21.4, 18.5, 38.4, 16.9, 13.3, 26.5, 7.1, 2.2, 18.4, 2.8, 3.3, 82.1, 59.5),
        dipdefend=(73.0, 60.8, 47.2, 32.7, 65.5, 61.3, 49.1, 58.3, 54.2, 48.7, 56.8, 45.5, 32.9, 70.5, 68.9),
        paper=(84.5, 74.2, 58.7, 39.4, 80.6, 80.1, 67.8, 79.8, 76.6, 61.2, 75.4, 54.1, 33.7, 82.7, 82.8),
    ),
}
"""Accuracy in %, by data set and the paper's name of the defence."""

TABLE_2: dict[str, dict[str, dict[str, float]]] = {
    "CIFAR-10": _rows(
        comdefend=(.925, .922, .912, .877, .922, .916, .890, .923, .919, .907, .922, .914, .891, .924, .915),
        sr=(.901, .898, .887, .830, .898, .891, .860, .899, .894, .879, .898, .891, .856, .900, .889),
        nrp=(.884, .881, .879, .888, .882, .879, .880, .882, .879, .873, .881, .877, .872, .883, .872),
        dipdefend=(.919, .909, .884, .811, .912, .895, .849, .911, .899, .874, .912, .895, .851, .907, .897),
        paper=(.943, .941, .934, .913, .930, .918, .891, .935, .922, .907, .940, .915, .868, .941, .951),
    ),
    "ImageNet": _rows(
        comdefend=(.862, .855, .832, .764, .857, .847, .815, .858, .853, .843, .857, .843, .793, .861, .861),
        sr=(.885, .880, .861, .762, .882, .874, .842, .882, .879, .869, .881, .871, .813, .884, .884),
        nrp=(.823, .825, .830, .869, .823, .823, .844, .826, .825, .825, .826, .821, .835, .827, .826),
        dipdefend=(.802, .789, .746, .640, .795, .771, .709, .794, .782, .763, .795, .771, .696, .807, .803),
        paper=(.926, .898, .867, .839, .925, .891, .845, .905, .891, .889, .901, .892, .851, .923, .940),
    ),
}
"""SSIM to the clean image, by data set and the paper's name of the defence."""
# fmt: on

TABLE_3: dict[str, dict[int, int]] = {
    "small": {500: 76, 750: 74, 1000: 74, 1250: 72, 1500: 69},
    "medium": {500: 75, 750: 79, 1000: 79, 1250: 75, 1500: 74},
    "large": {500: 71, 750: 73, 1000: 71, 1250: 69, 1500: 67},
}
"""Accuracy in % by network and T: CIFAR-10, PGD at 8/255, the paper's own ResNet-50."""


def head_of(label: str) -> str:
    """The head of an attack's column: the paper's name of it, or its own label."""
    family, _, eps_255 = ATTACKS.get(label, PaperAttack(label, ""))
    return family if eps_255 is None else f"{family} {eps_255:g}"


def paper_data(data: str, victim: str) -> str | None:
    """The data set of the paper that a run's images are like, by the names of data and victim: a key of `VICTIMS`."""
    names = f"{data} {victim}".lower()
    if data == "digits":
        return None
    if re.search(r"cifar[-_ ]?10(?!\d)", names):
        return "CIFAR-10"
    return "ImageNet" if re.search(r"imagenet|n(eur)?ips[-_ ]?2017|\b(torchvision|timm)", names) else None
