"""The stacked fit: a LightningModule and the callbacks that watch it."""

from dipguard.fit.boundary_detector import BoundaryDetector
from dipguard.fit.decider import Decider
from dipguard.fit.decision_logger import DecisionLogger
from dipguard.fit.module import FitOptions, StackedDIP
from dipguard.fit.placement import ACCELERATORS, fit_device
from dipguard.fit.progress import FitProgress, progress_bar
from dipguard.fit.retire import Retirement
from dipguard.fit.runner import DecideOptions, StackResult, fit_stack
from dipguard.fit.stack_size import choose_stack_size
from dipguard.fit.stacks import in_stacks
from dipguard.fit.stitcher import Stitcher, StitchOptions

__all__ = [
    "ACCELERATORS",
    "BoundaryDetector",
    "DecideOptions",
    "Decider",
    "DecisionLogger",
    "FitOptions",
    "FitProgress",
    "Retirement",
    "StackResult",
    "StackedDIP",
    "StitchOptions",
    "Stitcher",
    "choose_stack_size",
    "fit_device",
    "fit_stack",
    "in_stacks",
    "progress_bar",
]
