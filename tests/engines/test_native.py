"""The native engine against torch's operations: same numbers, whatever the network, the image's size and the stack."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dipguard.engines import Engine, TorchEngine, make_engine
from dipguard.engines.base import say_once
from dipguard.engines.native import NativeEngine
from dipguard.engines.native_build import BuildError, _library, compiler, library
from dipguard.engines.native_plan import UnsupportedError, make_plan
from dipguard.networks import PRESETS, NetworkSpec, StackedSkipNet, build

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")

UNEVEN = NetworkSpec(
    n_d=(8, 12), n_u=(20, 4), n_s=(0, 5), k_d=(5, 3), k_u=(2, 4), k_s=(1, 3), input_depth=3, z_scale=0.1
)  # fmt: skip
SINGLE = NetworkSpec(n_d=(4,), n_u=(8,), n_s=(1,), k_d=(3,), k_u=(1,), k_s=(1,), input_depth=1)

NETWORKS: dict[str, tuple[str | NetworkSpec, tuple[int, int]]] = {
    "small": ("small", (32, 32)),
    "medium": ("medium", (32, 32)),
    "medium, odd sides": ("medium", (21, 35)),
    "large": ("large", (32, 32)),
    "large, deepest borders repeated": ("large", (20, 40)),
    "imagenet": ("imagenet", (33, 36)),
    "uneven": (UNEVEN, (17, 12)),
    "one scale": (SINGLE, (9, 16)),
}
QUICK = [("small", "zeros"), ("medium, odd sides", "reflect"), ("uneven", "zeros"), ("one scale", "reflect")]
CASES = [
    pytest.param(row, padding, marks=() if (row, padding) in QUICK else pytest.mark.slow)
    for row in NETWORKS
    for padding in ("zeros", "reflect")
]


def inputs(net: StackedSkipNet, size: tuple[int, int], *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Given images and z, float64."""
    draw = torch.Generator().manual_seed(seed)
    given = torch.rand(net.stack_size, 3, *size, generator=draw, dtype=torch.float64)
    z = torch.rand(net.stack_size, net.spec.input_depth, *size, generator=draw, dtype=torch.float64)
    return given, z * net.spec.z_scale


def engine_on(
    network, name, size, *, stack=3, padding="zeros", tolerance=None, z_gradient=False
) -> tuple[Engine, StackedSkipNet, Tensor]:
    """An engine with its network, and z."""
    net = build(network, stack_size=stack, padding=padding, dtype=torch.float64)
    given, z = inputs(net, size)
    engine = make_engine(name, net, given, steps=1, tolerance=tolerance, z_gradient=z_gradient)
    return engine, net, z.requires_grad_(z_gradient)


def gradients(engine: Engine, net: StackedSkipNet) -> dict[str, Tensor]:
    """The network's gradients by name, wherever the engine keeps them."""
    if isinstance(engine, TorchEngine):
        return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    (flat,) = engine.parameters()
    weights = flat.data.clone()
    assert flat.grad is not None
    flat.data.copy_(flat.grad)  # the network's parameters are views of it
    found = {name: p.data.clone() for name, p in net.named_parameters()}
    flat.data.copy_(weights)
    return found


@pytest.mark.parametrize(("row", "padding"), CASES)
def test_reconstruction_loss_and_gradients_are_those_of_torch(row: str, padding: str) -> None:
    compare(*NETWORKS[row], padding=padding, tolerance=None)


def test_with_a_dead_zone_for_each_image_too() -> None:
    compare(*NETWORKS["small"], padding="zeros", tolerance=torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64))


@pytest.mark.parametrize("tolerance", [None, torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64)])
def test_a_fit_that_diverged_has_no_error_of_0(tolerance: Tensor | None) -> None:
    engine, net, z = engine_on("small", "native", (16, 16), tolerance=tolerance)
    with torch.no_grad():
        next(net.parameters())[1] = math.nan  # of the second of three images
    step = engine.step(z)
    assert step.errors.isnan().tolist() == [False, True, False]


def compare(network: str | NetworkSpec, size: tuple[int, int], *, padding: str, tolerance: Tensor | None) -> None:
    """One step of the native engine with one of torch's."""
    theirs, net, z = engine_on(network, "torch", size, padding=padding, tolerance=tolerance)
    ours, own_net, _ = engine_on(network, "native", size, padding=padding, tolerance=tolerance)
    assert ours.name == "native"
    expected, got = theirs.step(z), ours.step(z)
    for engine, step in ((theirs, expected), (ours, got)):
        step.loss.backward()
        assert step.reconstructions.requires_grad == (engine.name == "torch")
    torch.testing.assert_close(got.reconstructions, expected.reconstructions.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(got.errors, expected.errors, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.loss.detach(), expected.loss.detach(), rtol=1e-12, atol=0)
    found, wanted = gradients(ours, own_net), gradients(theirs, net)
    assert found.keys() == wanted.keys()
    largest = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10 * largest, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("row", "padding"),
    [("small", "zeros"), ("uneven", "zeros"), pytest.param("medium", "reflect", marks=pytest.mark.slow)],
)
def test_a_fit_stays_with_torch(row: str, padding: str) -> None:
    network, size = NETWORKS[row]
    pair = [engine_on(network, name, size, stack=2, padding=padding) for name in ("torch", "native")]
    seen = []
    for engine, net, z in pair:
        optimiser = torch.optim.Adam(engine.parameters(), lr=0.01, fused=True)
        for _ in range(15):
            step = engine.step(z)
            optimiser.zero_grad()
            step.loss.backward()
            optimiser.step()
        seen.append(step.reconstructions.detach())
        # The network's own parameters follow: torch's forward pass on them is the engine's next one.
        with torch.no_grad():
            torch.testing.assert_close(net(z), engine.step(z).reconstructions, rtol=0, atol=1e-11)
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=1e-8)
    assert float((seen[0] - seen[0].mean()).abs().max()) > 0.01


def test_gradients_set_to_zero_in_place_are_refused() -> None:
    network, size = NETWORKS["small"]
    engine, _, z = engine_on(network, "native", size, stack=2, padding="zeros")
    engine.step(z).loss.backward()
    loss = engine.step(z).loss  # its gradients are there before it is asked for them
    torch.optim.Adam(engine.parameters()).zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match="`optimizer_zero_grad` must set gradients to None"):
        loss.backward()


@pytest.mark.parametrize(("row", "padding"), CASES)
def test_the_gradient_of_z_is_that_of_torch_and_disturbs_nothing(row: str, padding: str) -> None:
    network, size = NETWORKS[row]
    found = []
    for name in ("torch", "native"):
        engine, net, z = engine_on(network, name, size, padding=padding, z_gradient=True)
        noise = torch.linspace(-0.1, 0.1, z.numel(), dtype=z.dtype).view_as(z)
        (engine.step(z + noise).loss * 3).backward()
        weights = gradients(engine, net)
        again = engine.step(z).reconstructions.detach()
        assert z.grad is not None
        found.append((z.grad, weights, again))
    (theirs, wanted, expected), (ours, weights, got) = found
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10 * float(theirs.abs().max()))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
    largest = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-10 * largest)


def test_float32_rounds_as_torch_does() -> None:
    net, twin = (build("medium", stack_size=2, padding="reflect") for _ in range(2))
    given, z = (x.float() for x in inputs(net, (32, 32)))
    exact = make_engine("torch", build("medium", stack_size=2, dtype=torch.float64), given.double(), steps=1)
    reference = exact.step(z.double()).reconstructions.detach()
    wrong = [
        float((make_engine(name, n, given, steps=1).step(z).reconstructions.detach() - reference).abs().max())
        for name, n in (("torch", net), ("native", twin))
    ]
    assert wrong[1] < max(3 * wrong[0], 1e-5)


def test_an_upstream_factor_scales_the_gradient_and_two_passes_add_up() -> None:
    engine, net, z = engine_on("small", "native", (16, 16))
    engine.step(z).loss.backward()
    once = {name: value.clone() for name, value in gradients(engine, net).items()}
    (flat,) = engine.parameters()
    flat.grad = None
    (engine.step(z).loss * 3).backward()
    for name, value in gradients(engine, net).items():
        torch.testing.assert_close(value, once[name] * 3)
    engine.step(z).loss.backward()
    for name, value in gradients(engine, net).items():
        torch.testing.assert_close(value, once[name] * 4)


def test_auto_takes_torch_for_short_fits_and_native_for_long_ones() -> None:
    net = build("small", stack_size=1)
    given = torch.rand(1, 3, 16, 16)
    assert [make_engine("auto", net, given, steps=n).name for n in (99, 100)] == ["torch", "native"]


def test_what_native_cannot_run_is_named_and_auto_goes_without() -> None:
    spec = dataclasses.replace(PRESETS["small"], k_d=(13, 2))
    net = build(spec, stack_size=1)
    given = torch.rand(1, 3, 32, 32)
    with pytest.raises(UnsupportedError, match="kernels are at most 11x11"):
        make_plan(spec, padding="zeros", height=32, width=32)
    for name in ("n_d", "n_u"):
        odd = dataclasses.replace(PRESETS["small"], n_s=(1, 1), **{name: (16, 5)})
        with pytest.raises(UnsupportedError, match=f"{name} must be a multiple of 4 below a scale with skips, got 5"):
            make_plan(odd, padding="zeros", height=32, width=32)
    with pytest.raises(ValueError, match="`engine` 'native' cannot be used here: kernels are at most 11x11"):
        make_engine("native", net, given, steps=1000)
    assert make_engine("auto", net, given, steps=1000).name == "torch"
    nearest = build(dataclasses.replace(PRESETS["small"], upsample="nearest"), stack_size=1)
    with pytest.raises(UnsupportedError, match="upsampling is bilinear, got 'nearest'"):
        NativeEngine(nearest, given)
    assert make_engine("auto", nearest, given, steps=1000).name == "torch"
    half = build("small", stack_size=1).to(torch.float16)
    with pytest.raises(UnsupportedError, match=r"it needs float32 or float64 on a CPU, got torch.float16"):
        NativeEngine(half, given.half())
    with pytest.raises(ValueError, match=r"`engine` must be one of auto, torch, native.*, got 'cuda'"):
        make_engine("cuda", net, given, steps=1)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, and nothing is loaded yet."""
    monkeypatch.setenv("DIPGUARD_CACHE", str(tmp_path / "cache"))
    for known in (_library, say_once):
        known.cache_clear()
    yield tmp_path / "cache" / "native"
    for known in (_library, say_once):
        known.cache_clear()


def program(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler that takes no time: it gives what the real one has made in another test."""
    library("float32")
    (made,) = Path(os.environ["DIPGUARD_CACHE"], "native").glob("stack_step-float32-*.so")
    text = f'#!/bin/sh\n[ "$1" = --version ] && exit 0\nwhile [ "$1" != -o ]; do shift; done\ncp {made} "$2"\n'
    monkeypatch.setenv("CXX", program(tmp_path / "quick", text))


# Environment variables (None: there is none), attributes, and the reason that is given; {} is the test's folder.
HINDRANCES: dict[str, tuple[dict[str, str | None], dict[str, Any], str]] = {
    "no compiler": ({"CXX": None, "PATH": "{}"}, {}, "no C"),
    "a failing compiler": ({"CXX": "{}/fails"}, {}, "could not compile the native engine: cannot do that"),
    "an idle compiler": ({"CXX": "/bin/true"}, {}, "could not compile the native engine: no message"),
    "a compiler that may not run": ({"CXX": "{}/noise"}, {}, "Exec format error"),
    "no home": (
        {"DIPGUARD_CACHE": None, "XDG_CACHE_HOME": None},
        {"os.path.expanduser": lambda path: path},
        "set DIPGUARD_CACHE",
    ),
    "an unwritable cache": ({"DIPGUARD_CACHE": "/proc/cache"}, {}, "/proc/cache"),
    "no folder for temporary files": ({}, {"tempfile.tempdir": "/no/such/folder"}, "/no/such/folder"),
    "a cache of another user": ({}, {"os.getuid": lambda: 12345}, "belongs to another user"),
}


@pytest.mark.parametrize(("variables", "attributes", "reason"), HINDRANCES.values(), ids=HINDRANCES)
def test_where_it_cannot_be_built_auto_takes_torch_and_says_so_once(
    variables, attributes, reason, fresh, tmp_path, monkeypatch, caplog
) -> None:
    program(tmp_path / "fails", "#!/bin/sh\necho 'cannot do that' >&2\nexit 1\n")
    program(tmp_path / "noise", "\0\1\2")
    for name, value in variables.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value.format(tmp_path))
    for name, value in attributes.items():
        monkeypatch.setattr(name, value)
    net, given = build("small", stack_size=1), torch.rand(1, 3, 16, 16)
    for _ in range(2):
        assert make_engine("auto", net, given, steps=1000).name == "torch"
    (line,) = caplog.messages
    assert line.startswith("the engine 'native' cannot be used, torch's takes its place: ")
    assert reason in line
    with pytest.raises(BuildError, match=reason):
        library("float32")
    with pytest.raises(ValueError, match="`engine` 'native' cannot be used here"):
        make_engine("native", net, given, steps=1000)
    assert not list(tmp_path.rglob("*.so"))


def replaced(path: Path, content: bytes = b"of another user") -> None:
    path.unlink()  # this process has the old file in memory
    path.write_bytes(content)


def cut(path: Path) -> None:
    replaced(path, path.read_bytes()[: path.stat().st_size // 2])


def open_to_all(path: Path) -> None:
    path.chmod(0o666)


def given_away(path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root may give a file away")
    os.chown(path, 12345, 12345)


def link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


@pytest.mark.parametrize("harm", [cut, replaced, open_to_all, given_away, link])
@pytest.mark.usefixtures("quick_compiler")
def test_only_this_users_own_whole_object_is_loaded(harm: Callable[[Path], None], fresh: Path) -> None:
    fresh.mkdir(parents=True)
    fresh.chmod(0o777)
    library("float32")
    (made,) = fresh.glob("*.so")
    content = made.read_bytes()
    assert [path.stat().st_mode & 0o777 for path in (fresh, made)] == [0o700, 0o600]
    harm(made)
    _library.cache_clear()
    library("float32")
    (again,) = fresh.glob("*.so")
    state = again.lstat()
    assert (again.read_bytes(), state.st_mode & 0o170777, state.st_uid) == (content, 0o100600, os.getuid())


@pytest.mark.usefixtures("quick_compiler")
def test_it_is_compiled_once(fresh: Path) -> None:
    library("float32")
    (made,) = fresh.iterdir()
    written = made.stat().st_mtime_ns
    _library.cache_clear()
    library("float32")
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [written]
