"""What ``--help`` of the programs says: the config groups, and the config with a line on each key (conf/help.yaml)."""

from __future__ import annotations

import re
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.dipguard_groups import conf_folder

COLUMN = 33  # of the comments


def register_help() -> None:
    """Give OmegaConf the texts that the template in conf/base.yaml asks for; harmless when repeated."""
    OmegaConf.register_new_resolver("dipguard_groups", groups_text, replace=True)
    OmegaConf.register_new_resolver("dipguard_keys", keys_text, replace=True)


def groups_text() -> str:
    """The config groups with their options, without the groups of options that they are based on."""
    loader = GlobalHydra.instance().config_loader()
    groups = [group for group in loader.list_groups("") if group not in ("dipguard", "hydra")]
    return "".join(f"{group}: {', '.join(loader.get_group_options(group))}\n" for group in groups)


def keys_text(*, _root_: DictConfig) -> str:
    """The config as YAML, with a comment on each key."""
    folder = conf_folder()
    assert folder is not None  # the config came from it
    about: Any = OmegaConf.load(folder / "help.yaml")
    shown = OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"])
    path, lines = list[str](), list[str]()
    for line in OmegaConf.to_yaml(shown).splitlines():
        if match := re.match(r"( *)'?(\w[^ :']*)'?:", line):
            path = [*path[: len(match[1]) // 2], match[2]]
            label = len(path) > 1 and OmegaConf.is_dict(OmegaConf.select(shown, ".".join(path)))
            names = [OmegaConf.select(shown, ".".join([*path[:-1], key])) for key in ("kind", "name")]
            name = names[0] or names[1]
            comment = about.get(f"{name}.{path[-1]}" if name else "") or about.get("." * (len(path) > 1) + path[-1])
            line = f"{line:<{COLUMN}} # {comment}" if comment and not label else line
        lines.append(line)
    return "\n".join(lines).replace("$", "$$")  # it becomes a part of a template
