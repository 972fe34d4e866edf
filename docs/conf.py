"""The documentation's site: ``python -m sphinx -W docs OUT`` makes it. Needs dipguard[docs]."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dipguard.version import __version__  # noqa: E402

project, author, project_copyright = "dipguard", "the dipguard authors", "2026, the dipguard authors"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["api"]

# The reference: a page for each module, from its docstrings. Names stand where they are defined.
apidoc_modules = [{"path": "../dipguard", "destination": "reference", "separate_modules": True, "module_first": True}]
autodoc_default_options = {"members": True, "show-inheritance": True, "ignore-module-all": True}
autodoc_member_order = "bysource"
default_role = "py:obj"
napoleon_use_ivar = True

# Links on GitHub to files that are not pages stay as they are there.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]

html_theme = "furo"
html_title = f"dipguard {version}"
