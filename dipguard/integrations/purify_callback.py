"""A Lightning callback that puts a defence between somebody's DataModule and LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torchmetrics import MeanMetric

from dipguard.attacks.defense_aware import Purifies
from dipguard.checks import check_choice, check_labels
from dipguard.classifier import check_logits
from dipguard.integrations.batches import Place, check_place, default_images, default_labels, part_of, with_part
from dipguard.integrations.indices import LoaderPositions
from dipguard.integrations.input_purifier import InputPurifier

STEPS = {"test": "test_step", "validate": "validation_step", "predict": "predict_step"}
"""What the Trainer was told to do, and the step that is then given purified images."""

Logits = Callable[[Any, Tensor], Tensor]
"""A LightningModule and images as it takes them -> logits [N, C]."""


class PurifyCallback(pl.Callback):
    """Purifies the images of test, predict and validate batches; module and DataModule stay as they are.

    The step gets the same batch with purified images, in a structure of its own: what the data set holds is not written
    to, and other callbacks see the batch as it was loaded. Nothing happens in ``trainer.fit``, its validation included.
    Where there are labels, accuracy with and without the defence is logged through the module's own ``log``, as
    ``test_accuracy_defended`` and ``test_accuracy_undefended`` (``validate_...``; a predict loop logs nothing): over
    all images and processes, each image once. It asks the module itself, twice a batch, in the Trainer's precision.

    An image's index, which with the seed settles its random draws, is its position in the data set
    (:class:`~dipguard.integrations.indices.LoaderPositions`): it depends on neither batch size nor number of processes.
    A loader that shuffles makes it the position in loading order: let the batch hold the indices then.

    Args:
        guard: Has ``purify(images, *, indices)``: a :class:`~dipguard.DIPGuard` or a row of
            `dipguard.defenses.DEFENSES`. Its progress bar is not shown.
        images: Where in the batch the images are: a position, a key, an attribute, or a tuple of them for nested
            batches. None: the batch itself if it is a tensor, the first part of a tuple or list.
        labels: The same for labels int [N]. None: the second part of a tuple or list where images are found by
            themselves, else no labels, and no accuracy.
        indices: The same for indices int [N], where the batch holds them.
        mean: Those that the DataModule normalises with, three numbers: images are brought to [0, 1], purified, and
            normalised again. None for images in [0, 1].
        std: The same.
        stages: Of ``test``, ``validate``, ``predict``.
        accuracy: Log accuracy where there are labels.
        logits: How to ask the module; by default ``module(images)``, or the field ``logits`` of what that returns.
        prefix: Put before the names of what is logged.

    Raises:
        TypeError, ValueError: A bad argument here, or at a batch something that is not where it was said to be, images
            that are not in [0, 1], or logits that are none; the message names it.
    """

    def __init__(
        self,
        guard: Purifies,
        *,
        images: Place | None = None,
        labels: Place | None = None,
        indices: Place | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        stages: Sequence[str] = tuple(STEPS),
        accuracy: bool = True,
        logits: Logits | None = None,
        prefix: str = "",
    ) -> None:
        self.purifier = InputPurifier(guard, mean=mean, std=std, quiet=True)
        self._images = None if images is None else check_place(images, name="images")
        self._labels = None if labels is None else check_place(labels, name="labels")
        self._indices = None if indices is None else check_place(indices, name="indices")
        names = (stages,) if isinstance(stages, str) else stages
        self.stages = tuple(check_choice(stage, STEPS, name="stages") for stage in names)
        self.accuracy, self.prefix = accuracy, prefix
        self._logits = ask if logits is None else logits
        self._positions: dict[int, LoaderPositions] = {}
        self._metrics: dict[int, tuple[MeanMetric, MeanMetric]] = {}
        self._given_back: Callable[[], None] | None = None

    def on_test_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, loader: int = 0) -> None:
        """Purify the batch that the coming ``test_step`` will get."""
        self._start(trainer, pl_module, batch, batch_idx, loader)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, loader: int = 0
    ) -> None:
        """Purify the batch that the coming ``validation_step`` will get, but in ``fit``."""
        self._start(trainer, pl_module, batch, batch_idx, loader)

    def on_predict_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, loader: int = 0) -> None:
        """Purify the batch that the coming ``predict_step`` will get."""
        self._start(trainer, pl_module, batch, batch_idx, loader)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module's steps as they were."""
        self._give_back()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module's steps as they were."""
        self._give_back()
        self._positions, self._metrics = {}, {}

    def _start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, loader: int) -> None:
        stage = str(trainer.state.fn.value)
        if stage not in self.stages:
            return
        place = default_images(batch) if self._images is None else self._images
        images = part_of(batch, place, name="images")
        if batch_idx == 0 or loader not in self._positions:
            self._positions[loader] = LoaderPositions(_loader(trainer, stage, loader))
        positions, repeated = self._positions[loader].next(len(images))
        if self._indices is not None:
            positions = part_of(batch, self._indices, name="indices")
        purified = self.purifier(images, indices=positions)
        self._log_accuracy(trainer, pl_module, batch, (images, purified), repeated, stage, loader)
        self._hand_over(pl_module, STEPS[stage], with_part(batch, place, purified))

    def _hand_over(self, pl_module: Any, step: str, batch: Any) -> None:
        """Let the module's next step have this batch. A hook is handed the batch, but cannot hand back another."""
        self._give_back()
        original, own = getattr(pl_module, step), pl_module.__dict__.get(step)

        @wraps(original)  # Lightning reads the step's signature
        def once(given: Any, *rest: Any) -> Any:
            self._give_back()
            return original(batch, *rest)

        def give_back() -> None:
            pl_module.__dict__.pop(step, None)
            if own is not None:
                pl_module.__dict__[step] = own

        pl_module.__dict__[step], self._given_back = once, give_back

    def _give_back(self) -> None:
        if self._given_back is not None:
            self._given_back()
            self._given_back = None

    def _log_accuracy(
        self,
        trainer: Any,
        pl_module: Any,
        batch: Any,
        both: tuple[Tensor, Tensor],
        repeated: Tensor,
        stage: str,
        loader: int,
    ) -> None:
        place = default_labels(batch) if self._labels is None and self._images is None else self._labels
        if not self.accuracy or place is None or stage == "predict":
            return
        labels = check_labels(part_of(batch, place, name="labels"), count=len(both[0]))
        metrics = self._metrics.setdefault(loader, (MeanMetric(), MeanMetric()))
        weights = (~repeated).float().to(labels.device)
        for name, images, metric in zip(("undefended", "defended"), both, metrics, strict=True):
            with torch.no_grad(), trainer.precision_plugin.forward_context(), isolate_rng():
                logits = check_logits(self._logits(pl_module, images), count=len(images), name="logits")
            metric.to(labels.device).update((logits.argmax(dim=1) == labels).float(), weights)
            pl_module.log(
                f"{self.prefix}{stage}_accuracy_{name}",
                metric,
                on_step=False,
                on_epoch=True,
                batch_size=len(images),
                metric_attribute="dipguard",  # Lightning wants a name; it is no attribute, and never stored
            )


def ask(module: Any, images: Tensor) -> Tensor:
    """Ask a module for logits: what ``module(images)`` returns, or its field ``logits`` (Hugging Face's outputs)."""
    output = module(images)
    logits: Tensor = getattr(output, "logits", output)
    return logits


def _loader(trainer: Any, stage: str, position: int) -> Any:
    """The data loader that a batch comes from, None where that cannot be told."""
    name = {"test": "test_dataloaders", "validate": "val_dataloaders", "predict": "predict_dataloaders"}[stage]
    loaders = CombinedLoader(getattr(trainer, name), "sequential").flattened
    return loaders[position] if position < len(loaders) else None
