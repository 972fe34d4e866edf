"""The settings of a run: what Hydra composes from ``conf/``, checked and turned into plain values.

A node of the config (``data``, ``victim``, each attack and each defence) holds ``name``, or ``_target_`` with the
import path of a class, and the options of that class. Options and defaults are those of the constructors, read from
their source (:func:`dipguard.registry.options_of`). Keys are checked here; the values of a node by its constructor.
Torch is not imported, so that ``--help`` and a mistyped key are answered at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dipguard.checks import check_bool, check_choice, check_float, check_int
from dipguard.registry import constant_of, did_you_mean, options_of, table_of

if TYPE_CHECKING:
    from omegaconf import DictConfig

NODE_KEYS = ("name", "_target_")
ATTACK_KEYS = ("number", "check", "full", "intermediate", "limit", "made_on", "only")
"""Keys of an attack's node beside its options."""
ATTACK_CHECKS = ("control", "large_eps")
LOGGERS: dict[str, tuple[str, ...]] = dict.fromkeys(("none", "csv", "tensorboard"), ())
LOGGERS["wandb"] = ("project", "entity", "group", "name", "tags", "notes", "offline", "artifacts")
"""Kind of a logger -> its options."""
TRAINER = "pytorch_lightning.trainer.trainer:Trainer"
TRAINER_OWN = "dipguard.fit.runner:OWNED"
"""Arguments of Lightning's Trainer, and those that a fit sets itself; of these, ``accelerator`` is the run's device."""


class Group(NamedTuple):
    """A config group whose options come from a table of names."""

    table: str  # "package.module:NAME"
    entry_points: str  # the group of entry points that adds to it, without ``dipguard.``
    hidden: tuple[str, ...] = ()  # arguments that the programs set themselves
    own: Mapping[str, Any] = {}  # keys beside the arguments, with their defaults


GROUPS: dict[str, Group] = {
    "data": Group("dipguard.data:DATASETS", "data", own={"mirrors": True}),
    "victim": Group("dipguard.victims:VICTIMS", "victims", hidden=("progress",)),
    "attack": Group("dipguard.attacks:ATTACKS", "attacks", hidden=("seed",)),
    "defense": Group("dipguard.defenses:DEFENSES", "defenses", ("seed", "progress", "store", "store_T", "trainer")),
}


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run as plain values: numbers, strings, lists and dicts. conf/base.yaml says what they mean.

    ``data``, ``victim``, ``surrogate`` and ``baseline`` are nodes, ``attacks`` and ``defenses`` nodes by label. With
    ``mirrors``, ``data`` says whether an image means the same in a mirror. An attack may have, beside its options,
    ``number`` (before the label in tables), ``check`` (``control`` or ``large_eps``: not part of the worst case),
    ``full`` (the options of an uncut run), ``intermediate`` (a name, or several, of which the first that a defence has
    is attacked), ``limit`` (of images), ``only`` (labels of defences) and ``made_on`` (the defence that an adaptive
    attack's images are made on, for all defences).
    """

    seed: int
    data: dict[str, Any]
    victim: dict[str, Any]
    surrogate: dict[str, Any] | None
    baseline: dict[str, Any] | None
    attacks: dict[str, dict[str, Any]]
    defenses: dict[str, dict[str, Any]]
    eps_255: float
    judge: int
    trainer: dict[str, Any]
    callbacks: dict[str, dict[str, Any]]
    logger: dict[str, Any]
    chunk: int | None
    processes: int
    store: str | None
    store_T: list[int]  # noqa: N815 - the paper's T
    store_samples: bool
    rebuild: bool
    keep_traces: bool
    figures: int
    objective: str | None

    def to_dict(self) -> dict[str, Any]:
        """The settings as nested dicts."""
        return asdict(self)


def register() -> None:
    """Give Hydra the options of every data set, victim, attack and defence; harmless when repeated.

    ``conf/defense/paper.yaml`` is based on ``defense/options/paper``. What another package registers needs no YAML.
    """
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for group, source in GROUPS.items():
        own = constant_of(source.table)
        for name in names_of(group):
            node = node_of(group, name)
            store.store(group=f"{group}/options", name=name, node=node, provider="dipguard")
            if name not in own:
                store.store(group=group, name=name, node={"name": name, **node}, provider="dipguard")
    store.repo = _Shared(store.repo)


class _Shared(dict[str, Any]):
    """A dict that is never copied. Hydra copies its whole store for each group that ``--help`` lists."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


def names_of(group: str) -> dict[str, str]:
    """Name -> "package.module:attribute" of a config group, with those of other packages."""
    source = GROUPS[group]
    return table_of(source.entry_points, constant_of(source.table))


def node_of(group: str, name: str) -> dict[str, Any]:
    """The options of an entry of a config group with their defaults, as a config holds them."""
    source = GROUPS[group]
    options = {**source.own, **options_of(names_of(group)[name])}
    return {key: _plain(value) for key, value in options.items() if key not in source.hidden}


def from_hydra(cfg: DictConfig) -> RunConfig:
    """Check a composed config and return its settings, with every interpolation resolved.

    ``attack`` and ``defense`` take the place of ``attacks`` and ``defenses``. TypeError or ValueError if a key is
    unknown or missing, or a value is not possible.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"`{error.full_key}`: {error.msg}") from error
    assert isinstance(values, dict)
    given: dict[str, Any] = {str(key): value for key, value in values.items() if key != "hydra"}
    _check_keys("", given, (*RunConfig.__dataclass_fields__, "attack", "defense"))
    for single, many in (("attack", "attacks"), ("defense", "defenses")):
        node = given.pop(single, None)
        _check_node(single, single, node)
        if node is not None:
            given[many] = {name_of(node): node}
        else:
            for label, one in _mapping(many, given.get(many)).items():
                _check_node(single, f"{many}.{label}", one)
            # Null leaves one out.
            given[many] = {str(label): one for label, one in given[many].items() if one is not None}
    for key in ("data", "victim", "surrogate", "baseline"):
        _check_node("data" if key == "data" else "victim", key, given.setdefault(key, None))
    for node in _mapping("defenses", given.get("defenses")).values():
        if node.get("name") == "mirror" and "_target_" not in node:  # by name, without conf/defense/mirror.yaml
            node.setdefault("mirror", given["data"].get("mirrors", True))
    missing = [key for key in RunConfig.__dataclass_fields__ if key not in given]
    if missing:
        raise ValueError(f"the config lacks {', '.join(f'`{key}`' for key in missing)}")
    return _checked(RunConfig(**given))


def check_overrides(cfg: DictConfig, overrides: Iterable[str]) -> None:
    """ValueError for overrides of ``attacks`` or ``defenses`` where ``attack`` or ``defense`` takes their place.

    And for one of ``eps_255`` or ``judge`` where no attack is part of a suite, and for several choices of one group.
    """
    from omegaconf import OmegaConf

    overrides = list(overrides)
    for text in overrides:  # of several choices Hydra lays the last over the others
        if re.match(r"\+*(data|victim|surrogate|baseline|attack|defense|logger)(@[\w.]+)?=\[", text):
            raise ValueError(f"'{text}' must name one choice; evaluate.py takes more as +defense@defenses.LABEL=NAME")
    keys = [re.sub(r"^[+~]*([^=]+).*", r"\1", text, flags=re.DOTALL) for text in overrides]
    of_suite = [key for key in keys if key in ("eps_255", "judge")]
    if of_suite and not re.search(r"\$\{eps_255\}|^ +number: ", OmegaConf.to_yaml(cfg), re.MULTILINE):
        hint = ": `attack.eps_255`?" if of_suite[0] == "eps_255" else ""
        raise ValueError(f"'{of_suite[0]}' changes nothing without an attack suite (experiment=adaptive){hint}")
    for single, many in (("attack", "attacks"), ("defense", "defenses")):
        for key in keys:
            if cfg.get(single) is not None and re.search(rf"(^|@){many}\.", key):
                raise ValueError(f"'{key}' changes nothing beside {single}=NAME, which takes the place of all `{many}`")


def name_of(node: Mapping[str, Any]) -> str:
    """The name of a node of the config, or of the class that it points to."""
    return str(node.get("name") or str(node["_target_"]).rsplit(".", 1)[-1])


def explain(error: BaseException | None) -> str | None:
    """What was probably meant, for an error of Hydra about a key or an option that does not exist; None if unknown."""
    if twice := re.match(r"Multiple values for (\S+?)\.(?: |$)", str(error)):
        group, several, _ = twice[1].partition("/options")  # that each choice is based on
        return f"`{group}` takes one choice" if several else f"`{group}` has one already: give {group}=NAME, without +"
    options, config = getattr(error, "options", None), str(getattr(error, "missing_cfg_file", ""))
    if options:
        group, _, name = config.rpartition("/")
        if group in ("hydra/launcher", "hydra/sweeper"):
            return f"`{group}={name}` may come with an extra: pip install 'dipguard[sweep]'"
        hint = did_you_mean(name, options, prefix=f"{group}=")
        return f"`{group}={name}` is unknown{hint}" if hint else None
    cause = getattr(error, "__cause__", None)
    key, parent = getattr(cause, "full_key", None), getattr(cause, "parent_node", None)
    if not key or not isinstance(parent, Mapping):
        return None
    group, _, name = str(key).rpartition(".")
    if name in ("attack", "defense") and not group:
        return f"no `{name}` is chosen: give {name}=NAME (where a sweep chooses, options need ++{name}.KEY=VALUE)"
    if group == "trainer" and name in _trainer_own():
        return f"`{key}` is left to dipguard"
    if group.startswith("callbacks"):
        return None  # a label of the user's, which only wants the + that Hydra speaks of
    if name in (options_of(TRAINER) if group == "trainer" else ATTACK_KEYS if group.startswith("attack") else ()):
        return None  # it is known, and only wants the + that Hydra speaks of
    return _unknown(group, name, [str(known) for known in parent if known != "hydra"])


def _checked(config: RunConfig) -> RunConfig:
    """``config`` if the values that belong to no node are possible."""
    for key in ("store_samples", "rebuild", "keep_traces"):
        check_bool(getattr(config, key), name=key)
    logger, trainer, own = _mapping("logger", config.logger), _mapping("trainer", config.trainer), _trainer_own()
    for name in ("trainer.enable_progress_bar", "logger.offline", "logger.artifacts"):
        group, _, key = name.partition(".")
        if (value := getattr(config, group).get(key)) is not None:
            check_bool(value, name=name)
    check_bool(config.data.get("mirrors", True), name="data.mirrors")
    check_choice(logger.get("kind"), LOGGERS, name="logger.kind")
    _check_keys("logger", logger, ("kind", *LOGGERS[logger["kind"]]))
    if not isinstance(logger.get("tags") or [], list):
        raise TypeError(f"`logger.tags` must be a list, got {logger['tags']!r}")
    for name in trainer:
        if name in own:
            raise TypeError(f"`trainer.{name}` is left to dipguard, got {trainer[name]!r}")
    _check_keys("trainer", trainer, [name for name in options_of(TRAINER) if name not in own])
    if not isinstance(config.store_T, list):
        raise TypeError(f"`store_T` must be a list of numbers, got {config.store_T!r}")
    check_choice(trainer.get("accelerator", "auto"), ("auto", "cpu", "gpu", "cuda"), name="trainer.accelerator")
    defenses = [*config.defenses, *([] if config.baseline is None else ["baseline"])]
    for label, node in config.attacks.items():
        for defense in node.get("only") or ():
            check_choice(defense, defenses, name=f"attacks.{label}.only")
        if node.get("made_on") is not None:
            check_choice(node["made_on"], defenses, name=f"attacks.{label}.made_on")
    for label, node in _mapping("callbacks", config.callbacks).items():
        if "_target_" not in _mapping(f"callbacks.{label}", node):
            raise ValueError(f"`callbacks.{label}._target_` must name the class of a callback, got nothing")
    check_int(config.seed, name="seed", low=0, high=2**32 - 1)
    check_float(config.eps_255, name="eps_255", low=0.0, high=255.0)
    check_int(config.figures, name="figures", low=0)
    whole = {"judge": config.judge, "processes": config.processes}
    for key, value in [*whole.items(), *(("store_T", T) for T in config.store_T)]:
        check_int(value, name=key, low=1)
    if config.objective is not None:
        suite = any(node.get("number") for node in config.attacks.values())
        labels = [*config.attacks, *defenses, *(["worst_case"] if suite else [])]
        check_choice(config.objective, labels, name="objective")
    if config.chunk is not None:
        check_int(config.chunk, name="chunk", low=1)
    return config


def _trainer_own() -> list[str]:
    return [name for name in constant_of(TRAINER_OWN) if name != "accelerator"]


def _check_node(group: str, key: str, node: Any) -> None:
    """Check the keys of a node of a config group; None is no node."""
    if node is None:
        if key in ("data", "victim"):
            raise TypeError(f"`{key}` must be chosen, such as {key}=NAME, got none")
        return
    name, names, source = _mapping(key, node).get("name"), names_of(group), GROUPS[group]
    if "_target_" in node:
        try:
            path = ":".join(str(node["_target_"]).rsplit(".", 1))
            known = options_of(path, ordinary=int(group in ("attack", "defense")))  # after the victim
        except ValueError:  # its source cannot be read; its constructor refuses what it does not know
            return
    elif isinstance(name, str) and name in names:
        known = options_of(names[name])
    else:
        hint = did_you_mean(str(name), names)
        raise ValueError(f"`{key}.name` must be one of {', '.join(names)}, got {name!r}{hint}")
    options = [name for name in (*known, *source.own) if name not in source.hidden]
    _check_keys(key, node, (*NODE_KEYS, *options, *(ATTACK_KEYS if group == "attack" else ())))
    if group == "attack" and node.get("limit") is not None:
        check_int(node["limit"], name=f"{key}.limit", low=1)
    if group == "attack" and node.get("check") is not None:
        check_choice(node["check"], ATTACK_CHECKS, name=f"{key}.check")
    kinds = {"only": (list,), "full": (dict,), "intermediate": (str, list)} if group == "attack" else {}
    for name, types in kinds.items():
        if node.get(name) is not None and not isinstance(node[name], types):
            raise TypeError(f"`{key}.{name}` must be a {' or '.join(t.__name__ for t in types)}, got {node[name]!r}")


def _check_keys(group: str, given: Iterable[str], known: Iterable[str]) -> None:
    allowed = list(known)
    for name in given:
        if name not in allowed:
            raise TypeError(_unknown(group, str(name), allowed))


def _unknown(group: str, name: str, known: Iterable[str]) -> str:
    """What there is to say of an unknown key of a group (empty: of the whole config)."""
    prefix = f"{group}." if group else ""
    hint = did_you_mean(name, known, prefix=prefix)
    kind = group.split(".")[0].removesuffix("s")
    owners = [other for other in names_of(kind) if name in node_of(kind, other)] if kind in GROUPS else []
    if group == "logger" and name in LOGGERS["wandb"]:
        owners = ["logger=wandb"]
    if owners and not hint:
        hint = f" (it is an option of {', '.join(owners)})"
    if not group and not hint:
        places = [f"`{of}.{name}`" for of in GROUPS if any(name in node_of(of, one) for one in names_of(of))]
        hint = f" (did you mean {' or '.join(places)}?)" if places else ""
    what = f"`{group}` takes" if group else "the settings are"
    return f"`{prefix}{name}` is unknown{hint}; {what}: {', '.join(known)}"


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"`{key}` must hold keys and values, got {value!r}")
    return value


def _plain(value: Any) -> Any:
    """A default as a config holds it."""
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
