"""dipguard's config groups in other people's Hydra applications, below the group ``dipguard``.

With dipguard installed, ``dipguard/rival: paper`` in a defaults list, or ``dipguard/attack@attack=pgd`` on the command
line, works in any application, beside its own ``conf/`` and never in its way: where both have a config, the
application's own comes first. Hydra imports this module in every application of the environment, so it loads nothing
but Hydra: dipguard's folder is found without importing dipguard.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

GROUP = "dipguard"
"""The group that all of dipguard's groups are in."""

OWN = ("experiment", "sweep")
"""Groups that only make sense in dipguard's own programs, as the files beside the groups do."""


class DipguardSearchPath(SearchPathPlugin):
    """Puts ``dipguard://`` behind an application's own search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the source, if dipguard is there."""
        if conf_folder() is not None:
            search_path.append("dipguard", "dipguard://")


class DipguardSource(ConfigSource):
    """Reads ``dipguard/<group>/<option>`` from dipguard's ``conf/<group>/<option>.yaml``."""

    @staticmethod
    def scheme() -> str:
        """Part of a search path before ``://``."""
        return "dipguard"

    def available(self) -> bool:
        """Whether dipguard's configs are there."""
        return conf_folder() is not None

    def load_config(self, config_path: str) -> ConfigResult:
        """Read one option.

        Raises:
            ConfigLoadError: There is none of this name.
        """
        path = self._path(self._normalize_file_name(config_path))
        if path is None or not path.is_file():
            raise ConfigLoadError(f"Config not found: {config_path}")
        text = path.read_text(encoding="utf-8")
        return ConfigResult(
            provider=self.provider,
            path=self.full_path(),
            config=OmegaConf.create(text),
            header=self._get_header_dict(text),
        )

    def is_group(self, config_path: str) -> bool:
        """Whether there is such a group."""
        path = self._path(config_path)
        return config_path in ("", GROUP) or (path is not None and path.is_dir())

    def is_config(self, config_path: str) -> bool:
        """Whether there is such an option."""
        path = self._path(self._normalize_file_name(config_path))
        return path is not None and path.is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Names of the groups, options, or both in a group, sorted."""
        if config_path == "":
            return [] if results_filter == ObjectType.CONFIG else [GROUP]
        folder, found = self._path(config_path), list[str]()
        for entry in sorted(folder.iterdir()) if folder is not None else ():
            name = f"{config_path}/{entry.name}"
            if self.is_group(name) or entry.suffix == ".yaml":
                self._list_add_result(found, name, entry.name, results_filter)
        return sorted(set(found))

    @staticmethod
    def _path(config_path: str) -> Path | None:
        """The file or folder that a config path means; None for what is not offered."""
        root, parts = conf_folder(), config_path.split("/")
        if root is None or parts[0] != GROUP or ".." in parts:
            return None
        if len(parts) > 1 and (parts[1] in OWN or not (root / parts[1]).is_dir()):
            return None
        return root.joinpath(*parts[1:])


@cache
def conf_folder() -> Path | None:
    """dipguard's ``conf/``: inside an installed package, beside it in a source tree; None without dipguard."""
    found = importlib.util.find_spec("dipguard")
    if found is None or found.origin is None:
        return None
    package = Path(found.origin).parent
    folders = (package / "conf", package.parent / "conf")
    return next((folder for folder in folders if (folder / "rival").is_dir()), None)
