"""Tables of names and the code behind them, and the options of that code, read without importing it.

Other packages add to a table by entry points. Options are read from the source, since importing torch takes seconds.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeAlias

REQUIRED = "???"
"""Stands for the default of an option that has none; OmegaConf's own mark for a value that must be given."""
FIT_OPTIONS = "dipguard.fit.options:FitOptions"
"""The dataclass whose fields a function with ``**fit`` takes."""
FIT_HIDDEN = ("network", "seed")
"""Fields of it that are arguments of their own wherever there is ``**fit``."""

_Definition: TypeAlias = ast.ClassDef | ast.FunctionDef


def lookup(table: Mapping[str, str], name: str, *, argument: str) -> Callable[..., Any]:
    """Import what ``table[name]`` ("package.module:attribute") points to; ValueError if it is not in the table."""
    if name not in table:
        raise ValueError(f"`{argument}` must be one of {', '.join(table)}, got {name!r}{did_you_mean(name, table)}")
    module, attribute = table[name].split(":")
    return getattr(import_module(module), attribute)


def table_of(group: str, own: Mapping[str, str]) -> dict[str, str]:
    """Return ``own`` and, after it, what other packages register as entry points of ``dipguard.<group>``.

    The groups are ``defenses``, ``attacks``, ``victims`` and ``data``. Names of ``own`` cannot be replaced.
    """
    found = _registered(f"dipguard.{group}", tuple(sys.path))
    return {**own, **{name: path for name, path in found.items() if name not in own}}


@cache
def _registered(group: str, _path: tuple[str, ...]) -> dict[str, str]:
    """The entry points of a group. To find them, Python opens a file of every installed package, so it does so once."""
    return {point.name: point.value for point in entry_points(group=group)}


def foreign_class(entry: object) -> dict[str, str]:
    """The class of what another package has written, and a digest of its source, for its settings.

    The class may have inherited one of our names, and its results are not those of an earlier source.
    """
    kind: Any = type(entry)
    if kind.__module__.partition(".")[0] == "dipguard":
        return {}
    code = "".join(class_sources(kind, but=("dipguard", "torch", "builtins")))
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "code": hashlib.sha256(code.encode()).hexdigest()[:32]}


@cache
def class_sources(kind: type, *, but: tuple[str, ...]) -> list[str]:
    """The source of a class and its bases, where it is known, except those of the packages ``but``."""
    found = []
    for one in kind.__mro__:
        if one.__module__.partition(".")[0] not in but:
            # A class that was made on the fly has no file, and one that is being edited may not parse.
            with suppress(OSError, TypeError, SyntaxError):
                found.append(inspect.getsource(one))
    return found


def import_extra(module: str, *, owner: str, extra: str) -> Any:
    """Import ``module``, which only ``owner`` needs; the ImportError names the extra (``dipguard[extra]``)."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{owner} needs {module}, which could not be imported ({error}): pip install 'dipguard[{extra}]'"
        ) from error


def check_options(
    function: Callable[..., Any], options: Mapping[str, Any], *, owner: str, hidden: Collection[str] = ()
) -> None:
    """Raise TypeError unless ``function`` takes every one of ``options``, by the rules of `options_of`.

    The message begins with ``owner``, what the options were given for; the caller sets ``hidden`` arguments itself.
    """
    allowed = [name for name in _keywords(function) if name not in hidden]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        given, known = ", ".join(map(repr, unknown)), ", ".join(allowed) or "none"
        raise TypeError(f"{owner} takes no option {given}{did_you_mean(unknown[0], allowed)}; its options are: {known}")


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Return " (did you mean 'x'?)" for the name in ``known`` that is nearest to ``name``; empty if none is near."""

    def likeness(other: str) -> float:
        # A common beginning counts more: epss is eps_255 rather than steps.
        start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(name, other, strict=False)))
        return difflib.SequenceMatcher(None, name, other).ratio() + 0.1 * start

    near = max(known, key=likeness, default="")
    return f" (did you mean '{prefix}{near}'?)" if likeness(near) >= 0.6 else ""


def options_of(path: str, *, ordinary: int | None = None) -> dict[str, Any]:
    """Return the keyword-only arguments of a class or function ("package.module:name") with their defaults.

    The source is read, nothing is imported. With ``**fit`` the fields of ``FitOptions`` are options too, with the
    defaults that the class attribute ``FIT`` changes; with other ``**keywords``, the options of the base class. The
    options of a dataclass are its fields. ValueError if there is no such class or function, or a default is no literal.
    With ``ordinary``, arguments that are not keyword-only are options too, except the first ``ordinary``; ValueError if
    any keyword is taken.
    """
    module, _, name = path.partition(":")
    return dict(_options(module, name, ordinary))


@cache
def constant_of(path: str) -> Any:
    """Return the literal value of a module's constant ("package.module:NAME") without importing it, or ValueError."""
    module, _, name = path.partition(":")
    values = dict(_assignments(_tree(module).body))
    if name in values:
        return _literal(values[name], module)
    home = _imported_from(module, name)
    if home is None:
        raise ValueError(f"{module} has no constant {name}")
    return constant_of(":".join(home))


def _keywords(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    rest = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    if rest == "fit":
        return names + [name for name in options_of(FIT_OPTIONS) if name not in (*names, *FIT_HIDDEN)]
    if rest is not None and isinstance(function, type):
        owner = next(kind for kind in function.__mro__ if "__init__" in vars(kind))
        names += [name for base in owner.__bases__ for name in _keywords(base) if name not in names]
    return names


def file_of(path: str) -> Path | None:
    """Return the file that defines what an import path names; None if it is not found. Nothing is imported.

    ``path`` is "package.module:name" or "package.module.name". From-imports are followed to a class or function; for
    anything else it is the file of the module.
    """
    names = path.replace(":", ".").split(".")
    for length in range(len(names) - 1, 0, -1):
        module = ".".join(names[:length])
        with suppress(ValueError):
            file = _source(module)
            with suppress(ValueError, SyntaxError, RecursionError):
                file = _source(_definition(module, names[length])[0])
            return file if file.is_file() else None  # a package may be in a zip file
    return None


def _source(module: str) -> Path:
    """A module's file. Only its top-level package is looked up, since that imports nothing."""
    package, *parts = module.split(".")
    found = importlib.util.find_spec(package)
    if not parts and found is not None and found.has_location:
        return Path(str(found.origin))
    for place in (found.submodule_search_locations or ()) if found is not None else ():
        stem = Path(place).joinpath(*parts)
        for path in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")):
            if path.is_file():
                return path
    raise ValueError(f"the source of the module {module!r} was not found")


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_source(module).read_text(encoding="utf-8"))


def _imported_from(module: str, name: str) -> tuple[str, str] | None:
    """The module and the name there that a from-import gives to ``name``."""
    package = module if _source(module).name == "__init__.py" else module.rpartition(".")[0]
    for node in _tree(module).body:
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if (alias.asname or alias.name) == name and isinstance(node, ast.ImportFrom):
                home = "." * node.level + (node.module or "")
                return importlib.util.resolve_name(home, package), alias.name
    return None


def _definition(module: str, name: str) -> tuple[str, _Definition]:
    """The module that defines ``name``, and the definition; from-imports are followed."""
    for node in _tree(module).body:
        if isinstance(node, _Definition) and node.name == name:
            return module, node
    home = _imported_from(module, name)
    if home is None:
        raise ValueError(f"{module} has no class or function {name}")
    return _definition(*home)


@cache
def _options(module: str, name: str, ordinary: int | None) -> dict[str, Any]:
    home, node = _definition(module, name)
    options: dict[str, Any] = {}
    rest: ast.arg | None = None
    if isinstance(node, ast.FunctionDef):
        options, rest, lineage = _arguments(node, home, first=ordinary), node.args.kwarg, []
    else:
        lineage = list(_lineage(home, node))
    for place, kind in lineage:
        init = next((n for n in kind.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init is None:
            if any("dataclass" in ast.unparse(decorator) for decorator in kind.decorator_list):
                return {key: _literal(value, place) for key, value in _assignments(kind.body)}
            continue
        own = _arguments(init, place, first=None if ordinary is None else 1 + ordinary)  # after self
        options |= {key: value for key, value in own.items() if key not in options}
        rest = init.args.kwarg
        if rest is None:
            return options
        if rest.arg == "fit":
            changed = [(home, value) for home, k in lineage for key, value in _assignments(k.body) if key == "FIT"]
            fields = {**options_of(FIT_OPTIONS), **(_literal(changed[0][1], changed[0][0]) if changed else {})}
            return {**options, **{k: v for k, v in fields.items() if k not in (*options, *FIT_HIDDEN)}}
    if ordinary is not None and rest is not None:
        raise ValueError(f"{module}:{name} takes any keyword")
    return options


def _lineage(module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
    """A class and its base classes, each with its module, as far as from-imports lead to their source."""
    yield module, node
    for base in node.bases:
        try:
            home, definition = _definition(module, ast.unparse(base))
        except ValueError:  # such as nn.Module, or a builtin
            continue
        if isinstance(definition, ast.ClassDef):
            yield from _lineage(home, definition)


def _assignments(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    """Names and values of the plain and annotated assignments of a module or class."""
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.expr):
            yield target.id, value


def _arguments(function: ast.FunctionDef, module: str, *, first: int | None) -> dict[str, Any]:
    """The keyword-only arguments with their defaults, and the ordinary ones from number ``first`` on (None: none)."""
    given = function.args
    defaults = [*[None] * (len(given.args) - len(given.defaults)), *given.defaults]
    usual = [] if first is None else zip(given.args[first:], defaults[first:], strict=True)
    pairs = [*usual, *zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return {item.arg: REQUIRED if default is None else _literal(default, module) for item, default in pairs}


def _literal(node: ast.expr, module: str) -> Any:
    """The value of an expression of literals and module constants."""
    try:
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        constants = {name: constant_of(f"{module}:{name}") for name in names}
        return eval(compile(ast.Expression(node), module, "eval"), {"__builtins__": {}}, constants)
    except (ValueError, TypeError) as error:
        place = f"{_source(module)}, line {node.lineno}"
        raise ValueError(f"{place}: `{ast.unparse(node)}` must be a literal: it is read without an import") from error
