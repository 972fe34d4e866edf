"""What ``--help`` of the programs says: the config groups, and each key with a line on what it is.

Lines about the options of data sets, victims, attacks and defences come from the docstrings of their constructors; all
others are the comments above the keys in ``conf/``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from dipguard.config import GROUPS, names_of
from dipguard.registry import documented
from hydra_plugins.dipguard_groups import conf_folder

GROUP_OF = {"attacks": "attack", "defenses": "defense", "surrogate": "victim", "baseline": "victim"}
COLUMN, WIDTH = 32, 160
"""Where a comment begins, and where a line ends."""


def register_help() -> None:
    """Give OmegaConf the texts that the help template in ``conf/base.yaml`` asks for; harmless when repeated."""
    OmegaConf.register_new_resolver("dipguard_groups", groups_text, replace=True)
    OmegaConf.register_new_resolver("dipguard_keys", keys_text, replace=True)


def groups_text() -> str:
    """The config groups with their options, without the groups of options that they are based on."""
    loader = GlobalHydra.instance().config_loader()
    groups = [group for group in loader.list_groups("") if group not in ("dipguard", "hydra")]
    return "".join(f"{group}: {', '.join(loader.get_group_options(group))}\n" for group in groups)


def keys_text(*, _root_: DictConfig) -> str:
    """The config with a comment on each key."""
    values = OmegaConf.to_container(OmegaConf.masked_copy(_root_, [key for key in _root_ if key != "hydra"]))
    about = _comments("help", "logger/wandb", "base", str(_root_.hydra.job.name))
    lines = _lines(values, about, "", "")
    return "\n".join(lines).replace("$", "$$")  # it becomes a part of a template


def _lines(values: Any, about: Mapping[str, str], group: str, indent: str) -> Iterator[str]:
    """The lines of a node of the config; ``group`` is the config group of the node or, for labels, of what is below."""
    name = values.get("name") if group in GROUPS else None
    if name is not None:
        options = _comments("help")
        about = options | documented(names_of(group)[name]) | {"name": options["name"]}
        about |= {key: options[f"{name}.{key}"] for key in values if f"{name}.{key}" in options}
        values = {"name": name, **values}
    for key, value in values.items():
        below = group if indent else GROUP_OF.get(key, key)
        comment = about.get(key, "")
        if isinstance(value, dict) and value and name is None:
            if indent and "name" in value:  # a label
                comment = documented(names_of(group)[value["name"]])["name"]
            yield _line(f"{indent}{key}:", comment)
            yield from _lines(value, about, below, f"{indent}  ")
        else:
            text = (
                str(value) if isinstance(value, list | dict) else OmegaConf.to_yaml([value]).strip().removeprefix("- ")
            )
            yield _line(f"{indent}{key}: {text}", comment)


def _line(text: str, comment: str) -> str:
    whole = f"{text:<{COLUMN}}  # {comment.replace('None', 'null')}" if comment else text
    return whole if len(whole) <= WIDTH else f"{whole[: WIDTH - 3]}..."


@cache
def _comments(*files: str) -> dict[str, str]:
    """Key -> the comment above it in files of ``conf/``."""
    folder, found = conf_folder(), dict[str, str]()
    for name in files if folder is not None else ():
        comment: list[str] = []
        for line in (folder / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
            text = line.strip()
            if text.startswith("#"):
                comment.append(text[1:].strip())
                continue
            key = re.match(r"(?:- )?(?:\w+@)?([\w.]+):", text)
            if key and comment:
                found[key[1]] = " ".join(comment).rstrip(".")
            comment = []
    return found
