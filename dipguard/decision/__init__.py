"""The paper's equations and our class scores as pure functions, and the decision trace that they act on."""

from dipguard.decision.boundary import crosses, localise, needed_for_replay, passes
from dipguard.decision.quality import quality
from dipguard.decision.stitching import Reconstruction, on_manifold, select, stitch, stitch_images
from dipguard.decision.trace import DecisionTrace, sampled_steps

__all__ = [
    "DecisionTrace", "Reconstruction", "crosses", "localise", "needed_for_replay", "on_manifold", "passes", "quality",
    "sampled_steps", "select", "stitch", "stitch_images",
]  # fmt: skip
