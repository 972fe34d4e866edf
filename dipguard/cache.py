"""Where dipguard keeps what it downloads or trains: one folder of the user's, never the package's own."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """Return the cache folder (or a sub-folder ``parts`` of it) without creating it.

    The first of these that is set: ``$DIPGUARD_CACHE``, ``$XDG_CACHE_HOME/dipguard``, ``~/.cache/dipguard``.
    """
    own, xdg = os.environ.get("DIPGUARD_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        root = Path(own).expanduser()
    elif xdg:
        root = Path(xdg).expanduser() / "dipguard"
    else:
        root = Path.home() / ".cache" / "dipguard"
    return root.joinpath(*parts)
