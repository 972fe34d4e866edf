import importlib
import inspect
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch

from dipguard import registry
from dipguard.attacks import ATTACKS
from dipguard.attacks.static import NoAttack
from dipguard.data import DATASETS, load_data
from dipguard.defenses import DEFENSES
from dipguard.fit.options import FitOptions
from dipguard.registry import check_options, did_you_mean, lookup, options_of, table_of
from dipguard.victims import VICTIMS

TARGETS = sorted({*DATASETS.values(), *VICTIMS.values(), *ATTACKS.values(), *DEFENSES.values()})


def keywords(function: type, *, fit: dict[str, object] | None = None) -> dict[str, object]:
    """The keyword-only arguments of a class or function, by Python's own means; ``fit`` is a derived class's FIT."""
    fit = getattr(function, "FIT", {}) if fit is None else fit
    parameters = inspect.signature(function).parameters.values()
    found = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    rest = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    if rest == "fit":
        fields = {name: field.default for name, field in FitOptions.__dataclass_fields__.items()}
        fields |= fit
        return {**{name: value for name, value in fields.items() if name not in ("network", "seed")}, **found}
    if rest is not None:
        owner = next(kind for kind in function.__mro__ if "__init__" in vars(kind))
        return {**keywords(owner.__bases__[0], fit=fit), **found}
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_every_name_points_to_code_whose_options_can_be_read_without_it(target):
    made = lookup({"name": target}, "name", argument="name")
    assert callable(made)
    assert options_of(target) == keywords(made)
    check_options(made, options_of(target), owner="it")


def test_an_unknown_name_lists_those_that_exist():
    with pytest.raises(ValueError, match=r"`data`.*digits, cifar10, arrays, image_folder.*'mnist'"):
        load_data("mnist")
    with pytest.raises(ValueError, match=r"got 'digit' \(did you mean 'digits'\?\)"):
        load_data("digit")


@pytest.mark.parametrize(("name", "known"), [("digits", "none"), ("cifar10", "split, download")])
def test_an_unknown_option_lists_those_that_exist(name, known):
    with pytest.raises(TypeError, match=f"'{name}' takes no option 'colour'; its options are: {known}$"):
        load_data(name, colour=True)


@pytest.mark.parametrize(
    ("name", "known", "near"),
    [
        ("tauu", ["T", "tau", "t0"], "tau"),
        ("epss", ["steps", "eps_255"], "eps_255"),
        ("qualtiy", ["quality"], "quality"),
        ("bogus", ["figures", "logger"], None),
        ("x", [], None),
    ],
)
def test_the_nearest_name(name, known, near):
    assert did_you_mean(name, known) == ("" if near is None else f" (did you mean '{near}'?)")


def test_hidden_options_are_not_the_callers():
    def build(*, weights: str, arch: str) -> None: ...

    check_options(build, {"arch": "x"}, owner="it", hidden=("weights",))
    with pytest.raises(TypeError, match="'weights'; its options are: arch"):
        check_options(build, {"weights": "x"}, owner="it", hidden=("weights",))


def test_fit_options_are_those_of_the_dataclass():
    def build(*, step: int = 3, **fit: object) -> None: ...

    check_options(build, {"step": 1, "jitter": 0.1, "engine": "torch"}, owner="it")
    with pytest.raises(TypeError, match=r"takes no option 'jiter' \(did you mean 'jitter'\?\)"):
        check_options(build, {"jiter": 0.1}, owner="it")
    for name in ("network", "seed"):
        with pytest.raises(TypeError, match=f"takes no option '{name}'"):
            check_options(build, {name: 1}, owner="it")


MODULE = """
from base import Base as Parent, WINDOW
SIDE = 32


class Kept(Parent):
    pass


class Changed(Parent):
    FIT = {"jitter": 1 / 30, "padding": "reflect"}

    def __init__(self, victim, *, strength, window=WINDOW, side=SIDE, sizes=(1, 2), **options):
        super().__init__(victim, **options)


class Needs(Unknown):
    def __init__(self, sides, *, deep=1):
        pass


class Open(Unknown):
    def __init__(self, **anything):
        pass


def build(depth, width=SIDE, *, strict=True): ...


def build_any(width=SIDE, **anything): ...


class Whole(Parent):
    def __init__(self, victim, *, device=make()):
        pass
"""
BASE = """
WINDOW = 4 * 25


class Base(Unknown):
    FIT = {"jitter": 0.5}

    def __init__(self, victim, *, T=10, window=1, **fit):
        pass
"""


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own").mkdir()
    for name, text in (("__init__", "from .things import Kept\n"), ("things", MODULE.replace("base", ".base", 1))):
        (tmp_path / "own" / f"{name}.py").write_text(text)
    (tmp_path / "own" / "base.py").write_text(BASE)


@pytest.mark.usefixtures("own_package")
def test_options_are_inherited_and_fractions_and_constants_are_values():
    kept, changed = options_of("own:Kept"), options_of("own.things:Changed")
    assert (kept["T"], kept["window"], kept["jitter"], kept["padding"]) == (10, 1, 0.5, "zeros")
    assert changed["strength"] == registry.REQUIRED
    assert (changed["window"], changed["side"], changed["sizes"], changed["T"]) == (100, 32, (1, 2), 10)
    assert (changed["jitter"], changed["padding"]) == (1 / 30, "reflect")
    assert options_of("own.things:build") == {"strict": True}
    needed = {"depth": registry.REQUIRED, "width": 32, "strict": True}
    assert options_of("own.things:build", ordinary=0) == needed
    assert options_of("own.things:Needs", ordinary=0) == {"sides": registry.REQUIRED, "deep": 1}
    assert options_of("own.things:Needs", ordinary=1) == {"deep": 1}
    assert (options_of("own.things:build_any"), options_of("own.things:Open")) == ({}, {})
    assert "own" not in sys.modules


@pytest.mark.usefixtures("own_package")
@pytest.mark.parametrize(
    ("path", "ordinary", "message"),
    [
        ("own.things:Whole", {}, r"line \d+: `make\(\)` must be a literal"),
        ("own.things:Nothing", {}, "own.things has no class or function Nothing"),
        ("own.nowhere:Kept", {}, "the source of the module 'own.nowhere' was not found"),
        ("nowhere:Kept", {}, "the source of the module 'nowhere' was not found"),
        ("own.things:build_any", {"ordinary": 0}, "own.things:build_any takes any keyword"),
        ("own.things:Open", {"ordinary": 0}, "own.things:Open takes any keyword"),
    ],
)
def test_what_cannot_be_read_is_named(path, ordinary, message):
    with pytest.raises(ValueError, match=message):
        options_of(path, **ordinary)


def test_other_packages_add_names_but_replace_none(monkeypatch):
    points = EntryPoints([
        EntryPoint("theirs", "their.package:Defense", "dipguard.defenses"),
        EntryPoint("jpeg", "their.package:JPEG", "dipguard.defenses"),
        EntryPoint("other", "their.package:Attack", "dipguard.attacks"),
    ])  # fmt: skip
    monkeypatch.setattr(registry, "_registered", registry._registered.__wrapped__)
    monkeypatch.setattr(registry, "entry_points", lambda *, group: points.select(group=group))
    assert table_of("defenses", {"jpeg": "own:JPEG"}) == {"jpeg": "own:JPEG", "theirs": "their.package:Defense"}


THEIRS = """from dipguard.attacks.static import NoAttack
class Theirs(NoAttack):
    {}
"""


def test_the_settings_of_others_code_change_with_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for number, body in enumerate(("x = 1", "x = 2", "x = 1")):
        (tmp_path / f"theirs_{number}.py").write_text(THEIRS.format(body))
        made = importlib.import_module(f"theirs_{number}").Theirs(torch.nn.Flatten())
        assert registry.foreign_class(made)["class"] == f"theirs_{number}.Theirs"
        found.append(made.settings["code"])
    assert found[0] == found[2] != found[1]
    assert registry.foreign_class(NoAttack(torch.nn.Flatten())) == {}


@pytest.mark.parametrize(
    ("path", "file"),
    [
        ("dipguard.attacks:Attack", "attacks/base.py"),
        ("dipguard.attacks:ATTACKS", "attacks/__init__.py"),
        ("dipguard.attacks.static.PGD.name", "attacks/static.py"),
        ("dipguard.checks.nothing", "checks.py"),
        ("nowhere.at.all", None),
        ("alone", None),
    ],
)
def test_the_file_behind_an_import_path(path: str, file: str | None) -> None:
    package = Path(registry.__file__).parent
    assert registry.file_of(path) == (None if file is None else package / file)
