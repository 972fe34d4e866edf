"""The base class of all defences, and what they return."""

from __future__ import annotations

import secrets
import time
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self, TypeAlias

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor, nn

from dipguard.checks import Indices, check_images, check_indices, check_int, check_made
from dipguard.classifier import Decider, check_is_module
from dipguard.decision import DecisionTrace, Reconstruction
from dipguard.decision.intermediates import STITCHED, Intermediate
from dipguard.fit import FitOptions
from dipguard.registry import foreign_class, import_extra
from dipguard.seeding import further_index

Callbacks: TypeAlias = Sequence[pl.Callback]


@dataclass(frozen=True, eq=False, kw_only=True)
class Purified:
    """N purified images, as `Defense._purify` returns them.

    Attributes:
        reconstructions: [N, 3, H', W'] in [0, 1], of the given images' dtype and on their device.
        reasons: Why each image looks as it does: ``crossings`` or ``no_crossing`` (paper), ``class_scores``,
            ``moved`` or ``not_reached`` (mirror), ``purified`` (all others).
        used: Number of on-boundary images or windows that each one was averaged from; 0 for ``no_crossing`` and for
            defences that do not average.
        traces: One decision trace per image, or none at all.
        seconds: Wall time by part: ``start`` (choice of the stack size and of the engine, compilation, the Trainer's
            start), ``fit`` and ``decide`` (victim, SSIM, localisation, stitching).
    """

    reconstructions: Tensor
    reasons: list[str]
    used: list[int]
    traces: list[DecisionTrace] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"start": 0.0, "fit": 0.0, "decide": 0.0})

    @classmethod
    def plain(cls, images: Tensor, *, seconds: Mapping[str, float]) -> Purified:
        """Images of a defence that leaves no trace."""
        made = Purified(reconstructions=images, reasons=["purified"] * len(images), used=[0] * len(images))
        made.seconds.update(seconds)
        return made

    @classmethod
    def stitched(cls, made: Sequence[Reconstruction], *, like: Tensor, **more: Any) -> Purified:
        """Stitched images, of the dtype and on the device of ``like``; ``more`` are the traces and the seconds."""
        images, reasons, used = zip(*((one.image, one.reason, len(one.used)) for one in made), strict=True)
        return Purified(reconstructions=torch.stack(images).to(like), reasons=list(reasons), used=list(used), **more)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Concatenate the images of one or more results; seconds add up."""
        return cls(**{f.name: _joined([getattr(part, f.name) for part in parts]) for f in fields(cls)})


@dataclass(frozen=True, eq=False, kw_only=True)
class DefenseResult(Purified):
    """N defended images: `Purified`, and the victim's decisions on both, each [N] int64, on the CPU."""

    decisions_before: Tensor  # on the given images
    decisions_after: Tensor  # on the reconstructions


class Defense(nn.Module, ABC):
    """Turns images that may be adversarial into images that the victim classifies correctly.

    A subclass sets ``name`` and implements `purify_image` or, if it works on several images at once, `_purify`.
    Everything that its result depends on belongs in `OPTIONS` or `settings`. TypeError or ValueError for bad arguments,
    ImportError if a library of the defence is not installed.

    Args:
        victim: Classifier of images [B, 3, H, W] in [0, 1], logits [B, C]. Normalisation belongs inside. It is never
            changed; networks of a defence run on its device.
        seed: Seed of the defence's random draws, at least 0. None takes 62 random bits of the operating system, which
            no attacker knows; the attribute ``seed`` has them.
    """

    name: ClassVar[str]
    OPTIONS: ClassVar[tuple[str, ...]] = ()
    """Attributes that `settings` reports: the constructor's options, ready for JSON."""
    LIBRARIES: ClassVar[dict[str, str]] = {}
    """Libraries that the result depends on: distribution -> module. `settings` reports their versions."""
    random: bool = False
    """Whether random numbers are drawn. They depend on seed and index alone: other draws need another index."""
    dip_fits: tuple[FitOptions, ...] = ()
    """The deep image priors that are fitted to each image; empty for defences without any."""
    votes: int = 1
    """Purifications of each image, each with draws of its own. The victim's decisions on them are votes; the result is
    the first purification of the class with most votes (in a tie, of the class that came first)."""

    def __init__(self, victim: nn.Module, *, seed: int | None = 0) -> None:
        super().__init__()
        self.victim = check_is_module(victim)
        self.seed = secrets.randbits(62) if seed is None else check_int(seed, name="seed", low=0)
        self.decide = Decider(victim)
        self.versions = {
            key: str(import_extra(module, owner=f"the defence {self.name!r}", extra="defenses").__version__)
            for key, module in self.LIBRARIES.items()
        }

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that a result depends on besides image, index and victim, ready for JSON."""
        drawn = {"seed": self.seed} if self.random else {}
        drawn |= {"votes": self.votes} if self.votes > 1 else {}
        versions = {"versions": dict(self.versions)} if self.versions else {}
        own = {option: getattr(self, option) for option in self.OPTIONS}
        return {"name": self.name, **foreign_class(self), **drawn, **own, **versions}

    @property
    def steps_per_purification(self) -> int:
        """Optimiser steps of a deep image prior for one purification of an image."""
        return 0

    @property
    def steps_per_image(self) -> int:
        """Optimiser steps of a deep image prior per image, over all votes."""
        return self.votes * self.steps_per_purification

    @property
    def intermediate_views(self) -> dict[str, int]:
        """The names that `intermediates` returns, with how often the victim reads an image in each, at most."""
        return {STITCHED: 1}

    @property
    def unavailable(self) -> str | None:
        """Why the defence cannot run, such as missing weights; None if it can."""
        return None

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels of the result; ValueError if images of this size cannot be purified."""
        return height, width

    def defend(
        self, images: Tensor, *, indices: Indices | None = None, callbacks: Callbacks = (), logger: Logger | None = None
    ) -> DefenseResult:
        """Purify images and ask the victim for its decisions before and after.

        Works under ``no_grad`` and ``inference_mode``. The caller's random state stays as it was. An image's result
        does not depend on the other images, but for the rounding of the victim's logits in batches of another size. All
        traces are kept in memory: up to a megabyte for a 32x32 image, and for one of 224x224 about 5 (``mirror``) to 50
        (``paper``). TypeError or ValueError for bad images, indices or victim, or a size that the defence cannot take;
        RuntimeError if it is unavailable, or its result has a wrong shape, dtype or range.

        Args:
            images: Float [N, 3, H, W] in [0, 1].
            indices: Positions of the images in their data set, at least 0, on which random draws depend; 0 to N - 1 by
                default.
            callbacks: Lightning callbacks for the fits of a deep image prior. An EarlyStopping, Timer or
                ModelCheckpoint starts afresh with each fit.
            logger: Lightning logger for the means over each fit.
        """
        with torch.inference_mode(False), torch.no_grad():
            images, positions = self._check_given(images, indices)
            self.decide(images[:1])  # a bad victim is noticed before the work
            made = self._purify(*self._repeated(images, positions), callbacks=callbacks, logger=logger)
            start = time.perf_counter()
            if self.votes > 1:
                made = self._elected(made, positions)
            self._check_result(images, made.reconstructions)
            if made.traces:
                before = torch.tensor([trace.given_decision for trace in made.traces], device="cpu")
            else:
                before = self.decide(images).argmax(dim=1).cpu()
            after = self.decide(made.reconstructions).argmax(dim=1).cpu()
            made.seconds["decide"] += time.perf_counter() - start
        return DefenseResult(**vars(made), decisions_before=before, decisions_after=after)

    def purify(self, images: Tensor, *, indices: Indices | None = None) -> Tensor:
        """Return purified images [N, 3, H', W'] (`output_size`) in [0, 1], of the images' dtype and device, detached.

        Arguments and errors are those of `defend`.
        """
        with torch.inference_mode(False), torch.no_grad():
            images, positions = self._check_given(images, indices)
            purified = self._purify_alone(*self._repeated(images, positions))
            if self.votes > 1:
                purified = purified[self._winners(purified)]
            self._check_result(images, purified)
        return purified

    def forward(self, images: Tensor) -> Tensor:
        """Return the victim's logits [N, C] on `purify` of images [N, 3, H, W]; errors are those of `purify`."""
        return self.decide(self.purify(images))

    def intermediates(self, images: Tensor, *, indices: Indices | None = None) -> dict[str, Intermediate]:
        """Return what the defence looked at in one purification, by the names of `intermediate_views`.

        With ``votes``, that is the purification that is the result. Arguments and errors are those of `defend`.
        ``stitched`` is always among them: what `purify` returns.
        """
        images, positions = self._check_given(images, indices)
        with torch.inference_mode(False), torch.no_grad():
            made = self._intermediates(*self._repeated(images, positions))
            if self.votes > 1:
                rows = self._winners(made[STITCHED].views[0])
                made = {name: replace(one, views=one.views[:, rows]) for name, one in made.items()}
        self._check_result(images, made[STITCHED].views[0])
        return made

    def rebuild(self, trace: DecisionTrace) -> Reconstruction:
        """Stitch an image again from its decision trace; TypeError if the defence leaves no traces."""
        raise TypeError(f"the defence {self.name!r} leaves no decision traces, so none can be rebuilt")

    def purify_image(self, image: Tensor, index: int) -> Tensor:
        """Purify one image [3, H, W], the defence's own copy; the result has its dtype and device."""
        raise NotImplementedError(f"{type(self).__name__} implements neither `purify_image` nor `_purify`")

    def _purify(self, images: Tensor, indices: list[int], *, callbacks: Callbacks, logger: Logger | None) -> Purified:
        """Purify checked images [N, 3, H, W]; by default one at a time, since convolutions round by batch size."""
        start = time.perf_counter()
        made = [self.purify_image(image, index) for image, index in zip(images, indices, strict=True)]
        return Purified.plain(torch.stack(made), seconds={"fit": time.perf_counter() - start})

    def _intermediates(self, images: Tensor, indices: list[int]) -> dict[str, Intermediate]:
        """Purify checked images [N, 3, H, W] once and return `intermediates`."""
        made = self._purify(images, indices, callbacks=(), logger=None)
        return {STITCHED: Intermediate(made.reconstructions[None])}

    def _purify_alone(self, images: Tensor, indices: list[int]) -> Tensor:
        """Purify checked images [N, 3, H, W] where nothing but the result [N, 3, H', W'] is wanted."""
        return self._purify(images, indices, callbacks=(), logger=None).reconstructions

    def _elected(self, made: Purified, positions: list[int]) -> Purified:
        """Of votes * N purified images the N results."""
        rows = self._winners(made.reconstructions)
        return Purified(
            reconstructions=made.reconstructions[rows],
            reasons=[made.reasons[row] for row in rows],
            used=[made.used[row] for row in rows],
            traces=[replace(made.traces[r], index=i) for r, i in zip(rows, positions, strict=True) if made.traces],
            seconds=made.seconds,
        )

    def _repeated(self, images: Tensor, positions: list[int]) -> tuple[Tensor, list[int]]:
        """Copy images [N, 3, H, W] once for each vote, [votes * N, 3, H, W], and give each copy an index."""
        more = [further_index(index, number) for number in range(1, self.votes) for index in positions]
        # The caller has left inference mode: tensors made in it could never again take part in autograd.
        return images.detach().repeat(self.votes, 1, 1, 1), [*positions, *more]

    def _winners(self, purified: Tensor) -> list[int]:
        """Return which of the purified images [votes * N, 3, H, W] are the N results."""
        decisions = self.decide(purified).argmax(dim=1).cpu().view(self.votes, -1)
        agreeing = (decisions[:, None] == decisions).sum(dim=1)  # [votes, N]
        count = decisions.shape[1]
        return (agreeing.argmax(dim=0) * count + torch.arange(count, device="cpu")).tolist()

    def _check_given(self, images: Tensor, indices: Indices | None) -> tuple[Tensor, list[int]]:
        if self.unavailable is not None:
            raise RuntimeError(f"the defence {self.name!r} cannot run: {self.unavailable}")
        images = check_images(images)
        self.output_size(*images.shape[-2:])
        return images, check_indices(indices, count=len(images))

    def _check_result(self, given: Tensor, purified: Tensor) -> None:
        expected = (len(given), 3, *self.output_size(*given.shape[-2:]))
        got = (tuple(purified.shape), purified.dtype, purified.device)
        if got != (expected, given.dtype, given.device):
            wanted = f"{expected} of {given.dtype} on {given.device}"
            raise RuntimeError(f"defence {self.name!r} returned {got[0]} of {got[1]} on {got[2]}, not {wanted}")
        check_made(purified, by=f"defence {self.name!r}")


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if isinstance(values[0], dict):
        return {key: sum(value[key] for value in values) for key in values[0]}
    return [item for value in values for item in value]
