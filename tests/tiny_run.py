"""Small real runs of train.py for the tests: composed as on the command line, a few images, a few steps."""

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dipguard.cli.programs import train
from dipguard.config import RunConfig, from_hydra, register

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
TINY = (
    "data.limit=4", "defense=paper", "defense.T=40", "defense.decisions=20", "defense.t0=4", "defense.tau=0.2",
    "chunk=2", "figures=1", "keep_traces=true", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false",
    "logger=none",
)  # fmt: skip
"""Overrides of a run of seconds. tau is low, so that some crossings count although the fit is so short."""
PLAIN = re.compile(rf"\+?(?!hydra\.)([A-Za-z]\w*\.[\w.]+|{'|'.join(sorted(RunConfig.__dataclass_fields__))})=")
"""An override of a value, rather than of the choice of a config group."""
GROUPS = ("data=", "victim=", "surrogate=", "baseline=", "logger=")


def compose_config(*overrides: str, program: str = "train") -> DictConfig:
    """What Hydra makes of these overrides. Values are set, as Hydra does it, in a config that is composed once."""
    plain = [text for text in overrides if PLAIN.match(text) and not text.startswith(GROUPS)]
    config = copy.deepcopy(_composed(tuple(text for text in overrides if text not in plain), program))
    try:
        for override in OverridesParser.create().parse_overrides(plain):
            key, value = override.key_or_group, override.value()
            added = override.is_add() and OmegaConf.select(config, key) is None
            OmegaConf.update(config, key, value, merge=True, force_add=added)
    except OmegaConfBaseException:
        return copy.deepcopy(_composed(overrides, program))  # its error is Hydra's own
    return config


@cache
def _composed(overrides: tuple[str, ...], program: str) -> DictConfig:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(program, overrides=list(overrides))


def typed_config(*overrides: str) -> RunConfig:
    """The same as checked settings."""
    return from_hydra(compose_config(*overrides))


def tiny_run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Run train.py's work in this process; return the metrics."""
    return train(compose_config(*TINY, *overrides), folder)
