"""The choices that a setting may have; Hydra names them when it refuses another."""

from __future__ import annotations

from enum import StrEnum


class LoggerName(StrEnum):
    """Where the course of the fit is logged."""

    csv = "csv"
    tensorboard = "tensorboard"
    wandb = "wandb"
    none = "none"


class DefenseName(StrEnum):
    """What train.py defends with."""

    paper = "paper"
    dipguard = "dipguard"


class NetworkName(StrEnum):
    """The presets of appendix B."""

    cifar10 = "cifar10"
    imagenet = "imagenet"
    small = "small"
    medium = "medium"
    large = "large"


class Accelerator(StrEnum):
    """Where the fit runs; ``auto`` takes a GPU where there is one."""

    auto = "auto"
    cpu = "cpu"
    gpu = "gpu"


class Precision(StrEnum):
    """Number format of the fit."""

    float32 = "float32"
    float64 = "float64"


class Products(StrEnum):
    """Precision of the network's products inside a float32 fit."""

    float32 = "float32"
    tf32 = "tf32"
    bfloat16 = "bfloat16"


class EngineName(StrEnum):
    """Who computes a fit step; ``auto`` takes the native engine on a CPU that has a C++ compiler."""

    auto = "auto"
    torch = "torch"
    native = "native"
    cuda_graph = "cuda_graph"


class Z(StrEnum):
    """Distribution of the network's fixed input z."""

    uniform = "uniform"
    gaussian = "gaussian"


class Init(StrEnum):
    """Initial weights of the DIP network."""

    xavier = "xavier"
    default = "default"


class Padding(StrEnum):
    """Padding of the DIP network's convolutions."""

    zeros = "zeros"
    reflect = "reflect"


class Scores(StrEnum):
    """The f_c of Eq. 5."""

    logits = "logits"
    probabilities = "probabilities"


class Rule(StrEnum):
    """How the thresholds of Eq. 3 are read: ``>=`` or ``>``."""

    at_least = "at_least"
    above = "above"


class T0Unit(StrEnum):
    """What t0 counts."""

    steps = "steps"
    samples = "samples"


class Search(StrEnum):
    """How the grid of Eq. 5 is searched."""

    grid = "grid"
    bisection = "bisection"


class VictimSpeed(StrEnum):
    """Who reads along the fit: the victim itself, or a copy whose normalisations are part of its convolutions."""

    as_is = "as_is"
    folded = "folded"
    bfloat16 = "bfloat16"


class DivideBy(StrEnum):
    """What Eq. 7 divides by where fewer than K crossings exist."""

    found = "found"
    K = "K"


class RungCheck(StrEnum):
    """What a rung of the ladder is for, if not for attacking: it takes no part in the worst case."""

    control = "control"
    large_eps = "large_eps"
