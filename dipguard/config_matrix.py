"""The typed settings of ``evaluate.py``: a matrix of attacks (columns) and defences (rows)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dipguard.config import AttackConfig, DataConfig, LoggerConfig, TrainerConfig, VictimConfig
from dipguard.config_choices import LoggerName, RungCheck

if TYPE_CHECKING:
    from omegaconf import DictConfig

SCHEMA = "evaluate_schema"
"""Name under which the types are known to Hydra."""


@dataclass
class RivalConfig:
    """A row: a name of :data:`dipguard.defenses.DEFENSES`, the file of its own weights if it has any, its options."""

    name: str = "none"
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class AwareConfig:
    """Attacks that know the defence (section 4.3), run on each row.

    ``attack`` names a row of :data:`dipguard.attacks.DEFENSE_AWARE`; ``eps_255`` holds the budgets; ``budgets`` the
    iterations (BPDA) or queries (HopSkipJump) at which accuracy is read; ``limit`` cuts the number of images.
    """

    attack: str = "bpda"
    eps_255: list[float] = field(default_factory=lambda: [8.0])
    budgets: list[int] = field(default_factory=lambda: [1, 5, 15])
    batch_size: int = 32
    limit: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class RungConfig:
    """A rung of the ladder (docs/ladder.md): an attack that is run on each row, or on ``rows`` alone.

    ``attack`` names a row of :data:`dipguard.attacks.DEFENSE_AWARE`, or of :data:`~dipguard.attacks.ATTACKS`, which
    meet the undefended victim. ``eps_255`` null is the ladder's; only a ``check`` may have another. ``readout`` names
    what of the defence is looked at: the first that a row has. ``full`` are the options that an uncut run would have;
    the tables say where ``options`` differ. ``number`` stands before the rung's name there.
    """

    attack: str = "bpda"
    number: str = ""
    eps_255: float | None = None
    batch_size: int = 32
    limit: int | None = None
    rows: list[str] | None = None
    readout: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    check: RungCheck | None = None
    full: dict[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass
class MatrixConfig:
    """All settings of ``evaluate.py``.

    ``guide`` is a classifier for the defences to look at instead of the victim (appendix E); ``chunk`` images of a cell
    are purified, and kept, together; ``rebuild`` makes tables and figures from stored results and runs nothing.
    ``store`` is a folder of fits and attacked images that many runs share (:mod:`dipguard.store`), ``store_T`` other T
    that its fits shall serve, ``store_samples`` whether they shall serve other victims and decisions too.
    ``log_figures`` images of each column are drawn for the ``logger``, each with its decision trace.
    ``ladder`` holds attacks on each row at ``ladder_eps_255``, ``baseline`` a classifier (adversarially trained, most
    often) that meets them undefended.
    """

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    victim: VictimConfig = field(default_factory=VictimConfig)
    guide: VictimConfig | None = None
    columns: dict[str, AttackConfig] = field(default_factory=dict)
    rows: dict[str, RivalConfig] = field(default_factory=dict)
    aware: dict[str, AwareConfig] = field(default_factory=dict)
    ladder: dict[str, RungConfig] = field(default_factory=dict)
    ladder_eps_255: float = 8.0
    baseline: VictimConfig | None = None
    chunk: int = 32
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    processes: int = 1
    rebuild: bool = False
    store: str | None = None
    store_T: list[int] = field(default_factory=list)  # noqa: N815 - the paper's T
    store_samples: bool = True
    figures: int = 4
    logger: LoggerConfig = field(default_factory=lambda: LoggerConfig(LoggerName.none))
    log_figures: int = 2

    def to_dict(self) -> dict[str, Any]:
        """The settings as nested dicts of values that JSON and YAML can hold."""
        from dipguard.config import plain

        values = plain(asdict(self))
        assert isinstance(values, dict)
        return values


def register() -> None:
    """Tell Hydra the types; needed once before a config of ``conf/`` is composed, harmless when repeated."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=SCHEMA, node=MatrixConfig)


def from_hydra(cfg: DictConfig) -> MatrixConfig:
    """A composed config, with every interpolation resolved, as plain dataclasses.

    Raises:
        TypeError: It was composed without the types of :func:`register`.
    """
    from omegaconf import OmegaConf

    config = OmegaConf.to_object(cfg)
    if not isinstance(config, MatrixConfig):
        raise TypeError(
            f"`cfg` must be composed on {SCHEMA}, got {type(config).__name__}; call "
            "dipguard.config_matrix.register() first"
        )
    return config
