"""The recorded step, run eagerly on a CPU, and as a graph where there is a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dipguard.engines.cuda_graph import CudaGraphEngine
from dipguard.networks import StackedSkipNet, build

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def problem(
    network: str = "small", *, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[StackedSkipNet, Tensor, Tensor]:
    net = build(network, stack_size=3, seed=1, dtype=dtype).to(device)
    given, z = torch.rand(3, 3, 17, 18, dtype=dtype), torch.rand(3, 4, 17, 18, dtype=dtype) / 10
    return net, given.to(device), z.to(device)


def by_autograd(net: StackedSkipNet, given: Tensor, z: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    x = net(z)
    errors = torch.stack([torch.nn.functional.mse_loss(x[b], given[b]) for b in range(len(x))])
    net.zero_grad()
    errors.sum().backward()
    return x.detach(), errors.detach(), [p.grad for p in net.parameters()]


@pytest.mark.parametrize(
    ("mode", "network"), [(torch.enable_grad, "medium"), (torch.no_grad, "small"), (torch.inference_mode, "small")]
)
def test_the_step_is_autograd_s(network: str, mode: Any) -> None:
    net, given, z = problem(network)
    right = by_autograd(net, given, z)
    with mode():
        engine = CudaGraphEngine(net, given.clone(), capture=False)
        x, errors, gradients = engine.compute(z.clone())
    assert x.shape == given.shape
    assert errors.shape == (3,)
    assert not x.requires_grad
    for ours, theirs in zip((x, errors, *gradients), (*right[:2], *right[2]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_steps_follow_weights_and_z() -> None:
    net, given, z = problem()
    engine = CudaGraphEngine(net, given, capture=False)
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    for t in range(3):
        x, _, gradients = engine.compute(z + t)
        right = by_autograd(net, given, z + t)
        assert torch.equal(x, right[0])
        for ours, theirs in zip(gradients, right[2], strict=True):
            assert torch.equal(ours, theirs)
        optimiser.step()


def test_the_caller_keeps_his_images() -> None:
    net, given, z = problem()
    engine = CudaGraphEngine(net, given, capture=False)
    before = engine.compute(z)[1]
    given.zero_()
    assert torch.equal(engine.compute(z)[1], before)


def test_bfloat16_comes_near_float32() -> None:
    net, given, z = problem(dtype=torch.float32)
    exact, rough = (
        CudaGraphEngine(net, given, matmul_precision=p, capture=False).compute(z) for p in ("float32", "bfloat16")
    )
    assert rough[0].dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in rough[2])
    difference = float((exact[0] - rough[0]).abs().mean())
    assert 0 < difference < 0.02


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without CUDA says")
def test_without_cuda_a_graph_is_refused() -> None:
    net, given, _ = problem()
    with pytest.raises(RuntimeError, match="a CUDA graph needs images and network on a CUDA device, got cpu"):
        CudaGraphEngine(net, given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matmul_precision": "float16"}, "`matmul_precision` must be one of float32, tf32, bfloat16, got 'float16'"),
        ({"convolutions": ["fft"]}, "`convolutions` must be one of grouped, matmul, triton, triton tf32x3, got 'fft'"),
        ({"given": torch.rand(2, 3, 17, 18)}, r"`given` must be one image a network, \[3, 3, H, W\]"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    net, given, _ = problem()
    with pytest.raises(ValueError, match=message):
        CudaGraphEngine(net, **{"given": given, "capture": False, **change})


def test_z_of_another_shape_is_refused() -> None:
    net, given, z = problem()
    with pytest.raises(ValueError, match=r"`z` must have shape \(3, 4, 17, 18\), got \(1, 4, 17, 18\)"):
        CudaGraphEngine(net, given, capture=False).compute(z[:1])


@needs_cuda
@pytest.mark.parametrize("convolution", ["grouped", "matmul", "triton", "triton tf32x3"])
def test_a_graph_gives_what_eager_steps_give(convolution: str) -> None:
    results = []
    normalisation = "triton" if convolution.startswith("triton") else "torch"
    for capture in (True, False):
        torch.manual_seed(0)
        net, given, z = problem(device="cuda")
        engine = CudaGraphEngine(
            net, given, capture=capture, convolutions=[convolution], normalisations=[normalisation]
        )
        optimiser = torch.optim.Adam(net.parameters(), lr=0.01, fused=True)
        seen = []
        for t in range(5):
            x, errors, gradients = engine.compute(z + t / 10)
            seen += [x.clone(), errors.clone()]
            for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimiser.step()
        results.append(seen)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
