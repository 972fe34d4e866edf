"""One run from the settings to its outcome: data, attack, fit, reconstruction; resumable at every finished stack."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor, nn
from tqdm import tqdm

from dipguard.attacks import Attack, build_attack
from dipguard.checks import check_labels
from dipguard.config import TrainConfig
from dipguard.config_checks import keys_named, validate
from dipguard.config_choices import DefenseName
from dipguard.data import ImageSet, load_data
from dipguard.defenses import DIPGuard
from dipguard.defenses.mirror_guard import NETWORKS
from dipguard.defenses.mirror_stacks import MirrorStacks
from dipguard.evaluation.metrics import decide, similarity
from dipguard.evaluation.outcome import Outcome
from dipguard.evaluation.run_folder import Given, RunFolder
from dipguard.evaluation.settings import (
    attack_options,
    build_guard,
    choose_device,
    data_options,
    description,
    fingerprint,
    number_of_classes,
)
from dipguard.networks import resolve
from dipguard.victims import build_victim

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Run:
    """A run that has passed every check and can start.

    Attributes:
        config: Its settings.
        clean: The clean images.
        victim: The classifier, on ``device``.
        attack: Images and labels -> attacked images.
        guard: The defence.
        device: Where the victim and the fits are.
        folder: The run folder.
    """

    config: TrainConfig
    clean: ImageSet
    victim: nn.Module
    attack: Attack
    guard: DIPGuard | MirrorStacks
    device: torch.device
    folder: RunFolder


def prepare(config: TrainConfig, path: str | Path) -> Run:
    """Check everything that can be checked before the work starts, and build the parts.

    Args:
        config: The settings.
        path: The run folder; one that holds a run of the same settings is continued.

    Raises:
        TypeError, ValueError, FileNotFoundError, RuntimeError: A setting, a file or the folder is not as it must be.
    """
    validate(config)
    device = choose_device(str(config.trainer.accelerator))
    with keys_named("data", data_options(config)), keys_named("data.options", config.data.options):
        clean = load_data(config.data.name, **data_options(config))
    _check_size(clean, config)
    with keys_named("victim", ("weights",)), keys_named("victim.options", config.victim.options):
        victim = build_victim(config.victim.name, weights=config.victim.weights, **config.victim.options).to(device)
    check_labels(clean.labels, count=len(clean), num_classes=number_of_classes(victim, clean, config.victim.name))
    with keys_named("attack", ("eps_255",)), keys_named("attack.options", config.attack.options):
        attack = build_attack(config.attack.name, victim, **attack_options(config))
    guard = build_guard(config, victim, device)
    folder = RunFolder(path, fingerprint(config, clean, victim))
    return Run(config, clean, victim, attack, guard, device, folder)


def execute(run: Run, *, logger_at: Callable[[int], Logger | None] = lambda step: None) -> Outcome:
    """Attack, fit and rebuild what the run folder does not hold yet.

    Args:
        run: See :func:`prepare`.
        logger_at: Gives the logger for fits whose first step is entered as the given step number.
    """
    given = _attack(run)
    _fit(run, given, logger_at)
    return _rebuild(run, given)


def _check_size(clean: ImageSet, config: TrainConfig) -> None:
    # Here, and not when the first stack starts, which may be an hour of attacks later.
    mirror = config.defense.name == DefenseName.dipguard
    for network in NETWORKS if mirror else (str(config.network.name),):
        resolve(network).check_size(*clean.images.shape[-2:])
    similarity(clean.images[:1], clean.images[:1])


def _attack(run: Run) -> Given:
    saved = run.folder.load_given(len(run.clean))
    if saved is not None:
        _log.info("attack %s: %d images from an earlier session", run.config.attack.name, len(run.clean))
        return saved
    _log.info("attack %s: %d images", run.config.attack.name, len(run.clean))
    start = time.perf_counter()
    attacked = torch.cat(list(_attack_batches(run)))
    seconds = time.perf_counter() - start
    on_clean, on_given = (decide(run.victim, x) for x in (run.clean.images, attacked))
    given = Given(attacked, on_given, on_clean, seconds)
    run.folder.save_given(given)
    return given


def _attack_batches(run: Run) -> Iterator[Tensor]:
    clean, size = run.clean, run.config.attack.batch_size
    batches = zip(clean.images.split(size), clean.labels.split(size), clean.indices.split(size), strict=True)
    show = run.config.trainer.progress
    with tqdm(total=len(clean), desc="attack", unit="image", disable=not show, dynamic_ncols=True) as bar:
        for images, labels, indices in batches:
            yield run.attack(images.to(run.device), labels.to(run.device), indices=indices).cpu()
            bar.update(len(images))


def _fit(run: Run, given: Given, logger_at: Callable[[int], Logger | None]) -> None:
    indices, T = run.clean.indices.tolist(), run.guard.steps_per_image
    fitted = [run.folder.is_fitted(index, image) for index, image in zip(indices, given.images, strict=True)]
    if all(fitted):
        return
    if any(fitted):
        _log.info("fit: %d of %d images are there from earlier sessions", sum(fitted), len(indices))
    start = time.perf_counter()
    size = _stack_size(run, given)
    choosing = time.perf_counter() - start
    for positions in pending(fitted, size):
        chosen = [indices[i] for i in positions]
        logger = logger_at(positions[0] // size * T)
        _log.info("fit: %d images, %d steps, stacks of %d", len(chosen), T, size)
        images, now, left = given.images[positions], size, len(chosen)
        for result in run.guard.defend_stacks(images, indices=chosen, logger=logger, stack_size=size):
            result.seconds["start"] += choosing
            choosing = 0.0
            run.folder.save_stack(result.traces, seconds=result.seconds)
            if run.config.fit.stack_size is None and len(result.traces) < min(now, left):  # memory ran out
                now = len(result.traces)
                run.folder.save_stack_size(now)
            left -= len(result.traces)


def _stack_size(run: Run, given: Given) -> int:
    """The one that was asked for, or that an earlier session took, or one chosen now."""
    if run.config.fit.stack_size is not None:
        return run.config.fit.stack_size
    size = run.folder.load_stack_size() or run.guard.choose_stack_size(given.images)
    run.folder.save_stack_size(size)
    return size


def pending(fitted: Sequence[bool], stack_size: int) -> list[list[int]]:
    """Positions that are still to be fitted, in groups that fall into the same stacks as in a run from the start.

    Only where a part of a stack is missing (a damaged trace) is a smaller one made. Stacks are kept, because rounding
    differs with the size of a stack and Adam amplifies it.
    """
    groups: list[list[int]] = []
    for first in range(0, len(fitted), stack_size):
        todo = [i for i in range(first, min(first + stack_size, len(fitted))) if not fitted[i]]
        if todo and groups and len(groups[-1]) % stack_size == 0:
            groups[-1] += todo
        elif todo:
            groups.append(todo)
    return groups


def _rebuild(run: Run, given: Given) -> Outcome:
    indices = run.clean.indices.tolist()
    # From the saved traces in every case: a continued run then takes the same road as an uninterrupted one.
    rebuilt = [run.guard.rebuild(run.folder.load_trace(index)) for index in indices]
    images = torch.stack([reconstruction.image for reconstruction in rebuilt]).to(run.clean.images)
    return Outcome(
        clean=run.clean,
        given=given.images,
        reconstructions=rebuilt,
        decision_clean=given.decisions_clean,
        decision_given=given.decisions,
        decision_defended=decide(run.victim, images),
        ssim_given=similarity(given.images, run.clean.images),
        ssim_defended=similarity(images, run.clean.images),
        seconds={"attack": given.seconds, **run.folder.seconds(indices)},
        settings=description(run.config, run.attack, run.guard, run.device),
        folder=run.folder.path,
    )
