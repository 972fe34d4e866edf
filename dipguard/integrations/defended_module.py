"""Somebody's LightningModule with a defended ``forward``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

from torch import nn

from dipguard.attacks.defense_aware import Purifies
from dipguard.classifier import check_is_module
from dipguard.integrations.input_purifier import InputPurifier

if TYPE_CHECKING:  # which LightningModule it is (there are two packages of them) is the module's own affair
    from pytorch_lightning import LightningModule as _Module
else:
    _Module = nn.Module

STEPS = ("test_step", "validation_step", "predict_step")


class DefendedModule(_Module):
    """A LightningModule like ``module``, on the same weights, whose ``forward`` purifies its images first.

    It is an instance of the module's own class, extended: its steps, hooks, loggers, hyper-parameters and state dict
    are the module's, and ``forward`` is the only thing that differs, wherever it is called from. Only while a Trainer
    fits it (validation included) it is undefended. ``module`` itself stays undefended, and holds nothing of this.

    A step that never calls ``self(images)`` would not be defended: it ends in an error that says so.

    Args:
        module: The LightningModule (any other module works too).
        defense: Has ``purify(images, *, indices)``; a guard's victim may be ``module``. No progress bar is shown.
        images: Which argument of ``forward`` holds the images: a position, or a keyword.
        mean: Those that the images are normalised with when ``forward`` gets them, three numbers; None for images in
            [0, 1].
        std: The same.
        draws: ``content`` (an image's pixels settle its draws, so that neither batch size nor number of processes
            matters), ``position`` or ``fresh`` (:class:`~dipguard.integrations.indices.IndexRule`).

    Raises:
        TypeError, ValueError: A bad argument; the message names it.
    """

    def __new__(cls, module: nn.Module, *args: Any, **kwargs: Any) -> DefendedModule:
        """Make an instance of a class that is both this one and the module's."""
        if isinstance(module, DefendedModule) or not _has_own_forward(check_is_module(module, name="module")):
            raise ValueError("`module` must have its class's own forward, got one that is defended or patched already")
        made: DefendedModule = object.__new__(_extended(type(module)))
        return made

    def __init__(
        self,
        module: nn.Module,
        defense: Purifies,
        *,
        images: int | str = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        draws: str = "content",
    ) -> None:
        # Not nn.Module's own: parameters, submodules and hooks are shared with the module, not made anew.
        if isinstance(images, bool) or not isinstance(images, (int, str)):
            raise TypeError(f"`images` must be a position or a keyword of forward, got {images!r}")
        vars(self).update({name: value for name, value in vars(module).items() if name != "forward"})
        purifier = InputPurifier(defense, mean=mean, std=std, draws=draws, quiet=True)
        vars(self).update(_purifier=purifier, _images=images, _purified=0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward on purified images; see there for arguments and result.

        Raises:
            TypeError, ValueError: There are no images where they were said to be, or they are not in range.
        """
        if not self._is_fitted():
            args, kwargs = self._defend(args, kwargs)
            vars(self)["_purified"] += 1
        return super().forward(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process by the module's class, since the extended one has no name to be found by."""
        state: Any = self.__getstate__()  # type: ignore[no-untyped-call, unused-ignore]
        return _rebuild, (type(self).__bases__[1],), state

    def _defend(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        key, purifier = vars(self)["_images"], vars(self)["_purifier"]
        if isinstance(key, str) and key in kwargs:
            return args, {**kwargs, key: purifier(kwargs[key])}
        if isinstance(key, int) and -len(args) <= key < len(args):
            parts = list(args)
            parts[key] = purifier(parts[key])
            return tuple(parts), kwargs
        raise TypeError(
            f"`images` must name an argument of forward, got {key!r}: forward was given {len(args)} by position and "
            f"the keywords {sorted(kwargs)}"
        )

    def _is_fitted(self) -> bool:
        """Whether a Trainer's ``fit`` is running."""
        state = getattr(vars(self).get("_trainer"), "state", None)
        return state is not None and state.fn == "fit" and state.status == "running"


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a module's forward is its class's. After a fit in DDP, Lightning leaves that on the module, too."""
    patched = vars(module).get("forward")
    return patched is None or getattr(patched, "__func__", None) is type(module).forward


_CLASSES: dict[type, type] = {}


def _extended(base: type) -> type:
    """The class of a defended ``base``; one for all of its modules."""
    if base not in _CLASSES:
        steps = {name: _watched(step) for name in STEPS if (step := _own_step(base, name)) is not None}
        _CLASSES[base] = type(f"Defended{base.__name__}", (DefendedModule, base), steps)
    return _CLASSES[base]


def _own_step(base: type, name: str) -> Callable[..., Any] | None:
    """The step that a class defines itself; None for Lightning's defaults, whose predict_step is ``self(batch)``."""
    owner = next((kind for kind in base.__mro__ if name in vars(kind)), None)
    if owner is None or owner.__module__.startswith(("pytorch_lightning.", "lightning.")):
        return None
    step: Callable[..., Any] = getattr(base, name)
    return step


def _watched(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, which must call forward: it would read undefended images otherwise, and nobody would know."""

    @wraps(step)  # Lightning reads the step's signature
    def watched(self: DefendedModule, *args: Any, **kwargs: Any) -> Any:
        before = vars(self)["_purified"]
        output = step(self, *args, **kwargs)
        if vars(self)["_purified"] == before and not self._is_fitted():
            raise RuntimeError(
                f"{step.__qualname__} did not call self(images), so its images were not purified: defend its batches "
                "with dipguard.integrations.lightning.PurifyCallback"
            )
        return output

    return watched


def _rebuild(base: type) -> Any:
    return object.__new__(_extended(base))
