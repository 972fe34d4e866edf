"""Images leave a stack while it is fitted, and others take their places."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dipguard.engines.base import joined_rows, kept_rows
from dipguard.engines.jitter_feed import JitterFeed
from dipguard.fit.cohort import Cohort, row_ranges
from dipguard.fit.module import StackedDIP, start
from dipguard.fit.staggered_adam import StaggeredAdam


def release(module: StackedDIP, optimizer: torch.optim.Optimizer, stay: Sequence[Sequence[int]]) -> None:
    """Go on with some images alone: x0, z, jitter, weights and Adam's moments. At least one must stay.

    Args:
        module: Between two steps.
        optimizer: Its own.
        stay: Of each cohort, the numbers of its rows that stay, in increasing order.
    """
    rows = [part.start + row for part, own in zip(row_ranges(module.cohorts), stay, strict=True) for row in own]
    kept = torch.tensor(rows, device=module.given.device)
    with torch.no_grad():
        module.engine.keep(kept)
        module.indices = tuple(module.indices[b] for b in rows)
        module.given = module.given[kept]
        _set_z(module, kept_rows(module.z.data, kept))
        for cohort, own in zip(module.cohorts, stay, strict=True):
            cohort.rows = len(own)
            if own and cohort.jitter is not None:
                cohort.jitter.keep(list(own))
            elif isinstance(cohort.jitter, JitterFeed):
                cohort.jitter.close()
        module.finished += [cohort for cohort in module.cohorts if not cohort.rows]
        module.cohorts = [cohort for cohort in module.cohorts if cohort.rows]
        if isinstance(optimizer, StaggeredAdam):
            optimizer.keep(rows)
            return
        for moments in optimizer.state.values():
            for name, value in moments.items():
                if value.ndim:  # the number of steps is one for all
                    moments[name] = kept_rows(value, kept)


def refill(module: StackedDIP, optimizer: torch.optim.Optimizer, *, fitted: int, next_step: int) -> int:
    """Let waiting images begin behind the others; returns how many.

    Args:
        module: Between two steps.
        optimizer: Its own.
        fitted: Images that go on; the others are about to be released.
        next_step: The Trainer's step that will be the newcomers' first.
    """
    waiting = module.waiting
    if waiting is None or not isinstance(optimizer, StaggeredAdam):
        return 0
    part = waiting.take(fitted)
    images, indices = waiting.images[part], waiting.indices[part]
    if not indices:
        return 0
    with torch.no_grad():
        given = images.detach().to(module.given)
        net, z = start(indices, options=module.options, size=(given.shape[-2], given.shape[-1]))
        module.engine.join(net.to(given.device), given)
        module.indices += indices
        module.given = torch.cat([module.given, given])
        _set_z(module, joined_rows(module.z.data, z.to(given)))
        optimizer.join(len(indices))
    places = range(waiting.slots + part.start, waiting.slots + part.stop)
    module.cohorts.append(Cohort(next_step, tuple(places), len(indices), module.jitter_for(indices)))
    return len(indices)


def _set_z(module: StackedDIP, z: Tensor) -> None:
    if isinstance(module.z, nn.Parameter):
        module.z.grad = None
        module.z.data = z
    else:
        module.z = z
