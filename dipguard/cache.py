"""The folder for downloads, trained victims and compiled code; never inside the package."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """Return the cache folder, or its sub-folder ``parts``, without creating it.

    It is ``$DIPGUARD_CACHE``, else ``$XDG_CACHE_HOME/dipguard``, else ``~/.cache/dipguard``.
    """
    own, xdg = os.environ.get("DIPGUARD_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        root = Path(own).expanduser()
    elif xdg:
        root = Path(xdg).expanduser() / "dipguard"
    else:
        root = Path.home() / ".cache" / "dipguard"
    return root.joinpath(*parts)
