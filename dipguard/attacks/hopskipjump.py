"""HopSkipJump against a defended victim, with every query counted, as in Figure 5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dipguard.attacks.cost import Cost
from dipguard.attacks.defense_aware import DefenseAwareAttack, Purifies
from dipguard.attacks.hsj_walk import NORMS, walk
from dipguard.attacks.query_search import QueryCurve, QuerySearch
from dipguard.checks import check_choice, check_int
from dipguard.seeding import image_generator

FIGURE_5 = (200, 1000, 2500)
"""The query budgets of Figure 5."""


class HopSkipJump(DefenseAwareAttack):
    """HopSkipJump (Chen, Jordan and Wainwright, 2020): needs nothing but decisions, and few of them.

    An image that goes through defence and victim is one query, from the first look at the clean image on; a walk ends
    when the largest budget is spent, whatever the defence answers. All walks of a batch are asked about together;
    they do not influence each other. The nearest image that was ever *seen* to be adversarial counts, so on a random
    defence with ``fresh`` draws an attack's success is what the attacker saw: `report` says what the evaluation sees.

    The paper names neither norm nor settings for Figure 5; its eps up to 25 is read as L-inf in levels of 0 to 255,
    like the eps of its other figures.

    Args:
        victim: as in `DefenseAwareAttack`.
        defense: as in `DefenseAwareAttack`.
        norm: ``Linf`` or ``L2``, the distance that is made small.
        queries: largest number of queries an image, at least 1.
        init_size: noise images tried as a start, at least 1.
        init_eval: probes of the first gradient, at least 2.
        together: images that are purified and read at once, at least 1.
        draws: as in `DefenseAwareAttack`.
        seed: as in `DefenseAwareAttack`; an image's draws depend on the seed and its index alone.
        batch_size: images attacked together, at least 1.
    """

    name: ClassVar[str] = "hopskipjump"

    def __init__(
        self,
        victim: nn.Module,
        defense: Purifies,
        *,
        norm: str = "Linf",
        queries: int = 2500,
        init_size: int = 100,
        init_eval: int = 100,
        together: int = 128,
        draws: str = "fresh",
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(victim, defense, draws=draws, seed=seed, batch_size=batch_size)
        self.norm = check_choice(norm, NORMS, name="norm")
        self.queries = check_int(queries, name="queries", low=1)
        self.init_size = check_int(init_size, name="init_size", low=1)
        self.init_eval = check_int(init_eval, name="init_eval", low=2)
        self.together = check_int(together, name="together", low=1)

    @property
    def settings(self) -> dict[str, Any]:
        """As in `DefenseAwareAttack`, with norm, queries and the sizes of start and probes."""
        own = {"queries": self.queries, "init_size": self.init_size, "init_eval": self.init_eval}
        return {**super().settings, **own, "together": self.together}

    def estimate(self, count: int, *, queries: int | None = None) -> Cost:
        """Most that attacking ``count`` images costs with so many ``queries`` each (by default the largest number).

        It is less where an image is read wrongly from the start, or where no start is found.
        """
        return self.cost_of(purifications=count * (self.queries if queries is None else queries))

    def __call__(self, images: Tensor, labels: Tensor, *, indices: Tensor | None = None) -> Tensor:
        """Return the nearest adversarial images after ``queries`` queries; see `curve` for arguments and errors."""
        return self.curve(images, labels, budgets=(self.queries,), indices=indices).images[self.queries]

    def curve(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        budgets: Sequence[int] = FIGURE_5,
        indices: Tensor | None = None,
    ) -> QueryCurve:
        """Return what was found within each of ``budgets`` queries an image, from one run of the largest.

        Args:
            images: float [N, 3, H, W] in [0, 1], not purified.
            labels: int [N], the true classes.
            budgets: numbers of queries, each at least 1.
            indices: int [N], positions in the whole data set; by default 0 to N - 1.

        Raises:
            TypeError, ValueError: bad images, labels, indices or budgets.
            RuntimeError: the defence broke its promise.
        """
        wanted = tuple(sorted({check_int(number, name="budgets", low=1) for number in budgets}))
        if not wanted:
            raise ValueError("`budgets` must name at least one number of queries, got none")
        searches: list[QuerySearch] = []

        def attack(x: Tensor, y: Tensor, positions: Tensor) -> list[Tensor]:
            made = self._search(x, y, positions, wanted)
            searches.extend(made)
            return [torch.stack([search.at(budget)[0] for search in made]).to(x) for budget in wanted]

        found = self.run_batches(images, labels, indices, attack)
        distances = (torch.tensor([search.at(budget)[1] for search in searches]) for budget in wanted)
        return QueryCurve(
            norm=self.norm,
            images=dict(zip(wanted, found, strict=True)),
            distances={budget: values.to(images.device) for budget, values in zip(wanted, distances, strict=True)},
            queries=torch.tensor([search.queries for search in searches], device=images.device),
        )

    def _search(self, images: Tensor, labels: Tensor, indices: Tensor, budgets: tuple[int, ...]) -> list[QuerySearch]:
        searches = []
        for image, label, index in zip(images.cpu(), labels.tolist(), indices.tolist(), strict=True):
            generator = image_generator(seed=self.seed, index=index, purpose="hopskipjump")
            route = walk(image, generator, norm=self.norm, init_size=self.init_size, init_eval=self.init_eval)
            searches.append(QuerySearch(image, label, route, self.norm, budgets))
        while live := [at for at, search in enumerate(searches) if search.asked is not None]:
            self._ask([searches[at] for at in live], indices[live], images.device)
        return searches

    def _ask(self, searches: list[QuerySearch], indices: Tensor, device: torch.device) -> None:
        """Put the open questions of all searches to the defended victim, and hand out the answers."""
        questions = [search.asked for search in searches if search.asked is not None]
        sizes = [len(question) for question in questions]
        looks = torch.cat([search.queries + torch.arange(n) for search, n in zip(searches, sizes, strict=True)])
        order = self.ask_indices(indices.repeat_interleave(torch.tensor(sizes)), looks)
        parts = zip(torch.cat(questions).split(self.together), order.split(self.together), strict=True)
        with torch.no_grad():
            decisions = torch.cat([self.decide(part.to(device), positions).cpu() for part, positions in parts])
        self.spent += self.cost_of(purifications=len(decisions))
        for search, answers in zip(searches, decisions.split(sizes), strict=True):
            search.answer(answers)
