"""The typed settings of a run, one dataclass a config group of ``conf/``.

Hydra fills them (:func:`register` gives it the types, so that an unknown key or a value of the wrong kind is refused
while the command line is read), :func:`from_hydra` turns its result into plain dataclasses, and
:func:`dipguard.config_checks.validate` checks the ranges. What only one data set, victim or attack knows stands in the
``options`` of its own YAML file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from dipguard.config_choices import (
    Accelerator,
    DefenseName,
    DivideBy,
    EngineName,
    Init,
    LoggerName,
    NetworkName,
    Padding,
    Precision,
    Products,
    Rule,
    Scores,
    Search,
    T0Unit,
    VictimSpeed,
    Z,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig

SCHEMA = "train_schema"
"""Name under which the types are known to Hydra."""


@dataclass
class DataConfig:
    """Images and labels; ``labels_csv`` to ``label_base`` are for folders of pictures.

    ``mirrors`` says whether an image means the same in a mirror; digits, text and signs do not.
    """

    name: str = "digits"
    path: str | None = None
    limit: int | None = None
    offset: int = 0
    size: int | None = None
    labels_csv: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    label_base: int | None = None
    mirrors: bool = True
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class VictimConfig:
    """The classifier that is attacked and defended; ``weights`` is a file, or null for the victim's own."""

    name: str = "digits_cnn"
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class AttackConfig:
    """The attack on the clean images. ``eps_255`` is in units of 1/255; attacks without such a bound have null."""

    name: str = "pgd"
    eps_255: float | None = None
    batch_size: int = 64
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class NetworkConfig:
    """The DIP network: a preset of appendix B."""

    name: NetworkName = NetworkName.cifar10


@dataclass
class DefenseConfig:
    """The defence: ``paper`` is Algorithm 1, with its parameters (T, tau, t0, K, beta) and its open readings.

    ``every`` set replaces ``decisions``. ``dipguard`` has T, t0, ``every`` and beta of the same names, and ``trust``,
    ``mirror`` and ``beta_step`` of its own
    (:class:`~dipguard.defenses.mirror_guard.MirrorGuard`).
    """

    name: DefenseName = DefenseName.paper
    T: int = 1000
    tau: float = 0.7
    t0: int = 50
    K: int = 15
    beta: float = 0.5
    decisions: int = 200
    every: int | None = None
    N: int = 10
    search: Search = Search.grid
    K_max: int | None = None
    scores: Scores = Scores.logits
    victim_speed: VictimSpeed = VictimSpeed.as_is
    rule: Rule = Rule.at_least
    t0_unit: T0Unit = T0Unit.steps
    divide_by: DivideBy = DivideBy.found
    keep_samples: bool = False
    trust: float = 0.5
    mirror: bool = True
    beta_step: float = 0.05


@dataclass
class FitConfig:
    """The stacked fit; ``jitter`` is the std of noise added to z at each step.

    Null: ``stack_size`` is chosen by memory and speed, ``patience`` has no end, ``z_scale`` is the preset's.
    """

    stack_size: int | None = None
    patience: int | None = None
    lr: float = 0.01
    z: Z = Z.uniform
    z_scale: float | None = None
    jitter: float = 0.0
    init: Init = Init.default
    padding: Padding = Padding.zeros
    dtype: Precision = Precision.float32
    precision: Products = Products.float32
    engine: EngineName = EngineName.auto


@dataclass
class TrainerConfig:
    """How the fit is executed; nothing here is part of the method."""

    accelerator: Accelerator = Accelerator.auto
    progress: bool = True


@dataclass
class LoggerConfig:
    """The logger. ``project`` to ``offline`` are W&B's; ``offline`` null is offline unless an API key is set."""

    name: LoggerName = LoggerName.csv
    project: str = "dipguard"
    entity: str | None = None
    group: str | None = None
    offline: bool | None = None


@dataclass
class ReportConfig:
    """What is drawn: figures of the first ``figures`` images."""

    figures: int = 8


@dataclass
class TrainConfig:
    """All settings of ``train.py``; ``store`` is a folder of fits that many runs share (:mod:`dipguard.store`)."""

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    victim: VictimConfig = field(default_factory=VictimConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    defense: DefenseConfig = field(default_factory=DefenseConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    store: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The settings as nested dicts of values that JSON and YAML can hold."""
        values = plain(asdict(self))
        assert isinstance(values, dict)
        return values


def register() -> None:
    """Tell Hydra the types; needed once before a config of ``conf/`` is composed, harmless when repeated."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=SCHEMA, node=TrainConfig)


def from_hydra(cfg: DictConfig) -> TrainConfig:
    """A composed config, with every interpolation resolved, as plain dataclasses.

    Raises:
        TypeError: It was composed without the types of :func:`register`.
    """
    from omegaconf import OmegaConf

    config = OmegaConf.to_object(cfg)
    if not isinstance(config, TrainConfig):
        raise TypeError(
            f"`cfg` must be composed on {SCHEMA}, got {type(config).__name__}; call dipguard.config.register() first"
        )
    return config


def plain(value: Any) -> Any:
    """Nested dataclass values as dicts, lists and strings that JSON and YAML can hold."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, StrEnum) else value
