"""The folder for downloads, trained victims and compiled code; never inside the package."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """Return the cache folder, or its sub-folder ``parts``, without creating it.

    It is ``$DIPGUARD_CACHE``, else ``$XDG_CACHE_HOME/dipguard``, else ``~/.cache/dipguard``; without a home folder, a
    path at which nothing can be written.
    """
    own, xdg = os.environ.get("DIPGUARD_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(own or Path(xdg or "~/.cache", "dipguard")).expanduser()
    except RuntimeError:
        root = Path(os.devnull, "no home folder, set DIPGUARD_CACHE")
    return root.joinpath(*parts)
