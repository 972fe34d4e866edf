import json
import re
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from dipguard import registry
from dipguard.attacks import ATTACKS
from dipguard.cli.programs import keys_text
from dipguard.config import GROUPS, LOGGERS, check_overrides, explain, from_hydra, names_of, node_of
from dipguard.data import DATASETS
from dipguard.defenses import DEFENSES
from dipguard.victims import VICTIMS
from tests.tiny_matrix import compose_matrix, typed_matrix
from tests.tiny_run import CONF, ROOT, compose_config, typed_config

PROGRAMS = ("experiment", "ladder", "sweep")
CHOICES = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.parent.name not in PROGRAMS)
TABLES = {"data": DATASETS, "victim": VICTIMS, "attack": ATTACKS, "defense": DEFENSES}


@pytest.fixture(scope="module")
def all_of_them() -> DictConfig:
    """Every attack and every defence, under its name; the data say nothing about mirrors."""
    many = [f"+{group}@{group}s.x_{choice}={choice}" for group, choice in CHOICES if group in ("attack", "defense")]
    return compose_matrix("data=arrays", "data.path=x", *many)


def test_every_attack_and_defence_composes_and_holds_its_options(all_of_them: DictConfig) -> None:
    assert from_hydra(all_of_them)
    for group in ("attack", "defense"):
        for choice in TABLES[group]:
            node = all_of_them[f"{group}s"][f"x_{choice}"]
            assert (node["name"], set(node)) == (choice, {"name", *node_of(group, choice)})


OTHERS = {group: [name for kind, name in CHOICES if kind == group] for group in ("data", "victim", "logger")}


@pytest.mark.parametrize("row", range(max(map(len, OTHERS.values()))))
def test_every_config_composes_and_holds_its_options(row: int) -> None:
    choices = {group: names[row % len(names)] for group, names in OTHERS.items()}
    config = compose_config(*(f"{group}={choice}" for group, choice in choices.items()))
    assert from_hydra(config)
    for group, choice in choices.items():
        assert config[group]["kind" if group == "logger" else "name"] == choice
        if group in GROUPS:
            assert set(config[group]) == {"name", *node_of(group, choice)}


@pytest.mark.parametrize("group", TABLES)
def test_every_name_of_a_table_has_its_config(group: str) -> None:
    assert {choice for name, choice in CHOICES if name == group} == set(TABLES[group]) <= set(names_of(group))


@pytest.mark.parametrize(("group", "choice"), [pair for pair in CHOICES if pair[0] in ("attack", "defense")])
def test_a_config_changes_no_default(all_of_them: DictConfig, group: str, choice: str) -> None:
    """Defaults are the constructors' alone."""
    assert dict(all_of_them[f"{group}s"][f"x_{choice}"]) == {"name": choice, **node_of(group, choice)}


def test_papers_settings_are_the_defaults() -> None:
    paper = typed_config("defense=paper").defenses["paper"]
    assert [paper[name] for name in ("T", "tau", "t0", "K", "beta")] == [1000, 0.7, 50, 15, 0.5]
    assert (paper["decisions"], paper["lr"]) == (200, 0.01)


def test_digits_are_not_mirrored() -> None:
    assert typed_config().defenses["mirror"]["mirror"] is False
    assert typed_config("data.mirrors=true").defenses["mirror"]["mirror"] is True
    assert typed_config("data=arrays", "data.path=x").defenses["mirror"]["mirror"] is True
    assert typed_config("defense.mirror=true").defenses["mirror"]["mirror"] is True
    assert typed_config("~defense", "+defenses.m={name: mirror}").defenses["m"]["mirror"] is False


def test_a_label_may_be_a_number() -> None:
    assert list(typed_config("~attack", "+attacks={8: {name: pgd}}").attacks) == ["8"]


def test_one_attack_and_one_defence_take_the_place_of_all() -> None:
    config = typed_matrix("defense=paper", "defense.tau=0.4", "attack=fgsm", "attack.eps_255=2")
    assert (list(config.attacks), list(config.defenses)) == (["fgsm"], ["paper"])
    assert (config.attacks["fgsm"]["eps_255"], config.defenses["paper"]["tau"]) == (2, 0.4)
    one, many = typed_config("defense=paper").defenses["paper"], typed_matrix().defenses["paper"]
    assert one == many


def test_both_programs_have_the_same_settings() -> None:
    train, evaluate = compose_config(), compose_matrix()
    assert set(train) - {"attack", "defense"} == set(evaluate)
    differs = {key for key in evaluate if train[key] != evaluate[key]}
    assert differs == {"attacks", "defenses", "logger", "figures"}


def test_settings_are_plain_values() -> None:
    config = typed_matrix("victim@surrogate=cifar10_resnet20", "victim@baseline=cifar_cnn_a")
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert config.surrogate["name"] == "cifar10_resnet20"
    assert config.baseline is not None
    assert typed_config().surrogate is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bogus=1", "`bogus` is unknown; the settings are: seed, data"),
        ("tau=0.3", "`tau` is unknown (did you mean `defense.tau`?); the settings are: seed, data"),
        ("figurs=1", "`figurs` is unknown (did you mean 'figures'?)"),
        ("defense.tauu=0.3", "`defense.tauu` is unknown (did you mean 'defense.tau'?)"),
        ("defense.clip=1", "`defense.clip` is unknown (it is an option of mirror)"),
        ("defense.seed=1", "`defense.seed` is unknown"),
        ("attack.epss=3", "`attack.epss` is unknown (did you mean 'attack.eps_255'?)"),
        ("attack.seed=3", "`attack.seed` is unknown"),
        ("data.pathh=x", "`data.pathh` is unknown (did you mean 'data.path'?)"),
        ("victim.weigths=x", "`victim.weigths` is unknown (did you mean 'victim.weights'?)"),
        ("trainer.devices=2", "`trainer.devices` is left to dipguard"),
        ("trainer.max_steps=2", "`trainer.max_steps` is left to dipguard"),
        ("trainer.fast_dev_run=true", "`trainer.fast_dev_run` is left to dipguard"),
        ("trainer.precison=16", "`trainer.precison` is unknown (did you mean 'trainer.precision'?)"),
        ("logger.project=x", "`logger.project` is unknown (it is an option of logger=wandb); `logger` takes: kind"),
        ("callbacks.stop.monitor=x", "`callbacks.stop._target_` must name the class"),
    ],
)
def test_unknown_key_is_refused_also_where_it_is_appended(override: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        typed_config("defense=paper", f"+{override}")
    assert message in str(caught.value)


@pytest.mark.parametrize("label", ["attacks.pgd_8.epss", "defenses.paper.tauu"])
def test_unknown_key_of_a_matrix_is_named_as_on_the_command_line(label: str) -> None:
    group, name, _ = label.split(".")
    with pytest.raises(TypeError, match=rf"`{label}` is unknown \(did you mean '{group}\.{name}\.\w+'\?\)"):
        typed_matrix(f"+{label}=1")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("defense.taau=0.5", "`defense.taau` is unknown (did you mean 'defense.tau'?); `defense` takes: T, tau"),
        ("defence=paper", "`defence` is unknown (did you mean 'defense'?); the settings are: data, victim, seed"),
        ("defense=papr", "`defense=papr` is unknown (did you mean 'defense=paper'?)"),
        ("defense.clip=1", "`defense.clip` is unknown (it is an option of mirror)"),
        ("trainer.devices=2", "`trainer.devices` is left to dipguard"),
        ("attack.epss=3", "`attack.epss` is unknown (did you mean 'attack.eps_255'?)"),
        ("data.folder=x", "`data.folder` is unknown"),
        ("zzz=3", "`zzz` is unknown; the settings are: data, victim, seed"),
        ("+experiment=figure4", "`experiment` has one already: give experiment=NAME, without +"),
        ("defense=[paper,mirror]", "`defense` takes one choice"),
        ("hydra/sweeper=ax", "`hydra/sweeper=ax` may come with an extra: pip install 'dipguard[sweep]'"),
    ],
)
def test_hydras_own_refusal_is_explained(override: str, hint: str) -> None:
    with pytest.raises(HydraException) as caught:
        (compose_matrix if "experiment" in override else compose_config)("defense=paper", override)
    assert str(explain(caught.value)).startswith(hint)


@pytest.mark.parametrize("override", ["trainer.precision=64", "attack.limit=2"])
def test_a_key_that_must_be_appended_is_left_to_hydra(override: str) -> None:
    with pytest.raises(HydraException, match=rf"\+{override}") as caught:
        compose_config(override)
    assert explain(caught.value) is None


def test_other_errors_are_not_explained() -> None:
    assert explain(None) is None
    assert explain(ValueError("x")) is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "`seed` must be from 0"),
        ("seed=x", "`seed` must be an integer, got 'x'"),
        ("figures=-1", "`figures` must be at least 0"),
        ("judge=0", "`judge` must be at least 1"),
        ("judge=1.5", "`judge` must be an integer, got 1.5"),
        ("chunk=0", "`chunk` must be at least 1"),
        ("processes=0", "`processes` must be at least 1"),
        ("store_T=null", "`store_T` must be a list of numbers, got None"),
        ("trainer=null", "`trainer` must hold keys and values, got None"),
        ("store_T=[0]", "`store_T` must be at least 1"),
        ("eps_255=300", "`eps_255` must be from 0 to 255"),
        ("rebuild=perhaps", "`rebuild` must be true or false, got 'perhaps'"),
        ("objective=pgd_16", "`objective` must be one of pgd, paper, got 'pgd_16'"),
        ("objective=worst_case", "`objective` must be one of pgd, paper, got 'worst_case'"),
        ("keep_traces=1", "`keep_traces` must be true or false, got 1"),
        ("store_samples=1", "`store_samples` must be true or false, got 1"),
        ("trainer.enable_progress_bar=no", "`trainer.enable_progress_bar` must be true or false, got 'no'"),
        ("logger=wandb logger.offline=no", "`logger.offline` must be true or false, got 'no'"),
        ("logger=wandb logger.artifacts=no", "`logger.artifacts` must be true or false, got 'no'"),
        ("data.mirrors=no", "`data.mirrors` must be true or false, got 'no'"),
        ("data.mirrors=null", "`data.mirrors` must be true or false, got None"),
        ("logger.kind=mlflow", "`logger.kind` must be one of none, csv, tensorboard, wandb, got 'mlflow'"),
        ("data.name=mnist", "`data.name` must be one of digits"),
        ("defense.name=papr", "got 'papr' (did you mean 'paper'?)"),
        ("~victim", "`victim` must be chosen, such as victim=NAME, got none"),
        ("~data", "`data` must be chosen, such as data=NAME, got none"),
        ("~figures", "the config lacks `figures`"),
        ("+attack.only=paper", "`attack.only` must be a list, got 'paper'"),
        ("+attack.full=3", "`attack.full` must be a dict, got 3"),
        ("+attack.intermediate=5", "`attack.intermediate` must be a str or list, got 5"),
        ("logger.kind=[csv]", "`logger.kind` must be one of none, csv, tensorboard, wandb, got ['csv']"),
        ("data.name=[digits]", "`data.name` must be one of digits"),
    ],
)
def test_value_that_is_not_possible_is_refused(override: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        typed_config("defense=paper", *override.split())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("defenses.paper.T=9", "defenses.paper.T"),
        ("++defenses.mine={name:jpeg}", "defenses.mine"),
        ("~defense@defenses.paper", "defense@defenses.paper"),
    ],
)
def test_an_override_without_effect_is_refused(override: str, key: str) -> None:
    many, one = compose_matrix(), compose_matrix("defense=jpeg")
    check_overrides(many, [override, "defense=jpeg"])
    check_overrides(one, ["~defenses", "attacks.pgd_8.steps=3", "defense.quality=20", "+experiment=mine_defenses.yaml"])
    with pytest.raises(ValueError, match=f"'{key}' changes nothing beside defense=NAME"):
        check_overrides(one, ["defense=jpeg", override])


@pytest.mark.parametrize("override", ["logger=[csv,wandb]", "attack=[pgd]"])
def test_several_choices_of_a_group_are_refused(override: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"'{override}' must name one choice")):
        check_overrides(compose_matrix(override), [override])


def test_the_eps_of_a_suite_is_refused_without_one() -> None:
    with pytest.raises(ValueError, match=r"'eps_255' changes nothing .*: `attack.eps_255`?"):
        check_overrides(compose_config("attack=pgd", "eps_255=2"), ["attack=pgd", "eps_255=2"])
    with pytest.raises(ValueError, match="'judge' changes nothing without an attack suite"):
        check_overrides(compose_config("attack=pgd", "judge=3"), ["attack=pgd", "judge=3"])
    own = compose_config("attack=pgd")
    own.attack.eps_255 = "${eps_255}"
    check_overrides(own, ["attack.eps_255=${eps_255}", "eps_255=2"])
    check_overrides(compose_matrix("experiment=adaptive"), ["experiment=adaptive", "eps_255=4"])


def test_a_matrix_without_attacks_is_refused() -> None:
    with pytest.raises(TypeError, match="`attacks` must hold keys and values, got None"):
        typed_matrix("attacks=null")


def test_trainer_and_callbacks_take_what_lightning_takes() -> None:
    config = typed_config(
        "+trainer.precision=bf16-mixed",
        "+trainer.profiler._target_=pytorch_lightning.profilers.SimpleProfiler",
        "+callbacks.stop._target_=pytorch_lightning.callbacks.EarlyStopping",
        "+callbacks.stop.monitor=fit/quality",
    )
    assert config.trainer["precision"] == "bf16-mixed"
    assert config.callbacks["stop"]["monitor"] == "fit/quality"


def test_a_class_by_its_import_path() -> None:
    mine = "+defenses.mine={_target_: dipguard.defenses.transforms.JPEG, %s: 10}"
    assert typed_matrix(mine % "quality").defenses["mine"]["quality"] == 10
    with pytest.raises(TypeError, match=r"`defenses.mine.qualty` is unknown .*mean 'defenses.mine.quality'"):
        typed_matrix(mine % "qualty")


@pytest.mark.parametrize("name", ["resnet18", "ResNet"])  # a function that takes any keyword, and a class
def test_code_of_other_libraries_is_a_victim_with_its_own_arguments(name: str) -> None:
    target = f"torchvision.models.resnet.{name}"
    config = typed_config("~victim", f"+victim._target_={target}", "+victim.num_classes=10")
    assert config.victim == {"_target_": target, "num_classes": 10}


def test_what_another_package_registers_is_an_option_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints([EntryPoint("theirs", "dipguard.defenses.transforms:JPEG", "dipguard.defenses")])
    monkeypatch.setattr(registry, "_registered", registry._registered.__wrapped__)
    monkeypatch.setattr(registry, "entry_points", lambda *, group: points.select(group=group))
    monkeypatch.setattr(ConfigStore.instance(), "repo", {**ConfigStore.instance().repo})
    try:
        config = typed_config("defense=theirs", "defense.quality=20")
    finally:
        monkeypatch.undo()
        ConfigStore.instance().repo["defense"].pop("theirs.yaml")
    assert config.defenses["theirs"] == {"name": "theirs", "quality": 20}


def test_missing_values_are_named() -> None:
    config = compose_config()
    OmegaConf.update(config, "victim.weights", "???")
    with pytest.raises(ValueError, match=r"`victim\.weights`: Missing mandatory value"):
        from_hydra(config)


def test_a_run_folders_config_can_be_read_again(tmp_path: Path) -> None:
    given = compose_config("defense=paper", "defense.tau=0.3")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(given, resolve=True))
    again = OmegaConf.load(tmp_path / "config.yaml")
    assert from_hydra(again) == from_hydra(given)  # type: ignore[arg-type]


EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
SLOW = ("figure5", "table1_imagenet")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in EXPERIMENTS]
)
def test_experiments_compose(name: str) -> None:
    config = typed_matrix(f"experiment={name}")
    attacks = config.attacks
    if name.startswith("table1"):
        assert len(attacks) == 15
        sized = {key: node["eps_255"] for key, node in attacks.items() if node.get("eps_255")}
        assert sized == {f"{attack}_{eps}": eps for attack in ("fgsm", "pgd", "bim", "mifgsm") for eps in (2, 4, 8)}
        assert len(config.defenses) == 12
    elif name == "adaptive":
        judged = {key: node["eps_255"] for key, node in attacks.items() if node["name"] != "none"}
        assert {key for key, eps in judged.items() if eps != 8} == {"large_eps"}
        assert all(key == "clean" or node.get("number") or node.get("check") for key, node in attacks.items())
    elif name == "figure4":
        assert {key: node["eps_255"] for key, node in attacks.items() if key != "clean"} == {
            f"bpda_{eps}": eps for eps in (2, 4, 8)
        }
        assert all(node["budgets"] == [1, 2, 3, 5, 7, 10, 15] for key, node in attacks.items() if key != "clean")
    else:
        assert attacks["hopskipjump"]["budgets"] == [200, 1000, 2500]
        assert attacks["hopskipjump"]["radii_255"] == [0, 2, 4, 8, 12, 16, 20, 25]


def test_help_has_a_line_for_every_key_and_no_other() -> None:
    about = OmegaConf.load(CONF / "help.yaml")
    assert all(isinstance(line, str) and line for line in about.values())
    options = {(name, key) for group in GROUPS for name in names_of(group) for key in node_of(group, name)}
    assert [pair for pair in sorted(options) if f".{pair[1]}" not in about and ".".join(pair) not in about] == []
    top = {*compose_config(), *compose_matrix()}
    assert top | {"surrogate", "baseline"} == {key for key in about if "." not in key}
    known = {".".join(pair) for pair in options} | {f".{key}" for _, key in options} | {f".{key}" for key in OTHER_KEYS}
    assert {key for key in about if "." in key} <= known | {"wandb.name"}


OTHER_KEYS = ("name", "kind", "accelerator", "enable_progress_bar", *LOGGERS["wandb"])


def test_help_explains_the_composed_config() -> None:
    lines = keys_text(_root_=compose_config("defense=paper", "logger=wandb")).splitlines()
    assert [line for line in lines if "#" not in line] == []
    assert any(line.startswith("  tau: 0.7 ") and "Quality threshold" in line for line in lines)
    mirror = keys_text(_root_=compose_config())
    assert "$${oc.select:data.mirrors,true}" in mirror, "the text is a template"


def test_every_config_says_what_it_is_and_names_no_place_of_this_machine() -> None:
    for path in CONF.rglob("*.yaml"):
        text = path.read_text()
        assert text.startswith("#") or path.parent.name == "logger", path
        assert "/home/" not in text, path
        assert "file://" not in text, path


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_help_and_bad_settings_on_the_command_line(tmp_path: Path, program: str) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / f"{program}.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    shown = call("--help")
    assert shown.returncode == 0
    groups = shown.stdout.split("== Config ==")[0]
    assert re.search(r"^defense: .*mirror.*paper", groups, flags=re.MULTILINE)
    assert "options" not in groups
    many = ("experiment", "ladder", "sweep") if program == "evaluate" else ()  # attacks and defences
    found = re.findall(r"^(\w+): .*, ", groups, flags=re.MULTILINE)
    assert found == sorted(["attack", "data", "defense", "logger", "victim", *many])
    assert re.search(r"eps_255: 8 +# Largest change", shown.stdout)
    for override, message in (
        ("defense.taau=1", "did you mean 'defense.tau'?"),
        ("+bogus=1", "`bogus` is unknown"),
        ("defense.tau=2", "`defense.tau` must be from 0 to 1, got 2"),
    ):
        refused = call("defense=paper", override, f"hydra.run.dir={tmp_path}")
        assert refused.returncode == 1
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
