"""dipguard in your own Lightning project: a callback, a defended classifier, and a defended LightningModule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache, partial, wraps
from typing import TYPE_CHECKING, Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from dipguard.attacks.target import Purifies
from dipguard.checks import Indices, check_labels
from dipguard.classifier import check_is_module, check_logits
from dipguard.integrations.inputs import InputPurifier, LoaderPositions, Pixels
from dipguard.seeding import kept_rng
from dipguard.victims.base import Channels, Normalised

if TYPE_CHECKING:  # DefendedModule extends the class of the given module, which may come from the package lightning
    _Module = pl.LightningModule
else:
    _Module = nn.Module

Key = int | str
Place = Key | tuple[Key, ...]
"""A position, a key or an attribute; a tuple of them for nested batches; () is the batch itself."""
STEPS = {"test": "test_step", "validate": "validation_step", "predict": "predict_step"}
"""The Trainer's function, and the step that is given purified images."""


class DefendedClassifier(nn.Module):
    """``classifier(defense.purify(images))``.

    The defence is not part of the module or its state dict. There is no gradient with respect to the images: for
    attacks, use :class:`~dipguard.integrations.attackable.BPDAClassifier`.

    ``classifier`` takes images [N, 3, H, W], normalised with ``mean`` and ``std`` per channel; None for images in
    [0, 1]. ``draws``, one of :data:`~dipguard.integrations.inputs.DRAWS`, is how a random defence draws without
    indices. TypeError or ValueError for bad arguments, also for ``mean`` without ``std`` or the reverse.
    """

    def __init__(
        self,
        classifier: nn.Module,
        defense: Purifies,
        *,
        mean: Channels = None,
        std: Channels = None,
        draws: str = "content",
    ) -> None:
        super().__init__()
        self.classifier = check_is_module(classifier, name="classifier")
        self.purifier = InputPurifier(defense, mean=mean, std=std, draws=draws)

    def forward(self, images: Tensor, *, indices: Indices | None = None) -> Tensor:
        """Return the output for images [N, 3, H, W] with ``indices`` [N], their positions in the whole data set."""
        return self.classifier(self.purifier(images, indices=indices))


class DefendedModule(_Module):
    """A LightningModule with the weights of ``module``, whose ``forward`` purifies its images first.

    It is an instance of a subclass of the module's class, with its steps, hooks, hyper-parameters and state dict; the
    module itself is not changed. During ``trainer.fit``, validation included, it is not defended. A step that does not
    call ``self(images)`` would not be defended, and raises RuntimeError. ValueError for a module that is defended or
    whose ``forward`` is patched already; TypeError or ValueError for other bad arguments.

    Args:
        module: The LightningModule, or any other module.
        defense: The defence; its victim may be ``module``. Its progress bar is hidden.
        images: The argument of ``forward`` that holds the images: a position or a keyword.
        mean, std: What the images are normalised with, per channel; None for images in [0, 1].
        draws: How a random defence draws, one of :data:`~dipguard.integrations.inputs.DRAWS`.
    """

    def __new__(cls, module: nn.Module, *args: Any, **kwargs: Any) -> DefendedModule:
        """Return an instance of a class that extends both this one and that of the module."""
        patched = vars(check_is_module(module, name="module")).get("forward")
        # After a fit in DDP, Lightning leaves the class's own forward as an attribute of the module.
        own = patched is None or getattr(patched, "__func__", None) is type(module).forward
        if isinstance(module, DefendedModule) or not own:
            raise ValueError("`module` must have its class's own forward, got one that is defended or patched already")
        return _new(type(module))

    def __init__(
        self,
        module: nn.Module,
        defense: Purifies,
        *,
        images: int | str = 0,
        mean: Channels = None,
        std: Channels = None,
        draws: str = "content",
    ) -> None:
        # nn.Module.__init__ is not called: parameters, submodules and hooks are shared with the module.
        if isinstance(images, bool) or not isinstance(images, (int, str)):
            raise TypeError(f"`images` must be a position or a keyword of forward, got {images!r}")
        # What module.compile() leaves would call the module's own forward.
        aside = ("forward", "_compiled_call_impl")
        vars(self).update({name: value for name, value in vars(module).items() if name not in aside})
        if "_trainer" in vars(self):  # the module may be in a fit, which is not this one's
            vars(self)["_trainer"] = None
        purifier = InputPurifier(defense, mean=mean, std=std, draws=draws, quiet=True)
        vars(self).update(_purifier=purifier, _images=images, _purified=0, _given=module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's forward on purified images."""
        if not self._is_fitted():
            args, kwargs = self._defend(args, kwargs)
            vars(self)["_purified"] += 1
        return super().forward(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the module's class, since the extended one has no importable name."""
        state: Any = self.__getstate__()  # type: ignore[no-untyped-call, unused-ignore]
        return _new, (type(self).__bases__[1],), state

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move the shared weights, and tell the module, which may be the defence's victim, what Lightning notes."""
        noted = {name: vars(self)[name] for name in ("_device", "_dtype") if name in vars(self)}
        if len(noted) == 2:  # a LightningModule
            vars(vars(self)["_given"]).update(noted)
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call, unused-ignore]

    def _defend(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        key, purifier = vars(self)["_images"], vars(self)["_purifier"]
        if isinstance(key, str) and key in kwargs:
            return args, {**kwargs, key: purifier(kwargs[key])}
        if isinstance(key, int) and -len(args) <= key < len(args):
            return with_part(args, (key,), purifier(args[key])), kwargs
        given = f"{len(args)} by position and the keywords {sorted(kwargs)}"
        raise TypeError(f"`images` must name an argument of forward, got {key!r}: forward was given {given}")

    def _is_fitted(self) -> bool:
        state = getattr(vars(self).get("_trainer"), "state", None)
        return state is not None and state.fn == "fit" and state.status == "running"


def _new(base: type) -> Any:
    """An empty instance of the subclass of ``base``."""
    return object.__new__(_extended(base))


@cache
def _extended(base: type) -> type:
    # Steps that are not the class's own are Lightning's defaults, whose predict_step is `self(batch)`.
    owners = {name: next((kind for kind in base.__mro__ if name in vars(kind)), object) for name in STEPS.values()}
    foreign = ("pytorch_lightning.", "lightning.", "builtins")
    steps = [name for name, owner in owners.items() if not owner.__module__.startswith(foreign)]
    watched = {name: _watched(getattr(base, name)) for name in steps}
    return type(f"Defended{base.__name__}", (DefendedModule, base), watched)


def _watched(step: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(step)  # Lightning reads the step's signature
    def watched(self: DefendedModule, *args: Any, **kwargs: Any) -> Any:
        before = vars(self)["_purified"]
        output = step(self, *args, **kwargs)
        if vars(self)["_purified"] == before and not self._is_fitted():
            problem = f"{step.__qualname__} did not call self(images), so its images were not purified"
            raise RuntimeError(f"{problem}: defend its batches with dipguard.integrations.lightning.PurifyCallback")
        return output

    return watched


class PurifyCallback(pl.Callback):
    """Purifies the images of test, predict and validate batches; module and DataModule are not changed.

    The step gets a copy of the batch with purified images. ``trainer.fit``, validation included, is left alone. Where
    there are labels, accuracy with and without the defence is logged through the module's ``log`` as
    ``test_accuracy_defended`` and ``test_accuracy_undefended`` (``validate_...``; a predict loop logs nothing), over
    all processes, each image once, from the module's output [N, C] or its field ``logits``. The index of an image,
    which seeds its random draws, is its position in the data set
    (:class:`~dipguard.integrations.inputs.LoaderPositions`). If a loader shuffles, put the indices into the batch.

    Args:
        defense: The defence, or a callable that makes one and takes ``victim``, so that a config can name it:
            ``functools.partial(build_defense, "paper", T=500)``. It is called at the start of each loop with the
            Trainer's module, with ``mean`` and ``std`` in front. The progress bar is hidden.
        images: Place of the images in the batch: a position, a key, an attribute, or a tuple of those for nested
            batches. None: the batch itself if it is a tensor, the first item of a tuple or list.
        labels: Place of the labels int [N]. None: the second item of a tuple or list if ``images`` is None too, else
            no labels and no accuracy.
        indices: Place of the indices int [N], if the batch holds them.
        mean, std: What the DataModule normalises with, per channel; None for images in [0, 1].

    Raises:
        TypeError, ValueError: Bad arguments, ``mean`` without ``std`` or the reverse; during the loop, a place without
            a tensor, images outside [0, 1], or bad labels.
        RuntimeError: The module is a DefendedModule, or the Trainer has another PurifyCallback.
    """

    def __init__(
        self,
        defense: Purifies | Callable[..., Purifies],
        *,
        images: Place | None = None,
        labels: Place | None = None,
        indices: Place | None = None,
        mean: Channels = None,
        std: Channels = None,
    ) -> None:
        self._normalised: dict[str, Any] = {"mean": mean, "std": std}
        Pixels(**self._normalised)  # refuses what is no normalisation
        made = isinstance(defense, nn.Module) or hasattr(defense, "purify") or not callable(defense)
        self._make = None if made and not isinstance(defense, type) else cast("Callable[..., Purifies]", defense)
        if self._make is None:
            self.purifier = InputPurifier(cast("Purifies", defense), **self._normalised, quiet=True)
        self._images, self._labels, self._indices = (
            None if place is None else check_place(place, name=name)
            for name, place in (("images", images), ("labels", labels), ("indices", indices))
        )
        self._restore: Callable[[], Any] | None = None

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Put a step that purifies its batch in the place of the module's, except in ``fit``."""
        stage = str(trainer.state.fn.value)
        if stage not in STEPS:
            return
        if isinstance(pl_module, DefendedModule):
            raise RuntimeError("the module purifies its images already: a DefendedModule needs no PurifyCallback")
        if self._make is not None:
            # Buffers that are made in inference mode cannot be used where a gradient is needed.
            with torch.inference_mode(False), kept_rng():
                victim = pl_module if self._normalised["mean"] is None else Normalised(pl_module, **self._normalised)
                self.purifier = InputPurifier(self._make(victim=victim), **self._normalised, quiet=True)
        name = STEPS[stage]
        step, own = getattr(pl_module, name), vars(pl_module)
        if hasattr(step, "purified_by"):
            raise RuntimeError(f"the module's {name} is purified already: a Trainer has one PurifyCallback")
        loaders: dict[int, tuple[LoaderPositions, MeanMetric, MeanMetric]] = {}

        @wraps(step)  # Lightning reads the step's signature
        def purified(batch: Any, *rest: Any) -> Any:
            loader = rest[1] if len(rest) > 1 else 0
            if loader not in loaders:
                loaders[loader] = LoaderPositions(_loader(trainer, loader)), _mean(), _mean()
            return step(self._purified(stage, pl_module, batch, *loaders[loader]), *rest)

        self._restore = partial(own.update, {name: step}) if name in own else partial(own.pop, name)
        purified.purified_by = self  # type: ignore[attr-defined]
        own[name] = purified

    on_validation_start = on_predict_start = on_test_start

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Restore the module's step."""
        if self._restore is not None:
            self._restore()
            self._restore = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore the module's step."""
        self.teardown(trainer, pl_module, "exception")

    def _purified(self, stage: str, pl_module: Any, batch: Any, loader: LoaderPositions, *metrics: MeanMetric) -> Any:
        place, labels_at = (self._images, None) if self._images is not None else default_places(batch)
        labels_at = labels_at if self._labels is None else self._labels
        images = part_of(batch, place, name="images")
        positions, repeated = loader.next(len(images))
        if self._indices is not None:
            positions = part_of(batch, self._indices, name="indices")
        purified = self.purifier(images, indices=positions)
        if labels_at is not None and stage != "predict":
            labels = check_labels(part_of(batch, labels_at, name="labels"), count=len(images))
            weights = (~repeated).float().to(labels.device)
            for name, given, metric in zip(("undefended", "defended"), (images, purified), metrics, strict=True):
                with torch.no_grad(), kept_rng():
                    output = pl_module(given)
                logits = check_logits(getattr(output, "logits", output), given, name="module")
                metric.to(labels.device).update((logits.argmax(dim=1) == labels).float(), weights)
                options = {"on_step": False, "on_epoch": True, "batch_size": len(given)}
                # Lightning needs the name of the metric's attribute; there is none.
                pl_module.log(f"{stage}_accuracy_{name}", metric, metric_attribute="dipguard", **options)
        return with_part(batch, place, purified)


def _mean() -> MeanMetric:
    """A mean that counts in float32 in a bfloat16 step too, where it would stop at 256 images."""
    made = MeanMetric()
    made.set_dtype(torch.float32)
    return made


def _loader(trainer: Any, position: int) -> Any:
    # Not `trainer.val_dataloaders`, which after a fit goes on to be that of the fit.
    loaders = trainer._active_loop._combined_loader.flattened
    return loaders[position] if position < len(loaders) else None


def check_place(place: Any, *, name: str) -> tuple[Key, ...]:
    """Return a place as a tuple of keys; a TypeError if it is not an int, a str or a tuple of those."""
    keys = place if isinstance(place, tuple) else (place,)
    if any(isinstance(key, bool) or not isinstance(key, (int, str)) for key in keys):
        raise TypeError(f"`{name}` must be a position, a key, or a tuple of them, got {place!r}")
    return keys


def default_places(batch: Any) -> tuple[tuple[Key, ...], tuple[Key, ...] | None]:
    """Return where images and labels are by default; TypeError if neither the batch nor its first item is a tensor."""
    if isinstance(batch, Tensor):
        return (), None
    items = [*batch[:2]] if isinstance(batch, (tuple, list)) else []
    if not items or not isinstance(items[0], Tensor):
        raise TypeError(f"`images` must say where in the batch the images are: the batch is {_describe(batch)}")
    return (0,), (1,) if isinstance(items[-1], Tensor) and len(items) > 1 else None


def part_of(batch: Any, place: tuple[Key, ...], *, name: str) -> Tensor:
    """Return the tensor at a place; ValueError if there is nothing, TypeError if it is something else."""
    part = batch
    for key in place:
        try:
            part = _get(part, key)
        except (KeyError, IndexError, AttributeError, TypeError):
            here = _describe(part)
            raise ValueError(f"`{name}` must name a part of the batch, got {place!r}: there is {here}") from None
    if not isinstance(part, Tensor):
        raise TypeError(f"`{name}` must name a tensor, got {place!r}: there is {_describe(part)}")
    return part


def with_part(batch: Any, place: tuple[Key, ...], value: Tensor) -> Any:
    """Return a copy of the batch with another tensor at a place; the given batch is not changed."""
    if not place:
        return value
    key, new = place[0], with_part(_get(batch, place[0]), place[1:], value)
    if isinstance(batch, tuple):
        parts = list(batch)
        parts[key if isinstance(key, int) else batch._fields.index(key)] = new  # type: ignore[attr-defined]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    other = copy.copy(batch)
    if isinstance(batch, (Mapping, list)):
        other[key] = new
    else:
        object.__setattr__(other, str(key), new)  # frozen dataclasses too
    return other


def _describe(part: Any) -> str:
    keys = f" with the keys {', '.join(map(repr, part))}" if isinstance(part, Mapping) else ""
    return f"a {type(part).__name__}{keys}"


def _get(part: Any, key: Key) -> Any:
    if isinstance(part, Tensor):
        raise KeyError(key)  # a tensor can be indexed, but its items are not parts of the batch
    return part[key] if isinstance(part, Mapping) or isinstance(key, int) else getattr(part, key)
