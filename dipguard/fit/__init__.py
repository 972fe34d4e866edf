"""The stacked fit: a LightningModule and the callbacks that watch it."""

from dipguard.fit.boundary_detector import BoundaryDetector
from dipguard.fit.decider import Decider
from dipguard.fit.decision_logger import DecisionLogger
from dipguard.fit.module import FitOptions, StackedDIP
from dipguard.fit.progress import FitProgress, progress_bar
from dipguard.fit.runner import DecideOptions, StackResult, fit_stack
from dipguard.fit.stitcher import Stitcher, StitchOptions

__all__ = [
    "BoundaryDetector",
    "DecideOptions",
    "Decider",
    "DecisionLogger",
    "FitOptions",
    "FitProgress",
    "StackResult",
    "StackedDIP",
    "StitchOptions",
    "Stitcher",
    "fit_stack",
    "progress_bar",
]
