"""The stacked fit: a LightningModule and the callbacks that watch it."""

from dipguard.fit.callbacks import BoundaryDetector, DecisionLogger, Stitcher, StopRuleCallback
from dipguard.fit.module import StackedDIP
from dipguard.fit.options import DecideOptions, FitOptions, StitchOptions
from dipguard.fit.runner import (
    StackResult,
    check_trainer,
    fit_device,
    fit_stack,
    isolated_trainer,
    make_trainer,
    run_fit,
)
from dipguard.fit.stacks import FitProgress, in_stacks, stack_size_for
from dipguard.fit.unrolled import unrolled_fit
from dipguard.fit.window_logger import WindowLogger

__all__ = [
    "BoundaryDetector", "DecideOptions", "DecisionLogger", "FitOptions", "FitProgress", "StackResult",
    "StackedDIP", "StitchOptions", "Stitcher", "StopRuleCallback", "WindowLogger", "check_trainer", "fit_device",
    "fit_stack", "in_stacks", "isolated_trainer", "make_trainer", "run_fit", "stack_size_for", "unrolled_fit",
]  # fmt: skip
