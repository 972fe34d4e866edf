"""dipguard: a training-free defence against adversarial images with the deep image prior (Ding et al., ACM MM 2021)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dipguard.version import __version__

if TYPE_CHECKING:
    from dipguard.decision import DecisionTrace, Reconstruction, stitch
    from dipguard.defenses import DefenseResult, DIPGuard
    from dipguard.fit import StackedDIP
    from dipguard.networks import NetworkSpec

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

_HOMES = {
    "DIPGuard": "defenses",
    "DecisionTrace": "decision",
    "DefenseResult": "defenses",
    "NetworkSpec": "networks",
    "Reconstruction": "decision",
    "StackedDIP": "fit",
    "stitch": "decision",
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for: `dipguard --help` shall not wait for torch and Lightning."""
    if name in _HOMES.values():
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
