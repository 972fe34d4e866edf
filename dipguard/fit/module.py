"""The stacked DIP fit as a LightningModule (Eq. 2; Algorithm 1, lines 1-8), and the growing trace of it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor

from dipguard.checks import Indices, check_images, check_indices, check_int
from dipguard.decision import DecisionTrace, needed_for_replay
from dipguard.decision.quality import image_noise, quality
from dipguard.engines import Engine, make_engine
from dipguard.engines.jitter_feed import JitterFeed
from dipguard.engines.kernel_choice import use_first_kernels
from dipguard.fit.options import FitOptions
from dipguard.networks import StackedSkipNet, build
from dipguard.seeding import Jitter, draw_z

STEPS_PER_EPOCH = 50
"""An epoch costs a quarter of what Lightning itself costs per step: here below 1 % of any fit."""


class StepOutput(TypedDict):
    """What a training step gives to Lightning and to the callbacks."""

    loss: Tensor  # sum over images of the error, so that no image's gradient depends on B
    reconstructions: Tensor  # x(t), before this step's update, [B, 3, H, W]
    errors: Tensor  # error of each image, [B], detached: mean square of what exceeds the dead zone, if there is one
    step: int  # the optimiser step t, counted from 0


class StackedDIP(pl.LightningModule):
    """B images, B independent DIP networks, one optimiser.

    Adam acts on each number separately, so one Adam over stacked parameters is B Adams. The module brings its own
    data: the Trainer's ``max_steps`` is the paper's T, and its epochs have ``steps_per_epoch`` steps, so that
    ``EarlyStopping`` and ``ModelCheckpoint`` act during the fit; ``training_step`` enters ``fit/mse`` and
    ``fit/quality`` of an epoch's last step into ``callback_metrics``.

    A subclass that overrides ``training_step`` may add to the ``loss`` (docs/own_trainer.md): its reconstructions are
    part of the autograd graph, which the torch engine alone provides.

    TypeError or ValueError for bad images or options, or images too small for the network. Trainers that cannot run the
    fit (docs/own_trainer.md lists them) are refused at its start, by ValueError or RuntimeError.

    Args:
        images: The given images x0, [B, 3, H, W] in [0, 1].
        indices: Their indices in the data set, 0 ... B-1 by default; every random draw of an image depends only on
            (seed, index).
        options: How the networks are fitted.
        steps_per_epoch: Length of an epoch, at least 1. None takes 50, or more if the Trainer's ``max_epochs`` would
            otherwise end the fit before ``max_steps``.

    Attributes:
        given: x0, [B, 3, H, W], in the dtype of the fit.
        z: The networks' input, [B, input_depth, H, W], in the same dtype; a parameter with ``optimise_z``.
        indices: The indices of the images, B of them.
        step: Number of steps done.
        trace: The :class:`StackTrace` that the callbacks fill; None without a DecisionLogger.
        in_run_fit: Whether this is one of a defence's many fits for one log. If not, the Trainer's loggers are told the
            options of the fit, as ``fit/lr`` and so on.
        began: When the first step began, by ``time.perf_counter``.
    """

    given: Tensor
    z: Tensor
    tolerance: Tensor | None

    def __init__(
        self,
        images: Tensor,
        *,
        indices: Indices | None = None,
        options: FitOptions | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        images = check_images(images)
        self.options = options = FitOptions() if options is None else options
        if steps_per_epoch is not None:
            check_int(steps_per_epoch, name="steps_per_epoch", low=1)
        self.steps_per_epoch = steps_per_epoch
        self.indices, self.net, z = init_networks(images, indices, options=options)
        if options.optimise_z:
            self.z = torch.nn.Parameter(z)
        else:
            self.register_buffer("z", z, persistent=False)
        self.register_buffer("given", images.detach().to(z.dtype).clone(), persistent=False)
        self.register_buffer("tolerance", tolerance_of(self.given, options=options), persistent=False)
        self.step = 0
        self.in_run_fit, self._own_data, self.began = False, False, 0.0
        self.trace: StackTrace | None = None
        self._engine: Engine | None = None
        self._jitter: Jitter | JitterFeed | None = None

    @property
    def T(self) -> int:
        """Steps of the fit: the Trainer's ``max_steps``; ValueError if it has none."""
        steps = int(self.trainer.max_steps)
        if steps < 1:
            raise ValueError(
                "`max_steps` of the Trainer must be the number T of optimiser steps, at least 1, got "
                f"max_steps={steps} (max_epochs={self.trainer.max_epochs}): use pl.Trainer(max_steps=T)"
            )
        return steps

    @property
    def engine(self) -> Engine:
        """What computes a step: chosen when the Trainer asks for the optimiser, torch's outside of a fit."""
        if self._engine is None:
            self._engine = self._make_engine()
        return self._engine

    def forward(self, z: Tensor) -> Tensor:
        """All networks once: z [B, input_depth, H, W] -> [B, 3, H, W] in (0, 1)."""
        return self.net(z)

    def training_step(self, batch: Any, batch_idx: int) -> StepOutput:
        """Lines 3 and 7 of Algorithm 1; RuntimeError if the optimiser asks for it twice in a step, as LBFGS does."""
        if self._trainer is not None and self.step > self.trainer.global_step:
            raise RuntimeError(
                "the optimiser must call its closure once a step, got another call: t would not count steps"
            )
        step, self.step = self.step, self.step + 1
        z = self.z if self._jitter is None else self._jitter.next(self.z)
        loss, reconstructions, errors = self.engine.step(z)
        # Under autocast the network's output is shorter than x0.
        reconstructions = reconstructions.to(self.given.dtype)
        if not self._adds_to_the_loss:
            reconstructions = reconstructions.detach()
        if self._trainer is not None and (self.trainer.is_last_batch or self.step == self.T):
            # Before any callback, so that EarlyStopping and ModelCheckpoint find them whenever they look.
            with torch.autocast(self.device.type, enabled=False):  # which would round SSIM to two digits
                means = {"fit/mse": errors.mean(), "fit/quality": quality(reconstructions.detach(), self.given).mean()}
            self.trainer.callback_metrics.update(means)
        return {"loss": loss, "reconstructions": reconstructions, "errors": errors, "step": step}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam with its usual betas on the engine's parameters, and on z with ``optimise_z``."""
        # The first moment at which the device is known; later, Adam's moments would have to follow the weights.
        self._engine = self._make_engine()
        changed: list[Any] = [*self._engine.parameters(), *([self.z] if self.options.optimise_z else [])]
        # In mixed precision Lightning clips no gradients of a fused optimiser.
        clips = self._trainer is not None and self.trainer.gradient_clip_val is not None
        fused = not (clips and "mixed" in str(self.trainer.precision))
        return torch.optim.Adam(changed, lr=self.options.lr, fused=fused)

    def train_dataloader(self) -> Sequence[int]:
        """One item per step; their values are not used, since the images are the module's own."""
        self._own_data = True
        return range(self._epoch_length())

    def setup(self, stage: str) -> None:
        """Check the Trainer."""
        if stage == "fit":
            self._check_trainer()
            self._check_fresh()

    def on_fit_start(self) -> None:
        """Tell the Trainer's loggers the settings, and start the jitter's random streams."""
        settings = {**self.options.as_settings(), "steps_per_epoch": self.steps_per_epoch}
        for logger in () if self.in_run_fit else self.loggers:
            logger.log_hyperparams({f"fit/{name}": value for name, value in settings.items()})
        if self.options.jitter > 0:
            draw: dict[str, Any] = {"indices": self.indices, "seed": self.options.seed, "std": self.options.jitter}
            # A CUDA graph's step is over before one thread has drawn its noise; other engines gain nothing by threads.
            graph = self.engine.name == "cuda_graph"
            shape: Any = self.z.shape[1:]
            self._jitter = JitterFeed(shape, **draw, device=self.device) if graph else Jitter(shape, **draw)

    def on_train_start(self) -> None:
        """Refuse other data, and a resumed checkpoint, which Lightning restores after ``on_fit_start``."""
        self._check_fresh()
        if not self._own_data and type(self).train_dataloader is StackedDIP.train_dataloader:
            raise ValueError("Trainer.fit() must be given no data: a StackedDIP fits the images that it was made with")
        held = {id(p) for one in self.trainer.optimizers for group in one.param_groups for p in group["params"]}
        if held & ({*map(id, self.net.parameters())} - {*map(id, self.engine.parameters())}):
            raise RuntimeError(
                "`configure_optimizers` must optimise `self.engine.parameters()`, got the network's own, which have no "
                f"gradients with the engine {self.engine.name!r}"
            )
        self.began = time.perf_counter()

    def on_train_end(self) -> None:
        """In `run_fit`, let Adam's moments go unless a checkpoint takes them: Lightning would copy them from a GPU."""
        if self.in_run_fit and not self.trainer.checkpoint_callbacks:
            self.trainer.optimizers[0].state.clear()

    def on_fit_end(self) -> None:
        """Stop the threads that draw jitter ahead; the networks may have left the GPU, and with it its kernels."""
        self.close()
        use_first_kernels(self.net)

    def close(self) -> None:
        """Stop the threads that draw jitter ahead, also after an error, when Lightning calls no hook."""
        if isinstance(self._jitter, JitterFeed):
            self._jitter.close()

    def __getstate__(self) -> dict[str, Any]:
        """Without the engine, which is made anew when it is needed, and the threads that draw jitter."""
        return {**super().__getstate__(), "_engine": None, "_jitter": None}

    @property
    def _adds_to_the_loss(self) -> bool:
        return type(self).training_step is not StackedDIP.training_step

    def _make_engine(self) -> Engine:
        options, name, steps = self.options, "torch", 1
        if self._trainer is not None:
            name, steps, precision = options.engine, self.T, str(self.trainer.precision)
            needs = f"`precision` {precision!r} of the Trainer needs"
            if precision != "32-true" and options.matmul_precision != "float32":
                raise ValueError(f"{needs} `matmul_precision` 'float32', got {options.matmul_precision!r}")
            if "mixed" in precision:
                if name not in ("auto", "torch"):
                    raise ValueError(f"{needs} `engine` 'auto' or 'torch', got {name!r}")
                name = "torch"
        how: dict[str, Any] = {"z_gradient": options.optimise_z, "matmul_precision": options.matmul_precision}
        how["tolerance"] = self.tolerance
        return make_engine(name, self.net, self.given, steps=steps, differentiable=self._adds_to_the_loss, **how)

    def _epoch_length(self) -> int:
        T, epochs = self.T, self.trainer.max_epochs
        if self.steps_per_epoch is not None:
            return min(T, self.steps_per_epoch)
        needed = 1 if epochs is None or epochs < 1 else math.ceil(T / epochs)
        return min(T, max(STEPS_PER_EPOCH, needed))

    def _check_trainer(self) -> None:
        check_trainer_made(self.trainer)
        length, epochs, share = self._epoch_length(), self.trainer.max_epochs, self.trainer.limit_train_batches
        length = min(length, share) if isinstance(share, int) else int(share * length)
        if length < 1:
            raise ValueError(f"`limit_train_batches` of the Trainer must leave a step, got {share}")
        if epochs is not None and 0 < epochs and epochs * length < self.T:
            raise ValueError(
                f"`max_epochs` of the Trainer must allow for all {self.T} steps, got {epochs} epochs of {length} steps "
                "(`steps_per_epoch`): leave `max_epochs` out"
            )

    def _check_fresh(self) -> None:
        if self.step:
            raise RuntimeError(
                "a StackedDIP must be fitted once, got one whose networks are fitted already: its trace would lack the "
                "beginning. Make a new module for each fit"
            )
        done = self.trainer.global_step
        if done:
            raise RuntimeError(
                f"a fit of StackedDIP must start at step 0, got a Trainer at step {done}: its trace would lack the "
                "beginning. Use a new Trainer for each fit, and fit() without `ckpt_path`"
            )


def check_trainer_made(trainer: pl.Trainer) -> None:
    """ValueError if a Trainer, of whatever number of steps, cannot fit a :class:`StackedDIP`."""
    if trainer.world_size != 1:
        raise ValueError(f"`devices` of the Trainer must be a single one, got {trainer.world_size} processes")
    if not isinstance(trainer.strategy, SingleDeviceStrategy):  # DDP's buckets would reorder the gradients
        name = type(trainer.strategy).__name__
        raise ValueError(f"`strategy` of the Trainer must be that of a single device, 'auto', got {name}")
    batches = trainer.accumulate_grad_batches
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            batches = max(batches, *callback.scheduling.values())
    if batches != 1:
        raise ValueError(f"`accumulate_grad_batches` of the Trainer must be 1, got {batches}: a step sees all data")
    if str(trainer.precision) in ("16-true", "bf16-true"):
        raise ValueError(
            "`precision` of the Trainer must be one of 32-true, 64-true, 16-mixed, bf16-mixed, got "
            f"{trainer.precision!r}: SSIM and Adam need weights and images of at least 32 bits"
        )


def init_networks(
    images: Tensor, indices: Indices | None, *, options: FitOptions
) -> tuple[tuple[int, ...], StackedSkipNet, Tensor]:
    """The indices of B images, and their networks and z [B, input_depth, H, W] before the first step, on the CPU.

    TypeError or ValueError for bad indices, ValueError if the images are too small for the network.
    """
    order = tuple(check_indices(indices, count=len(images)))
    height, width = images.shape[-2:]
    options.spec.check_size(height, width)
    dtype = getattr(torch, options.dtype)
    made: dict[str, Any] = {"stack_size": len(order), "init": options.init, "padding": options.padding}
    net = build(options.spec, indices=order, seed=options.seed, dtype=dtype, **made)
    shape = (net.spec.input_depth, height, width)
    z = draw_z(shape, indices=order, seed=options.seed, kind=options.z, scale=options.scale_of_z)
    return order, net, z.to(dtype)


def tolerance_of(given: Tensor, *, options: FitOptions) -> Tensor | None:
    """Half widths of the dead zones of the loss of B images x0 [B, 3, H, W], [B]; None without dead zones."""
    return (options.dead_zone * image_noise(given)).to(given.dtype) if options.dead_zone > 0 else None


class Sample(NamedTuple):
    """One sampled step of a stack of B: x(t) [B, 3, H, W], logits [B, C], v(t) [B] and errors [B]."""

    step: int
    reconstructions: Tensor
    scores: Tensor
    quality: Tensor
    errors: Tensor


class Crossing(NamedTuple):
    """A cross-boundary pair: its first sample's number and quality; images [2, 3, H, W] and logits [2, C] of both."""

    at: int
    quality: float
    images: Tensor
    scores: Tensor


@dataclass(eq=False)
class StackTrace:
    """The growing trace of a stack of B images; :meth:`close` makes one ``DecisionTrace`` per image of it.

    The number of images that it keeps does not grow with T: it keeps the logits and scalars of the sampled steps, the
    last ``K_max`` reconstructions, and those crossings that some replay can still select
    (:func:`dipguard.decision.needed_for_replay`). The others are dropped when an image has more than twice ``K_max``,
    and at the end.
    """

    given: Tensor  # x0, [B, 3, H, W]
    given_scores: Tensor  # the victim's logits on them, [B, C]
    indices: tuple[int, ...]
    K_max: int  # the largest K of a replay
    settings: dict[str, Any]  # JSON values that describe the fit; each callback adds its own options

    def __post_init__(self) -> None:
        self.steps: list[int] = []  # sampled so far
        self.recent: list[Sample] = []  # those of the last `add`, preceded by the last one of the `add` before
        self.crossings: list[list[Crossing]] = [[] for _ in self.indices]
        # alpha [M] and on-boundary images [M, 3, H, W] of all kept crossings, localised at the end of the fit
        self.boundary = self.given.new_zeros(0), self.given.new_zeros(0, *self.given.shape[1:])
        self._last: deque[Tensor] = deque(maxlen=self.K_max)
        self._scalars: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, samples: Sequence[Sample]) -> None:
        """Append sampled steps, in order."""
        self.recent = [*self.recent[-1:], *samples]
        for sample in samples:
            self._last.append(sample.reconstructions)
            self.steps.append(sample.step)
            self._scalars.append((sample.scores, sample.quality, sample.errors))

    def add_crossings(self, at: int, which: Tensor, before: Sample, after: Sample) -> None:
        """Append the crossings of the images ``which`` [n] int64 between sample number ``at``, before, and the next."""
        images = torch.stack([before.reconstructions[which], after.reconstructions[which]], dim=1)
        scores = torch.stack([before.scores[which], after.scores[which]], dim=1)
        values = which.tolist(), before.quality[which].tolist()
        for b, v, two, logits in zip(*values, images, scores, strict=True):
            # Copies: a view would keep those of all images in memory.
            self.crossings[b].append(Crossing(at, v, two.clone(), logits.clone()))
            if len(self.crossings[b]) > 2 * self.K_max:
                self._drop_crossings(b)

    def needed_crossings(self) -> list[Crossing]:
        """Drop the crossings that no replay can select, and return the others, one image after the other."""
        for b in range(len(self.indices)):
            self._drop_crossings(b)
        return [crossing for found in self.crossings for crossing in found]

    def _drop_crossings(self, b: int) -> None:
        quality = torch.tensor([c.quality for c in self.crossings[b]], dtype=torch.float64, device="cpu")
        kept = needed_for_replay(quality, K_max=self.K_max).tolist()
        self.crossings[b] = [c for c, keep in zip(self.crossings[b], kept, strict=True) if keep]

    def close(self) -> list[DecisionTrace]:
        """One trace per image, on the CPU."""
        scores, quality, loss = (_gather([scalars[i] for scalars in self._scalars]) for i in range(3))
        stacked = {"given": self.given.cpu(), "given_scores": self.given_scores.cpu(), "scores": scores}
        stacked |= {"quality": quality, "loss": loss, "last": _gather(list(self._last))}
        alpha, on_boundary = (part.cpu() for part in self.boundary)
        steps = torch.tensor(self.steps, dtype=torch.int64, device="cpu")
        traces, end = [], 0
        for b, found in enumerate(self.crossings):
            own = slice(end, end := end + len(found))
            traces.append(
                DecisionTrace(
                    index=self.indices[b],
                    steps=steps,
                    crossing_at=torch.tensor([c.at for c in found], dtype=torch.int64, device="cpu"),
                    alpha=alpha[own].clone(),
                    on_boundary=on_boundary[own].clone(),
                    settings=dict(self.settings),
                    **{name: tensor[b].clone() for name, tensor in stacked.items()},
                )
            )
        return traces


def _gather(sampled: list[Tensor]) -> Tensor:
    """S tensors [B, ...] -> [B, S, ...] on the CPU."""
    return torch.stack(sampled, dim=1).cpu()
