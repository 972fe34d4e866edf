"""dipguard's config groups in other Hydra applications, below the group ``dipguard``.

With dipguard installed, ``dipguard/defense: paper`` in a defaults list, or ``dipguard/attack@attack=pgd`` on the
command line, works in any application. If the application has a config of the same name, its own is used. Hydra imports
this module in every application of the environment, so it imports nothing but Hydra: dipguard is found without an
import, and its settings (but not torch) are imported when a config of the group is loaded.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

GROUP = "dipguard"
"""The group that holds all of dipguard's groups."""
OPTIONS = "options"
"""Inside a group: the arguments of each constructor, which the group's YAML files are based on."""
OWN = ("experiment", "ladder", "logger", "sweep")
"""Groups that only make sense in dipguard's own programs."""


class DipguardSearchPath(SearchPathPlugin):
    """Appends ``dipguard://`` to an application's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the source, if dipguard is installed."""
        if conf_folder() is not None:
            search_path.append("dipguard", "dipguard://")


class DipguardSource(ConfigSource):
    """Reads ``dipguard/<group>/<option>`` from dipguard's ``conf/<group>/<option>.yaml``."""

    @staticmethod
    def scheme() -> str:
        """Part of a search path before ``://``."""
        return "dipguard"

    def available(self) -> bool:
        """Whether dipguard's configs were found."""
        return conf_folder() is not None

    def load_config(self, config_path: str) -> ConfigResult:
        """Read one option.

        Raises:
            ConfigLoadError: There is none of this name.
        """
        path = self._path(self._normalize_file_name(config_path))
        if path is None or not self.is_config(config_path):
            raise ConfigLoadError(f"Config not found: {config_path}")
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        config: Any = OmegaConf.create(text or _options_of(path.parent)[path.stem])
        for key in _own_keys(path):  # no arguments of the builder
            config.pop(key, None)
        return ConfigResult(
            provider=self.provider, path=self.full_path(), config=config, header=self._get_header_dict(text)
        )

    def is_group(self, config_path: str) -> bool:
        """Whether there is such a group."""
        path = self._path(config_path)
        return config_path in ("", GROUP) or (path is not None and (path.is_dir() or path.name == OPTIONS))

    def is_config(self, config_path: str) -> bool:
        """Whether there is such an option."""
        path = self._path(self._normalize_file_name(config_path))
        return path is not None and (path.is_file() or path.stem in _options_of(path.parent))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Names of the groups, options, or both in a group, sorted."""
        if config_path == "":
            return [] if results_filter == ObjectType.CONFIG else [GROUP]
        folder, found = self._path(config_path), list[str]()
        if folder is not None and folder.is_dir():
            for name in [*(entry.name for entry in folder.iterdir()), *_options_of(folder)]:
                if self.is_group(f"{config_path}/{name}") or self.is_config(f"{config_path}/{name}"):
                    self._list_add_result(found, f"{config_path}/{name}", name, results_filter)
        return sorted(set(found))

    @staticmethod
    def _path(config_path: str) -> Path | None:
        """The file or folder of a config path, in ``options`` one that would be there; None for what is not offered."""
        root, parts = conf_folder(), config_path.split("/")
        if root is None or parts[0] != GROUP or ".." in parts:
            return None
        if len(parts) > 1 and (parts[1] in OWN or not (root / parts[1]).is_dir()):
            return None
        return root.joinpath(*parts[1:])


def _options_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> config of what has no file: all in the folder ``options`` of a group, and in the group entry points."""
    from dipguard.config import GROUPS, names_of, node_of

    inside = folder.name == OPTIONS
    group = folder.parent.name if inside else folder.name
    names = [name for name in (names_of(group) if group in GROUPS else ()) if not (folder / f"{name}.yaml").is_file()]
    return {name: ({} if inside else {"name": name}) | node_of(group, name) for name in names}


def _own_keys(path: Path) -> tuple[str, ...]:
    """The keys of a group's option that only dipguard's own programs know."""
    from dipguard.config import GROUPS

    group = path.parents[1].name if path.parent.name == OPTIONS else path.parent.name
    return tuple(GROUPS[group].own) if group in GROUPS else ()


@cache
def conf_folder() -> Path | None:
    """dipguard's ``conf/``: inside an installed package, beside it in a source tree; None without dipguard."""
    found = importlib.util.find_spec("dipguard")
    if found is None or found.origin is None:
        return None
    package = Path(found.origin).parent
    folders = (package / "conf", package.parent / "conf")
    return next((folder for folder in folders if (folder / "defense").is_dir()), None)
