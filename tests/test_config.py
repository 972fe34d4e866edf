from __future__ import annotations

import inspect
import logging
import re
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException, HydraException

from dipguard import DIPGuard
from dipguard.attacks import ATTACKS
from dipguard.config import TrainConfig, from_hydra
from dipguard.config_checks import validate
from dipguard.config_choices import (
    DivideBy,
    EngineName,
    Init,
    NetworkName,
    Padding,
    Precision,
    Products,
    Rule,
    Scores,
    Search,
    T0Unit,
    VictimSpeed,
)
from dipguard.data import DATASETS
from dipguard.decision.boundary import RULES, SCORES, SEARCHES, T0_UNITS
from dipguard.decision.stitching import DIVISORS
from dipguard.defenses import build_defense
from dipguard.engines import ENGINES
from dipguard.engines.precision import PRECISIONS
from dipguard.evaluation.settings import guard_options
from dipguard.fit.folded import VICTIM_SPEEDS
from dipguard.fit.module import DTYPES
from dipguard.networks import INITS, PADDINGS, PRESETS
from dipguard.victims import VICTIMS, build_victim
from tests.tiny_run import CONF, compose_config, typed_config

EVALUATION = ("aware", "experiment", "rival", "sweep")  # groups of evaluate.py alone
CHOICES = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.parent.name not in EVALUATION)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_config_composes_and_is_valid(group: str, choice: str) -> None:
    config = typed_config(f"{group}={choice}", *(["defense=paper"] if group == "network" else []))
    assert validate(config) is config
    if choice != "default" and group != "fit":
        assert getattr(config, group).name == choice


@pytest.mark.parametrize(
    ("group", "table"), [("data", DATASETS), ("victim", VICTIMS), ("attack", ATTACKS), ("network", PRESETS)]
)
def test_every_row_of_a_table_has_its_config(group: str, table: dict[str, object]) -> None:
    assert {choice for name, choice in CHOICES if name == group} == set(table)


@pytest.mark.parametrize(
    ("choices", "known"),
    [
        (NetworkName, PRESETS),
        (Precision, DTYPES),
        (Products, PRECISIONS),
        (EngineName, ENGINES),
        (Init, INITS),
        (Padding, PADDINGS),
        (Scores, SCORES),
        (Rule, RULES),
        (Search, SEARCHES),
        (VictimSpeed, VICTIM_SPEEDS),
        (T0Unit, T0_UNITS),
        (DivideBy, DIVISORS),
    ],
)
def test_choices_are_those_of_the_code(choices: type, known: object) -> None:
    assert {str(choice) for choice in choices} == set(known)  # type: ignore[call-overload]


def test_yaml_dataclasses_and_api_have_the_same_defaults() -> None:
    composed, plain = typed_config("defense=paper").to_dict(), TrainConfig().to_dict()
    for group in ("defense", "fit", "network", "trainer", "seed", "report"):
        assert composed[group] == plain[group]
    import torch

    options = guard_options(typed_config("defense=paper"), torch.device("cpu"))
    defaults = {name: p.default for name, p in inspect.signature(DIPGuard).parameters.items() if name != "victim"}
    del options["accelerator"], defaults["accelerator"]
    del defaults["store_T"]  # one run has one T
    assert options == defaults


def test_papers_settings_are_the_defaults() -> None:
    defense = typed_config("defense=paper").defense
    assert (defense.T, defense.tau, defense.t0, defense.K, defense.beta) == (1000, 0.7, 50, 15, 0.5)
    assert (defense.decisions, typed_config("defense=paper").fit.lr) == (200, 0.01)


@pytest.mark.parametrize(
    "override",
    ["defense.taau=0.5", "data.folder=x", "nothing=1", "attack.options.epsilon=1", "fit.stacks=2", "logger.token=x"],
)
def test_unknown_key_is_refused(override: str) -> None:
    with pytest.raises(HydraException, match=override.split("=")[0].replace(".", r"\.")):
        compose_config(override)


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("fit.z=normal", ["uniform", "gaussian"]),
        ("fit.init=zeros", ["xavier", "default"]),
        ("fit.padding=same", ["zeros", "reflect"]),
        ("fit.dtype=float16", ["float32", "float64"]),
        ("defense.scores=softmax", ["logits", "probabilities"]),
        ("defense.rule=equal", ["at_least", "above"]),
        ("defense.t0_unit=epochs", ["steps", "samples"]),
        ("defense.divide_by=N", ["found", "K"]),
        ("trainer.accelerator=abacus", ["auto", "cpu", "gpu"]),
        ("logger=mlflow", ["csv", "tensorboard", "wandb", "none"]),
        ("data=mnist", list(DATASETS)),
        ("victim=vgg", list(VICTIMS)),
        ("attack=deepfool", list(ATTACKS)),
        ("network=huge", list(PRESETS)),
        ("defense=none", ["paper", "dipguard"]),
    ],
)
def test_bad_choice_is_refused_with_the_allowed_ones(override: str, allowed: list[str]) -> None:
    with pytest.raises(HydraException) as caught:
        compose_config(override)
    text = f"{caught.value} {caught.value.__cause__}"
    assert [name for name in allowed if name not in text] == []


@pytest.mark.parametrize(
    "override", ["defense.T=many", "defense.tau=high", "data.limit=1.5", "seed=x", "defense.keep_samples=perhaps"]
)
def test_value_of_the_wrong_kind_is_refused(override: str) -> None:
    with pytest.raises(ConfigCompositionException, match=override.split("=")[0].replace(".", r"\.")):
        compose_config(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "`seed` must be from 0"),
        ("data.limit=0", "`data.limit` must be at least 1, got 0"),
        ("data.offset=-1", "`data.offset` must be at least 0"),
        ("data.size=0", "`data.size` must be at least 1"),
        ("data.label_base=2", "`data.label_base` must be from 0 to 1"),
        ("attack.eps_255=300", "`attack.eps_255` must be from 0 to 255"),
        ("attack.eps_255=0", "`attack.eps_255` must be above 0"),
        ("attack.batch_size=0", "`attack.batch_size` must be at least 1"),
        ("defense.T=0", "`defense.T` must be from 1 to"),
        ("defense.T=199", "`defense.T` must be at least `defense.decisions`, got T=199 and decisions=200"),
        ("defense.decisions=1", "`defense.decisions` must be at least 2"),
        ("defense.every=0", "`defense.every` must be from 1 to 500"),
        ("defense.tau=1.5", "`defense.tau` must be from 0 to 1, got 1.5"),
        ("defense.tau=-0.1", "`defense.tau` must be from 0 to 1"),
        ("defense.tau=nan", "`defense.tau` must be from 0 to 1"),
        ("defense.t0=-1", "`defense.t0` must be at least 0"),
        ("defense.K=0", "`defense.K` must be at least 1, got 0"),
        ("defense.K_max=5", "`defense.K` must be at most `defense.K_max`=5, got 15"),
        ("defense.beta=-0.5", "`defense.beta` must be finite and at least 0, got -0.5"),
        ("defense.N=0", "`defense.N` must be at least 1"),
        ("fit.stack_size=0", "`fit.stack_size` must be at least 1"),
        ("fit.patience=0", "`fit.patience` must be at least 1, got 0"),
        ("fit.lr=0", "`fit.lr` must be above 0"),
        ("fit.lr=inf", "`fit.lr` must be finite"),
        ("fit.z_scale=0", "`fit.z_scale` must be above 0"),
        ("fit.jitter=-1", "`fit.jitter` must be finite and at least 0"),
        ("report.figures=-1", "`report.figures` must be at least 0"),
    ],
)
def test_value_out_of_range_is_refused(override: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        validate(typed_config("defense=paper", override))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("defense", "override", "message"),
    [
        ("dipguard", "defense.T=1", "`defense.T` must be from 2 to"),
        ("dipguard", "defense.t0=1000", "`defense.t0` must be from 0 to 999"),
        ("dipguard", "defense.every=701", "`defense.every` must be from 1 to 700"),
        ("dipguard", "defense.trust=2", "`defense.trust` must be from 0 to 1"),
        ("dipguard", "defense.beta_step=0", "`defense.beta_step` must be finite and at least 0.001"),
        ("dipguard", "defense.tau=0.9", "`defense.tau` is a setting of defense=paper, got 0.9"),
        ("dipguard", "network=large", "`network.name` is a setting of defense=paper, got large"),
        ("dipguard", "fit.patience=3", "`fit.patience` must be null with defense=dipguard"),
        ("dipguard", "store=folder", "`store` must be null with defense=dipguard"),
        ("paper", "defense.trust=1", "`defense.trust` is a setting of defense=dipguard, got 1.0"),
    ],
)
def test_a_setting_of_the_other_defence_is_refused(defense: str, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(typed_config(f"defense={defense}", override))


def test_dipguards_yaml_and_class_have_the_same_defaults() -> None:
    import torch

    from dipguard.evaluation.settings import build_guard

    config = typed_config("data.mirrors=true")
    assert str(config.defense.name) == "dipguard"  # train.py's own choice
    victim = build_victim("digits_cnn")
    guard = build_guard(config, victim, torch.device("cpu"))
    assert guard.settings == build_defense("dipguard", victim, seed=config.seed).settings
    assert not typed_config().defense.mirror  # the digits say so


def test_warm_up_past_the_end_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dipguard"):
        validate(typed_config("defense=paper", "defense.T=40", "defense.decisions=20"))
    assert "`defense.t0`=50 is past the end of the fit (40 steps)" in caplog.text


def test_untyped_config_is_refused() -> None:
    from omegaconf import OmegaConf

    with pytest.raises(TypeError, match="must be composed on train_schema"):
        from_hydra(OmegaConf.create({"seed": 0}))


def test_configs_name_no_place_of_this_machine() -> None:
    texts = [path.read_text() for path in Path(CONF).rglob("*.yaml")]
    assert len(texts) > len(CHOICES)
    assert not any("/home/" in text or "file://" in text for text in texts)
