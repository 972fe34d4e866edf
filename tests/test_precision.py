"""Torch's switches inside and after `precision` and `exact_products`."""

from threading import Barrier, Thread

import pytest
import torch

from dipguard.precision import exact_products, precision

CPU = torch.device("cpu")
matmul, cudnn, mkldnn = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
SWITCHES = (matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)


def switches() -> tuple[str, ...]:
    return tuple(switch.fp32_precision for switch in SWITCHES)


def set_switches(how: str) -> None:
    if how == "new":
        matmul.fp32_precision, cudnn.conv.fp32_precision = "tf32", "ieee"
    elif how in ("high", "medium"):  # what Lightning recommends for GPUs
        torch.set_float32_matmul_precision(how)
    elif how != "as installed":
        matmul.allow_tf32 = cudnn.allow_tf32 = how == "all tf32"


@pytest.fixture(autouse=True)
def restored() -> None:
    before, old = switches(), (matmul.allow_tf32, cudnn.allow_tf32)
    yield
    torch.set_float32_matmul_precision("highest")
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = *old, False
    for switch, value in zip(SWITCHES, before, strict=True):
        switch.fp32_precision = value


@pytest.mark.parametrize("start", ["as installed", "all tf32", "all exact", "high", "medium", "new"])
@pytest.mark.parametrize(("name", "products"), [("float32", "ieee"), ("tf32", "tf32"), ("bfloat16", "ieee")])
def test_switches_are_set_and_put_back(start: str, name: str, products: str) -> None:
    set_switches(start)
    cudnn.benchmark = True
    before = switches()
    with precision(name, CPU):
        assert switches() == (products,) * 3 + ("ieee",) * 3
        assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if name == "bfloat16" else torch.float32)
    assert switches() == before
    with pytest.raises(KeyError), precision(name, CPU):
        raise KeyError
    assert switches() == before
    assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("start", ["as installed", "all tf32", "all exact", "high", "medium"])
@pytest.mark.parametrize("name", ["float32", "tf32"])
def test_torch_s_old_switches_stay_readable(start: str, name: str) -> None:
    set_switches(start)
    before = matmul.allow_tf32, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    with precision(name, CPU):
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (name == "tf32",) * 2
        assert torch.get_float32_matmul_precision() == ("high" if name == "tf32" else "highest")
    assert (matmul.allow_tf32, cudnn.allow_tf32, torch.get_float32_matmul_precision()) == before


def test_the_last_of_several_threads_puts_the_switches_back() -> None:
    set_switches("all tf32")
    before, meet, seen = switches(), Barrier(2, timeout=60), []

    def first() -> None:
        with exact_products():
            meet.wait()  # both are inside
        meet.wait()  # one has left
        meet.wait()

    thread = Thread(target=first)
    thread.start()
    with exact_products():
        meet.wait()
        meet.wait()
        seen.append(switches())
    seen.append(switches())
    meet.wait()
    thread.join()
    assert seen == [("ieee",) * len(SWITCHES), before]


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
