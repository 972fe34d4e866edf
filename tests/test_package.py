"""The package as a whole: lean import, version, layers, dependencies."""

import ast
import dataclasses
import graphlib
import importlib
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import dipguard
from tests.docs_blocks import blocks

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dipguard"

# The packages, lowest first; imports go down only. A new package is given its floor here.
FLOORS = (
    {"checks", "classifier", "seeding", "registry", "files", "cache", "version", "config", "precision"},
    {"decision", "networks"},
    {"engines"},
    {"fit"},
    {"store"},
    {"defenses", "attacks", "data", "victims"},
    {"evaluation", "integrations"},
    {"reporting"},
    {"cli", "__main__"},
    {"__init__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# What belongs to the extras: `import dipguard` must neither need nor load it.
EXTRAS = (
    "PIL", "art", "eagerpy", "foolbox", "hydra", "matplotlib", "omegaconf", "pywt", "requests", "skimage", "sklearn",
    "tensorboard", "torchattacks", "torchvision", "wandb",
)  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
PUBLIC_MODULES = [name for name in MODULES if not any(part.startswith("_") for part in name.split("."))]


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def runs_later(node: ast.AST) -> bool:
    """Whether what is inside does not run when the module is imported."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def statements(tree: ast.AST, *, deferred: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements; without `deferred`, only those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif deferred or not runs_later(node):
            yield from statements(node, deferred=deferred)


def imported(module: str, *, deferred: bool) -> set[str]:
    """Full names that a module imports: `from a import b` counts as a.b where that is a module of ours, else as a."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8")), deferred=deferred):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        inner = {f"{source}.{alias.name}" for alias in node.names}
        names |= {name if name in MODULES else source for name in inner}
    return names


def own_imports(module: str, *, deferred: bool = True) -> set[str]:
    names = imported(module, deferred=deferred)
    return {name for name in names if name.split(".")[0] == "dipguard" and name != module}


PUBLIC_NAMES = """
import numpy, pytorch_lightning, safetensors.torch, torch, torchmetrics, torchmetrics.functional.image, tqdm
before = set(sys.modules)  # torchmetrics itself loads torchvision and matplotlib where they are installed
import dipguard
for name in dipguard.__all__:
    getattr(dipguard, name)
"""
KEYS = f"""
import evaluate, train
from hydra import compose, initialize_config_dir
from dipguard.config import from_hydra, register
register()
with initialize_config_dir({str(ROOT / "conf")!r}, version_base="1.3"):
    cfg = compose("evaluate", ["+seeed=1"])
try:
    from_hydra(cfg)
except TypeError as error:
    assert "seeed" in str(error)
else:
    raise SystemExit(1)
"""
OPTIONS = """
from dipguard.config import GROUPS, names_of, node_of
for group in GROUPS:
    for name in names_of(group):
        node_of(group, name)
"""
HELP = "import dipguard.cli.main as cli; cli.make_parser().format_help()"
ROOMS = "import dipguard.data, dipguard.victims, dipguard.attacks"
HEAVY = {"torch", "pytorch_lightning"}


@pytest.mark.parametrize(
    ("code", "unneeded"),
    [
        pytest.param(PUBLIC_NAMES, set(EXTRAS), id="public-names", marks=pytest.mark.slow),
        pytest.param(HELP, HEAVY | {"torchmetrics", "numpy"}, id="help"),
        pytest.param(KEYS, HEAVY | {"pandas", "matplotlib", "wandb"}, id="keys-are-checked"),
        pytest.param(OPTIONS, HEAVY, id="options-are-read"),
        pytest.param("import dipguard.reporting", HEAVY | {"pandas", "matplotlib"}, id="reporting"),
        pytest.param(ROOMS, {"torchattacks"}, id="rooms", marks=pytest.mark.slow),
    ],
)
def test_what_is_not_needed_is_neither_loaded_nor_written(tmp_path: Path, code: str, unneeded: set[str]):
    begin, end = f"import sys; sys.path.insert(0, {str(ROOT)!r}); before = set()", "print(*set(sys.modules) - before)"
    command = [sys.executable, "-c", "\n".join((begin, code, end))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "dipguard" in loaded
    assert loaded.isdisjoint(unneeded)
    assert not list(tmp_path.iterdir())


def test_public_names_and_their_homes_are_there_when_asked_for():
    assert all(getattr(dipguard, name) is not None for name in dir(dipguard))
    assert set(dipguard.__all__) <= set(dir(dipguard))
    assert dipguard.stitch is dipguard.decision.stitch
    with pytest.raises(AttributeError, match="no attribute 'Stitch'"):
        dipguard.Stitch  # noqa: B018


def test_modules_behind_import_name_no_extra_at_the_top():
    public = [getattr(dipguard, name) for name in dipguard.__all__]
    loaded, ahead = set(), {"dipguard"} | {value.__module__ for value in public if hasattr(value, "__module__")}
    while ahead:
        loaded |= ahead
        ahead = set().union(*(own_imports(module, deferred=False) for module in ahead)) - loaded
    assert len(loaded) > 30
    found = {
        f"{module} imports {name}"
        for module in loaded
        for name in imported(module, deferred=False)
        if name.split(".")[0] in EXTRAS
    }
    assert not found, f"import these inside the functions that need them: {sorted(found)}"


def test_version_matches_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert dipguard.__version__ == project["version"]
    assert f"\nversion: {project['version']}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_all_names_what_the_module_has(module: str):
    loaded = importlib.import_module(module)
    missing = [name for name in getattr(loaded, "__all__", ()) if not hasattr(loaded, name)]
    assert not missing


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str):
    assert room(module) in FLOOR, f"{room(module)} is a new package: give it a floor in FLOORS"
    upward = [name for name in own_imports(module) if FLOOR[room(name)] > FLOOR[room(module)]]
    assert not upward, f"{module} (floor {FLOOR[room(module)]}) imports from above: {upward}"


def test_no_circle_between_modules():
    graph = {module: own_imports(module, deferred=False) for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()


def test_no_circle_between_packages():
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        graph.setdefault(room(module), set()).update(room(name) for name in own_imports(module))
    graphlib.TopologicalSorter({name: below - {name} for name, below in graph.items()}).prepare()


def test_readme_ten_lines_call_dipguard_as_it_is():
    block = next(block.code for block in blocks(ROOT / "README.md") if block.language == "python")
    assert len([line for line in block.splitlines() if line]) == 10
    calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    (made,) = [call for call in calls if ast.unparse(call.func) == "MirrorGuard"]
    inspect.signature(dipguard.MirrorGuard).bind(*made.args, **{word.arg: word.value for word in made.keywords})
    fields = {field.name for field in dataclasses.fields(dipguard.DefenseResult)}
    shown = set(re.findall(r"result\.(\w+)", block))
    assert shown
    assert shown <= fields


@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_readme_commands_compose(program: str):
    hydra = pytest.importorskip("hydra", reason="the commands need the extra app")
    import omegaconf

    from dipguard import config

    config.register()
    shown = [block for name in ("README.md", "docs/programs.md") for block in blocks(ROOT / name)]
    lines = [line for block in shown if block.language == "sh" for line in block.code.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line.split(f"{program}.py")[1], comments=True) for line in lines if f"{program}.py" in line]
    assert len(commands) >= 4
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for overrides in commands:
            composed = hydra.compose(program, overrides=[o for o in overrides if o != "-m"])
            omegaconf.OmegaConf.resolve(composed)
            assert composed.seed == 0


def test_lock_names_the_pair_of_builds_and_no_host():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", lock, flags=re.MULTILINE))
    assert "://" not in lock
    assert (pinned["torch"], pinned["torchvision"]) == ("2.15.0", "0.29.2")
    assert tuple(int(part) for part in pinned["requests"].split(".")[:2]) >= (2, 32)


def test_library_users_are_not_given_the_old_requests_pin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.match(r"[A-Za-z0-9_.-]+", line).group().lower() for line in requirements}

    extras = project["optional-dependencies"]
    assert names(project["dependencies"]).isdisjoint({"torchattacks", "requests", "torchvision", "hydra-core", "wandb"})
    assert [extra for extra, lines in extras.items() if "torchattacks" in names(lines)] == ["attacks"]
    assert not any("attacks" in line for extra, lines in extras.items() if extra != "attacks" for line in lines)
