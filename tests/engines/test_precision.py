"""Torch's switches inside and after `precision`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dipguard.engines import precision

CPU = torch.device("cpu")
matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn


def switches() -> tuple[str, ...]:
    return matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision


def as_installed() -> None:
    pass


def all_tf32() -> None:
    matmul.allow_tf32 = cudnn.allow_tf32 = True


def all_exact() -> None:
    matmul.allow_tf32 = cudnn.allow_tf32 = False


def by_the_new_switches() -> None:
    matmul.fp32_precision = "tf32"
    cudnn.conv.fp32_precision = "ieee"


@pytest.fixture(autouse=True)
def restored() -> None:
    before, old = switches(), (matmul.allow_tf32, cudnn.allow_tf32)
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = old
    for switch, value in zip((matmul, cudnn.conv, cudnn.rnn), before, strict=True):
        switch.fp32_precision = value


@pytest.mark.parametrize("start", [as_installed, all_tf32, all_exact, by_the_new_switches])
@pytest.mark.parametrize(("name", "products"), [("float32", "ieee"), ("tf32", "tf32"), ("bfloat16", "ieee")])
def test_switches_are_set_and_put_back(start: Callable[[], None], name: str, products: str) -> None:
    start()
    before = switches()
    with precision(name, CPU):
        assert switches() == (products,) * 3
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if name == "bfloat16" else torch.float32)
    assert switches() == before
    with pytest.raises(KeyError), precision(name, CPU):
        raise KeyError
    assert switches() == before
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("start", [as_installed, all_tf32, all_exact])
@pytest.mark.parametrize("name", ["float32", "tf32"])
def test_torch_s_old_switches_stay_readable(start: Callable[[], None], name: str) -> None:
    start()
    before = matmul.allow_tf32, cudnn.allow_tf32
    with precision(name, CPU):
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (name == "tf32",) * 2
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before


def test_unknown_names_are_refused() -> None:
    with (
        pytest.raises(ValueError, match="`matmul_precision` must be one of float32, tf32, bfloat16, got 'float16'"),
        precision("float16", CPU),
    ):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_tf32_rounds_and_float32_does_not() -> None:
    device = torch.device("cuda")
    a, b = torch.rand(2, 512, 512, device=device).unbind()
    right = a.double() @ b.double()
    errors = {}
    for name in ("float32", "tf32"):
        with precision(name, device):
            errors[name] = float(((a @ b) - right).abs().max() / right.abs().max())
    assert errors["float32"] < 1e-5 < errors["tf32"] < 1e-2
