"""The stacked DIP fit as a LightningModule (Eq. 2; Algorithm 1, lines 1-8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

import pytorch_lightning as pl
import torch
from torch import Tensor

from dipguard.checks import check_choice, check_float, check_images
from dipguard.engines import Engine, make_engine
from dipguard.engines.base import check_products
from dipguard.engines.jitter_feed import JitterFeed
from dipguard.fit.cohort import Cohort, Waiting, row_ranges
from dipguard.fit.jitter_source import JitterSource, jitter_source
from dipguard.fit.noise import Z_KINDS, draw_z
from dipguard.fit.staggered_adam import StaggeredAdam
from dipguard.networks import INITS, PADDINGS, NetworkSpec, StackedSkipNet, build, resolve

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How the DIP network is fitted: appendix B, and the readings that the paper leaves open.

    Attributes:
        network: A preset of appendix B, or a spec.
        seed: Seed of weights, z and jitter.
        z: ``uniform`` (appendix B) or ``gaussian`` (section 3.1).
        z_scale: Upper end or standard deviation of z; None takes the preset's (appendix B).
        jitter: Standard deviation of the noise added to z at each step; 0 for none.
        init: ``default`` (PyTorch's) or ``xavier`` (Algorithm 1, line 1).
        padding: ``zeros`` or ``reflect``.
        lr: Adam's learning rate (appendix B: 0.01, no decay).
        dtype: ``float32`` or ``float64``.
        engine: Who computes a step: ``auto``, ``torch``, ``native`` or ``cuda_graph``
            (:func:`dipguard.engines.make_engine`).
        optimise_z: Adam changes z too, below the jitter. Ding et al. keep z fixed; Dai et al. 2020 (DIPDefend) do not.
        precision: ``float32``, or ``tf32`` or ``bfloat16`` for the network's products, with the engines ``torch`` and
            ``cuda_graph`` (:mod:`dipguard.engines.precision`). Both change results; whether accuracy suffers is what
            ``benchmarks/precision_accuracy.py`` finds out.
    """

    network: str | NetworkSpec = "cifar10"
    seed: int = 0
    z: str = "uniform"
    z_scale: float | None = None
    jitter: float = 0.0
    init: str = "default"
    padding: str = "zeros"
    lr: float = 0.01
    dtype: str = "float32"
    engine: str = "auto"
    optimise_z: bool = False
    precision: str = "float32"

    def __post_init__(self) -> None:
        resolve(self.network)
        check_float(self.jitter, name="jitter", low=0.0)
        check_choice(self.z, Z_KINDS, name="z")
        if self.z_scale is not None and check_float(self.z_scale, name="z_scale", low=0.0) == 0:
            raise ValueError("`z_scale` must be above 0, got 0")
        check_choice(self.init, INITS, name="init")
        check_choice(self.padding, PADDINGS, name="padding")
        if check_float(self.lr, name="lr", low=0.0) == 0:
            raise ValueError("`lr` must be above 0, got 0")
        check_choice(self.dtype, DTYPES, name="dtype")
        check_products(self.precision, engine=self.engine)
        if self.precision != "float32" and self.dtype != "float32":
            raise ValueError(f"`precision` {self.precision!r} needs `dtype` 'float32', got {self.dtype!r}")
        if not isinstance(self.optimise_z, bool):
            raise TypeError(f"`optimise_z` must be true or false, got {self.optimise_z!r}")

    def as_settings(self) -> dict[str, Any]:
        """The options as JSON can hold them, z_scale resolved; ``precision`` only where it is not float32.

        Fits stored before there was such an option are told by these settings.
        """
        settings = asdict(self)
        if self.precision == "float32":
            del settings["precision"]
        spec = resolve(self.network)
        if isinstance(self.network, NetworkSpec):
            settings["network"] = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(spec).items()}
        settings["z_scale"] = spec.z_scale if self.z_scale is None else self.z_scale
        return settings


class StepOutput(TypedDict):
    """What one training step hands to Lightning and to the callbacks.

    Attributes:
        loss: Sum over images of the mean squared error, so that no image's gradient depends on B.
        reconstructions: x(t), before this step's update, [B, 3, H, W].
        errors: Mean squared error of each image, [B].
    """

    loss: Tensor
    reconstructions: Tensor
    errors: Tensor


class StackedDIP(pl.LightningModule):
    """B images, B independent DIP networks, one optimiser.

    Adam acts on each number alone, so one Adam over stacked parameters is B Adams. Batch item and data play no role:
    the images are the module's own, and the Trainer's ``max_steps`` is the paper's T, unless images wait for a place
    in the stack (:mod:`dipguard.fit.slots`): then T is theirs, and the Trainer goes on until all are fitted.

    Args:
        images: The given images x0, [B, 3, H, W] in [0, 1].
        indices: Their indices in the data set, 0 ... B-1 by default; every random draw of an image depends on (seed,
            index) alone.
        options: See :class:`FitOptions`.
        waiting: Images that take the places of those that leave.

    Attributes:
        cohorts: The images that are being fitted, in the order of the stack.
        finished: Cohorts none of whose images is fitted any more.
        spared: Image-steps that need not be done, because images left before their T-th.

    Raises:
        TypeError, ValueError: Bad images or options, or images too small for the network.
    """

    given: Tensor
    z: Tensor

    def __init__(
        self,
        images: Tensor,
        *,
        indices: Sequence[int] | None = None,
        options: FitOptions | None = None,
        waiting: Waiting | None = None,
    ) -> None:
        super().__init__()
        check_images(images)
        self.options = options = FitOptions() if options is None else options
        self.indices = tuple(range(len(images)) if indices is None else (int(i) for i in indices))
        if len(self.indices) != len(images):
            raise ValueError(f"`indices` must hold one index an image ({len(images)}), got {len(self.indices)}")
        self.net, z = start(self.indices, options=options, size=(images.shape[-2], images.shape[-1]))
        if options.optimise_z:
            self.z = torch.nn.Parameter(z)
        else:
            self.register_buffer("z", z, persistent=False)
        self.register_buffer("given", images.detach().to(z.dtype).clone(), persistent=False)
        self.waiting = waiting
        self.cohorts = [Cohort(0, tuple(range(len(images))), len(images))]
        self.finished: list[Cohort] = []
        self.spared = 0
        self._engine: Engine | None = None

    @property
    def T(self) -> int:
        """Steps of each image's fit."""
        return int(self.trainer.max_steps) if self.waiting is None else self.waiting.T

    def on_fit_start(self) -> None:
        """Start the jitter's streams anew."""
        for cohort, rows in zip(self.cohorts, row_ranges(self.cohorts), strict=True):
            cohort.jitter = self.jitter_for(self.indices[rows])

    def on_fit_end(self) -> None:
        """Let go of the threads that draw ahead."""
        for cohort in self.cohorts:
            if isinstance(cohort.jitter, JitterFeed):
                cohort.jitter.close()

    def jitter_for(self, indices: Sequence[int]) -> JitterSource | None:
        """The noise of these images, from their first step on."""
        shape = (self.z.shape[1], self.z.shape[2], self.z.shape[3])
        seed, std = self.options.seed, self.options.jitter
        return jitter_source(shape, indices=indices, seed=seed, std=std, engine=self.engine.name, device=self.device)

    def forward(self, z: Tensor) -> Tensor:
        """All networks once: z [B, input_depth, H, W] -> [B, 3, H, W] in (0, 1)."""
        out: Tensor = self.net(z)
        return out

    @property
    def engine(self) -> Engine:
        """Who computes a step; chosen when the Trainer asks for the optimiser, torch's outside of a fit."""
        if self._engine is None:
            self._engine = make_engine("torch", self.net, self.given, steps=1, z_gradient=self.options.optimise_z)
        return self._engine

    def training_step(self, batch: Any, batch_idx: int) -> StepOutput:
        """Lines 3 and 7 of Algorithm 1."""
        step = self.engine.step(self._moved_z())
        return {"loss": step.loss, "reconstructions": step.reconstructions, "errors": step.errors}

    def _moved_z(self) -> Tensor:
        parts = [
            self.z[rows] if cohort.jitter is None else cohort.jitter.next(self.z[rows])
            for cohort, rows in zip(self.cohorts, row_ranges(self.cohorts), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam with its usual betas on the networks, and on z if asked, fused into one pass over a tensor's numbers."""
        # The first moment at which the device is known; later, Adam's moments would have to follow the weights.
        options = self.options
        more: dict[str, Any] = {"z_gradient": options.optimise_z, "products": options.precision}
        self._engine = make_engine(options.engine, self.net, self.given, steps=self.T, **more)
        changed: list[Any] = [*self._engine.parameters(), *([self.z] if options.optimise_z else [])]
        if self.waiting is not None:
            return StaggeredAdam(changed, lr=options.lr)
        return torch.optim.Adam(changed, lr=options.lr, fused=True)

    def train_dataloader(self) -> Sequence[int]:
        """One step an item: the images are the module's own."""
        return range(max(1, int(self.trainer.max_steps)))


def start(indices: Sequence[int], *, options: FitOptions, size: tuple[int, int]) -> tuple[StackedSkipNet, Tensor]:
    """The networks of these images before their first step, and z [B, input_depth, H, W], on the CPU.

    Raises:
        ValueError: An image of ``size`` (H, W) is too small for the network.
    """
    net = build(
        options.network,
        stack_size=len(indices),
        seed=options.seed,
        indices=indices,
        init=options.init,
        padding=options.padding,
        dtype=DTYPES[options.dtype],
    )
    net.spec.check_size(*size)
    scale = net.spec.z_scale if options.z_scale is None else options.z_scale
    shape = (net.spec.input_depth, *size)
    z = draw_z(shape, indices=indices, seed=options.seed, kind=options.z, scale=scale)
    return net, z.to(DTYPES[options.dtype])
