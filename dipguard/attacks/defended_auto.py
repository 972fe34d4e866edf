"""AutoAttack's version for random victims, and Square, on victim and defence as one system."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dipguard.attacks.best_found import BestFound
from dipguard.attacks.cost import Cost
from dipguard.attacks.defended_search import DefendedSearch
from dipguard.attacks.defended_system import DefendedSystem, apart_by, nearest
from dipguard.attacks.defense_aware import Purifies
from dipguard.attacks.libraries import torchattacks
from dipguard.attacks.torchattacks_auto import LOSSES, VERSIONS
from dipguard.checks import check_choice, check_float, check_int
from dipguard.victims.base import check_victim

RAND = ("ce", "dlr")
"""The losses of AutoAttack's version ``rand``: one run of APGD each."""


class DefendedAutoAttack(DefendedSearch):
    """AutoAttack's version ``rand`` (Croce and Hein 2020) on a defended victim: APGD-CE, then APGD-DLR on what is left.

    torchattacks' APGD takes the steps; the gradient is BPDA's identity. AutoAttack averages 20 looks (``eot_iter``) and
    takes 100 ``steps``: a figure that shall stand beside its authors' needs both. The draws of a batch's starts depend
    on the seed and the index of its first image, so batch mates play a part.

    Args:
        victim: as in `DefendedSearch`; at least 3 classes, for the DLR loss.
        defense: as in `DefendedSearch`.
        eps_255: as in `DefendedSearch`.
        steps: steps of each run, at least 1; each run has one look more.
        eot_iter: draws whose gradients are averaged at each step, at least 1; with ``fixed`` draws more than 1 only
            costs.
        draws: as in `DefendedSearch`.
        seed: as in `DefendedSearch`.
        batch_size: as in `DefendedSearch`.
    """

    name: ClassVar[str] = "defended_autoattack"

    def __init__(
        self,
        victim: nn.Module,
        defense: Purifies,
        *,
        eps_255: float = 8,
        steps: int = 10,
        eot_iter: int = 1,
        draws: str = "fixed",
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(victim, defense, eps_255=eps_255, draws=draws, seed=seed, batch_size=batch_size)
        self.steps = check_int(steps, name="steps", low=1)
        self.eot_iter = check_int(eot_iter, name="eot_iter", low=1)
        self._version = str(torchattacks().__version__)

    @property
    def settings(self) -> dict[str, Any]:
        """As in `DefendedSearch`, with steps, draws averaged, the library and its version."""
        own = {"version": "rand", "steps": self.steps, "eot_iter": self.eot_iter}
        return {**super().settings, **own, "library": "torchattacks", "library_version": self._version}

    def estimate(self, count: int) -> Cost:
        """Most that attacking ``count`` images costs; less where the first run fooled some."""
        looks = count * self.eot_iter * (self.steps + 1) * len(RAND)
        return self.cost_of(purifications=looks, gradients=looks)

    def search(self, found: BestFound, indices: Tensor) -> None:
        """Run both; see `DefendedSearch.search`."""
        num_classes, least = check_victim(self.victim, found.given[:1]).shape[1], VERSIONS["rand"]
        if num_classes < least:
            raise ValueError(f"`victim` must have at least {least} classes for {self.name!r}, got {num_classes}")
        looks = torch.zeros_like(indices)
        for loss in RAND:
            left = torch.nonzero(found.withstood).flatten()
            if len(left) == 0:
                return
            asked: dict[str, Any] = {"looks": looks, "rows": partial(_all, left), "eot_iter": self.eot_iter}
            system = DefendedSystem(self, found, indices, **asked)
            run = torchattacks().APGD(
                system, norm="Linf", eps=self.budget, steps=self.steps, loss=loss, eot_iter=self.eot_iter
            )
            # Not the object itself: it would leave out images by a look of its own.
            run.attack_single_run(found.given[left], found.labels[left])


class DefendedSquare(DefendedSearch):
    """Square attack (Andriushchenko et al. 2020) on a defended victim: random search by squares, no gradients.

    The search is torchattacks'. An image's queries end once it was misread. `history` counts looks as steps;
    `last_history` is about what was tried there, whether the search kept it or not. One square is drawn for all images
    of a batch, so batch mates influence each other; images of a batch whose balls overlap are searched one group after
    the other, since the search does not say which image it asks about.

    Args:
        victim: as in `DefendedSearch`.
        defense: as in `DefendedSearch`.
        eps_255: as in `DefendedSearch`.
        n_queries: most looks at an image, at least 2: stripes, then a square more each time.
        p_init: share of the pixels in the first squares, above 0 and at most 1.
        loss: ``margin`` or ``ce``, what is to fall.
        draws: as in `DefendedSearch`.
        seed: as in `DefendedSearch`.
        batch_size: as in `DefendedSearch`.
    """

    name: ClassVar[str] = "defended_square"

    def __init__(
        self,
        victim: nn.Module,
        defense: Purifies,
        *,
        eps_255: float = 8,
        n_queries: int = 500,
        p_init: float = 0.8,
        loss: str = "margin",
        draws: str = "fixed",
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(victim, defense, eps_255=eps_255, draws=draws, seed=seed, batch_size=batch_size)
        self.n_queries = check_int(n_queries, name="n_queries", low=2)
        self.p_init = check_float(p_init, name="p_init", low=0, high=1)
        if self.p_init == 0:
            raise ValueError("`p_init` must be above 0 and at most 1, got 0")
        self.loss = check_choice(loss, LOSSES, name="loss")
        self._version = str(torchattacks().__version__)

    @property
    def settings(self) -> dict[str, Any]:
        """As in `DefendedSearch`, with queries, squares, loss, the library and its version."""
        own = {"n_queries": self.n_queries, "p_init": self.p_init, "loss": self.loss}
        return {**super().settings, **own, "library": "torchattacks", "library_version": self._version}

    def estimate(self, count: int) -> Cost:
        """Most that attacking ``count`` images costs; less where images are misread before their queries are spent."""
        return self.cost_of(purifications=count * self.n_queries)

    def search(self, found: BestFound, indices: Tensor) -> None:
        """Try squares; see `DefendedSearch.search`."""
        for group in apart_by(2 * self.budget, found.given):
            given = found.given[group]
            looks = torch.zeros_like(indices)
            system = DefendedSystem(self, found, indices, looks=looks, rows=partial(_among, group, given))
            run = torchattacks().Square(
                system,
                norm="Linf",
                eps=self.budget,
                n_queries=self.n_queries - 1,
                p_init=self.p_init,
                loss=self.loss,
            )
            # Not the object itself, which would look at the images before and after the search.
            run.init_hyperparam(given)
            run.attack_single_run(given, found.labels[group])


def _all(rows: Tensor, images: Tensor) -> Tensor:
    return rows


def _among(rows: Tensor, given: Tensor, images: Tensor) -> Tensor:
    return rows[nearest(images.detach(), given)]
