"""dipguard: a training-free defence against adversarial images with the deep image prior (Ding et al., ACM MM 2021)."""

from dipguard.decision import DecisionTrace, Reconstruction, stitch
from dipguard.defenses import DefenseResult, DIPGuard
from dipguard.fit import StackedDIP
from dipguard.networks import NetworkSpec
from dipguard.version import __version__

__all__ = [
    "DIPGuard",
    "DecisionTrace",
    "DefenseResult",
    "NetworkSpec",
    "Reconstruction",
    "StackedDIP",
    "__version__",
    "stitch",
]
