"""What a defence-aware attack costs: estimated before it runs, counted while it does."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Cost:
    """Work of an attack on a defended victim; costs add up.

    Attributes:
        purifications: images that the defence purified.
        dip_steps: optimiser steps of deep image priors in them (purifications x the defence's ``steps_per_image``).
        victim_queries: purified images that the victim read for the attack. What a defence asks the victim while it
            purifies is part of the purification.
        gradients: images for which the victim was differentiated.
    """

    purifications: int = 0
    dip_steps: int = 0
    victim_queries: int = 0
    gradients: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Cost)))

    def __str__(self) -> str:
        return (
            f"{self.purifications:,} purifications ({self.dip_steps:,} DIP steps), {self.victim_queries:,} victim "
            f"queries, {self.gradients:,} gradients"
        )
