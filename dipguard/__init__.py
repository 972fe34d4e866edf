"""dipguard: a training-free defence against adversarial images with the deep image prior (Ding et al., ACM MM 2021)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dipguard.version import __version__

if TYPE_CHECKING:
    from dipguard.decision import DecisionTrace, Reconstruction, stitch
    from dipguard.defenses import Defense, DefenseResult, DIPGuard, MirrorGuard, build_defense
    from dipguard.fit import StackedDIP
    from dipguard.networks import NetworkSpec
    from dipguard.victims import build_victim

__all__ = [
    "DIPGuard", "DecisionTrace", "Defense", "DefenseResult", "MirrorGuard", "NetworkSpec", "Reconstruction",
    "StackedDIP", "__version__", "build_defense", "build_victim", "stitch",
]  # fmt: skip
_HOMES = {
    "DIPGuard": "defenses", "DecisionTrace": "decision", "Defense": "defenses", "DefenseResult": "defenses",
    "MirrorGuard": "defenses", "NetworkSpec": "networks", "Reconstruction": "decision", "StackedDIP": "fit",
    "build_defense": "defenses", "build_victim": "victims", "stitch": "decision",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``dipguard --help`` does not load torch and Lightning."""
    if name in _HOMES.values():
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
