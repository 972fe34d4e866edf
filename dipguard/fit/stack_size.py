"""How many images are fitted at once, where nobody says it: what fits into memory and was measured to be fast."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch

from dipguard.engines import make_engine
from dipguard.fit.image_memory import images_in_memory
from dipguard.fit.module import FitOptions, StackedDIP
from dipguard.fit.out_of_memory import free, is_out_of_memory
from dipguard.fit.runner import DecideOptions, apart, make_trainer
from dipguard.networks import NetworkSpec, resolve

WARM, TIMED = 2, 4
"""Steps of a candidate before the clock starts, and on it; the fastest counts: others' work can only slow a step."""
PAYS = 0.02
"""Share of the whole job that measuring may take."""
GOOD = 1.05
"""The smallest size counts as best that takes at most so many times as long as the fastest."""


@dataclass(frozen=True)
class _Sizes:
    """Those to choose from, and the one for jobs that are too short to choose."""

    candidates: tuple[int, ...]
    default: int


SIZES = {
    "cpu": _Sizes((8, 16, 32, 64, 128), default=32),
    "cuda": _Sizes((8, 16, 32, 64, 128, 256, 512, 1024), default=256),
}
_Key = tuple[torch.device, NetworkSpec, tuple[int, int], str, str]
_best: dict[_Key, int] = {}  # measured once a process, since the next clock may choose otherwise


def choose_stack_size(
    count: int, *, size: tuple[int, int], fit: FitOptions, decide: DecideOptions, device: torch.device
) -> int:
    """How many of ``count`` images are best fitted at once.

    Half of the free memory is an upper bound. Below it a job that is long enough (2 % of its steps must suffice) times
    a few steps of several sizes, once a process for each device, network, image size, dtype and engine, and takes the
    smallest that is within 5 % of the fastest; a shorter job takes a fixed size. In float32, with the torch engine,
    rounding depends on the stack size, and Adam amplifies rounding: pass a recorded size on to repeat such a fit.

    Args:
        count: Images of the whole job.
        size: Their height and width, pixels.
        fit: How they are fitted.
        decide: How long, and what is kept.
        device: Where.

    Returns:
        A power of two, whether or not there are as many images.
    """
    sizes = SIZES["cuda" if device.type == "cuda" else "cpu"]
    with apart(device):
        engine = _engine_name(size, fit=fit, T=decide.T, device=device)
        bound = images_in_memory(size, fit=fit, decide=decide, engine=engine, device=device)
        most = sizes.candidates[-1] if bound is None else 2 ** int(math.log2(bound))
        key = (device, resolve(fit.network), size, fit.dtype, engine)
        candidates = [n for n in sizes.candidates if n <= min(most, count)]
        pays = (WARM + TIMED) * sum(candidates) <= PAYS * count * decide.T
        if key not in _best and pays and len(candidates) > 1:
            times = measure(candidates, size=size, fit=replace(fit, engine=engine), device=device)
            _best[key] = smallest_good(times)
    return min(_best.get(key, sizes.default), most)


def measure(
    candidates: Sequence[int], *, size: tuple[int, int], fit: FitOptions, device: torch.device
) -> dict[int, float]:
    """Seconds an image-step in stacks of so many images, the Trainer's share included and the victim's not.

    Larger candidates than the first that runs out of memory are left out.
    """
    times: dict[int, float] = {}
    for count in candidates:
        ramp = torch.linspace(0, 1, 3 * size[0] * size[1]).view(1, 3, *size)
        clock = _Clock(device)
        try:
            trainer = make_trainer(WARM + TIMED, device=device, callbacks=[clock], logger=None)
            trainer.fit(StackedDIP(ramp.expand(count, -1, -1, -1), options=fit))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not times:
                raise
            break
        times[count] = min(clock.steps[WARM:]) / count
        del trainer
        free(device)
    return times


def smallest_good(times: dict[int, float]) -> int:
    """The smallest size that is within 5 % of the fastest."""
    return min(size for size, seconds in times.items() if seconds <= GOOD * min(times.values()))


class _Clock(pl.Callback):
    """Seconds of each step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[float] = []
        self._last = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self._last = self._now()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = self._now()
        self.steps.append(now - self._last)
        self._last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _engine_name(size: tuple[int, int], *, fit: FitOptions, T: int, device: torch.device) -> str:
    """Which engine a fit gets."""
    if device.type != "cpu":
        return fit.engine
    module = StackedDIP(torch.full((1, 3, *size), 0.5), options=fit)
    return make_engine(fit.engine, module.net, module.given, steps=T).name
