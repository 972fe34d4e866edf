"""MirrorGuard stack by stack, with a decision trace for each image: for runs that show and keep their work."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor, nn

from dipguard.checks import check_images
from dipguard.decision import DecisionTrace, Reconstruction, quality
from dipguard.decision.evidence import stitch_evidence
from dipguard.defenses.mirror_guard import MirrorGuard
from dipguard.defenses.mirror_readouts import Readings
from dipguard.defenses.result import DefenseResult
from dipguard.fit import Decider, FitProgress, fit_device, in_stacks


class MirrorStacks:
    """:class:`~dipguard.defenses.mirror_guard.MirrorGuard` behind the interface of :class:`~dipguard.DIPGuard`.

    Args:
        row: The guard.

    Attributes:
        row: The guard.
        decide: Its victim.
    """

    def __init__(self, row: MirrorGuard) -> None:
        self.row = row
        self.decide = Decider(row.victim)

    @property
    def victim(self) -> nn.Module:
        """The classifier that guides the reconstruction."""
        return self.row.victim

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the guard."""
        return self.row.settings

    @property
    def steps_per_image(self) -> int:
        """Optimiser steps of all networks."""
        return self.row.steps_per_image

    def choose_stack_size(self, images: Tensor) -> int:
        """How many of ``images`` are fitted at once."""
        return self.row.choose_stack_size(images)

    def rebuild(self, trace: DecisionTrace) -> Reconstruction:
        """The purified image that follows from a trace; the victim is asked where a step away from x0 may be needed."""
        return stitch_evidence(trace, trust=self.row.trust, classify=self.decide, betas=self.row.betas)

    def defend_stacks(
        self,
        images: Tensor,
        *,
        indices: Sequence[int] | Tensor | None = None,
        logger: Logger | None = None,
        stack_size: int | None = None,
    ) -> Iterator[DefenseResult]:
        """Defend images stack by stack; as :meth:`dipguard.DIPGuard.defend_stacks`, whose result it gives.

        Each trace holds the window means of all networks' fits, one after the other, as ``samples``, how the victim
        reads them and their mirrored copies, each network's last window as ``last``, and no crossings.
        ``seconds["start"]`` is the choice of the stack size.

        Raises:
            TypeError, ValueError: Bad images or indices.
        """
        check_images(images)
        order = list(range(len(images))) if indices is None else [int(i) for i in indices]
        if len(order) != len(images):
            raise ValueError(f"`indices` must hold one index an image ({len(images)}), got {len(order)}")
        start = time.perf_counter()
        size = self.choose_stack_size(images) if stack_size is None else stack_size
        choosing = time.perf_counter() - start

        def work(part: slice, first_step: int, progress: FitProgress) -> DefenseResult:
            return self._defend(images[part], order[part], progress=progress, logger=logger, first_step=first_step)

        device = fit_device("auto", victim=self.victim, images=images)
        parts = in_stacks(
            len(images), size=size, T=self.steps_per_image, work=work, device=device, progress=self.row.progress
        )
        for result in parts:
            result.seconds["start"] += choosing
            choosing = 0.0
            yield result

    def _defend(
        self, images: Tensor, indices: list[int], *, progress: FitProgress, logger: Logger | None, first_step: int
    ) -> DefenseResult:
        start = time.perf_counter()
        readings = self.row.read(images, indices, progress=progress)
        fitted = time.perf_counter()
        traces = traces_of(readings, images, indices, guard=self.row)
        rebuilt = [self.rebuild(trace) for trace in traces]
        made = torch.stack([reconstruction.image for reconstruction in rebuilt]).to(images)
        after = self.decide(made).argmax(dim=1).cpu()
        if logger is not None:
            _log_means(logger, traces, first_step=first_step)
        ended = time.perf_counter()
        return DefenseResult(
            reconstructions=made,
            decisions_before=torch.tensor([trace.given_decision for trace in traces]),
            decisions_after=after,
            traces=traces,
            reasons=[reconstruction.reason for reconstruction in rebuilt],
            crossings=[0] * len(traces),
            seconds={
                "start": 0.0,
                "fit": fitted - start - readings.seconds,
                "decide": ended - fitted + readings.seconds,
            },
        )


def traces_of(readings: Readings, images: Tensor, indices: Sequence[int], *, guard: MirrorGuard) -> list[DecisionTrace]:
    """One decision trace for each of the images [B, 3, H, W] of a stack, from what its fits left; on the CPU."""
    samples, count = readings.samples, len(readings.samples)
    given = images.to(samples)
    flat = samples.flatten(0, 1)
    similar = quality(flat, given.repeat(count, 1, 1, 1)).reshape(count, -1).cpu()
    each = guard.windows
    # A window's mean stands at its last step; the steps of the second network follow those of the first.
    steps = torch.cat(
        [n * guard.steps + guard.t0 + guard.every * torch.arange(1, each + 1) - 1 for n in range(len(guard.fits))]
    )
    samples, errors = samples.cpu(), readings.errors.cpu()
    straight, turned, own = readings.straight.cpu(), readings.turned.cpu(), readings.own.cpu()
    none = torch.empty(0)
    return [
        DecisionTrace(
            index=index,
            given=given[i].cpu(),
            given_scores=own[i].clone(),
            steps=steps,
            scores=straight[:, i].contiguous(),
            quality=similar[:, i].contiguous(),
            loss=errors[:, i].contiguous(),
            crossing_at=none.long(),
            alpha=none,
            on_boundary=none.new_empty(0, *images.shape[1:]),
            last=samples[each - 1 :: each, i].contiguous(),
            samples=samples[:, i].contiguous(),
            turned=turned[:, i].contiguous(),
            settings=guard.settings,
        )
        for i, index in enumerate(indices)
    ]


def _log_means(logger: Logger, traces: Sequence[DecisionTrace], *, first_step: int) -> None:
    """The stack's means at each window."""
    loss, similar = (
        torch.stack(values).mean(dim=0) for values in zip(*((t.loss, t.quality) for t in traces), strict=True)
    )
    changed = torch.stack([(t.decisions != t.given_decision).double() for t in traces]).mean(dim=0)
    for i, step in enumerate(traces[0].steps.tolist()):
        values = {
            "fit/mse": float(loss[i]), "fit/quality": float(similar[i]), "fit/decision_changed": float(changed[i]),
        }  # fmt: skip
        logger.log_metrics(values, step=first_step + step)
