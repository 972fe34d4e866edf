"""Builds the API reference from the docstrings: ``python docs/api/build.py OUT``. Needs dipguard[docs].

Any warning fails the build. OUT then holds ``index.html`` and a page per module. Nothing is downloaded; to show
formulas, a browser loads MathJax.
"""

from __future__ import annotations

import pkgutil
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def modules() -> list[str]:
    """Return dipguard and its public modules: those without a name that starts with an underscore."""
    import dipguard

    found = [name for _, name, _ in pkgutil.walk_packages(dipguard.__path__, "dipguard.")]
    return ["dipguard", *(name for name in found if not any(part.startswith("_") for part in name.split(".")))]


def build(out: Path) -> None:
    """Write all pages into ``out``.

    Raises:
        UserWarning: A docstring, an annotation or a module cannot be rendered.
    """
    pdoc: Any = import_module("pdoc")  # an extra that the type checker does not need

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # Annotations with names imported under TYPE_CHECKING, and those in NamedTuples, are shown as written.
        warnings.filterwarnings("ignore", "Error parsing type annotation", UserWarning)
        pdoc.render.configure(docformat="google", math=True, template_directory=HERE / "templates")
        # pdoc includes the modules of a package without __all__; naming them again is an error.
        chosen: list[str] = []
        covered: set[str] = set()
        for name in modules():
            module = import_module(name)
            for public in getattr(module, "__all__", ()):  # pdoc does not see what is imported on first use
                setattr(module, public, getattr(module, public))
            if name not in covered:
                chosen.append(name)
                covered |= set(pdoc.extract.walk_specs([name]))
        pdoc.pdoc(*chosen, output_directory=out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} OUT")
    sys.path.insert(0, str(HERE.parents[1]))
    build(Path(sys.argv[1]))
