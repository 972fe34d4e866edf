"""The candidates for a layer's kernel against torch's own operations, and which one each layer gets."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dipguard.engines.kernel_choice import (
    CHECKED,
    CONVOLUTIONS,
    JOINS,
    NORMALISATIONS,
    LayerShape,
    available,
    choose_kernels,
    layer_shapes,
    measure,
    use_first_kernels,
    use_kernels,
)
from dipguard.networks import build
from dipguard.networks.unet import (
    StackedConv2d,
    StackedJoin2d,
    StackedNorm2d,
    grouped_conv2d,
    join_norm,
    norm_leaky_relu,
)
from dipguard.precision import precision

CPU = torch.device("cpu")
ON_CPU = available(CONVOLUTIONS, CPU)
SHAPE = LayerShape((1, 6, 8, 8), (2, 4, 3, 3, 3), (("stride", 1), ("padding", "reflect")))
NORM = LayerShape((1, 6, 8, 8), (2, 3), (("slope", 0.2), ("eps", 1e-5)))
JOIN = LayerShape((1, 4, 4, 4), (2, 3), (("upsample", "bilinear"), ("eps", 1e-5), ("size", (8, 7))))

# kernel, stride, padding, height, width; the last but one is a 4x4 kernel on 2x2 pixels, where the border is repeated.
GEOMETRIES = [
    (1, 1, "zeros", 5, 6), (1, 2, "reflect", 5, 6),
    (2, 1, "zeros", 5, 6), (2, 2, "reflect", 6, 7),
    (3, 1, "zeros", 7, 6), (3, 1, "reflect", 5, 5), (3, 2, "reflect", 7, 8),
    (4, 1, "reflect", 2, 2), (4, 2, "zeros", 9, 6),
]  # fmt: skip


def one_by_one(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int, padding: str) -> Tensor:
    before, after = (weight.shape[-1] - 1) // 2, weight.shape[-1] // 2
    mode = "constant" if padding == "zeros" else "reflect" if after < min(x.shape[-2:]) else "replicate"
    parts = []
    for b, own in enumerate(x.unflatten(1, (len(weight), -1)).unbind(1)):
        if before + after:
            own = F.pad(own, (before, after, before, after), mode=mode)
        parts.append(F.conv2d(own, weight[b], bias[b], stride=stride))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize(("kernel", "stride", "padding", "height", "width"), GEOMETRIES)
def test_every_convolution_is_the_networks_own_convolutions(
    kernel, stride, padding, height, width, name, channels_last
) -> None:
    shapes = (1, 12, height, width), (3, 5, 4, kernel, kernel), (3, 5)  # three networks
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    tensors = tuple(t.requires_grad_() for t in (x, weight, bias))
    y = CONVOLUTIONS[name](*tensors, stride=stride, padding=padding)
    right = one_by_one(*tensors, stride=stride, padding=padding)
    assert y.shape == right.shape == (1, 15, -(-height // stride), -(-width // stride))
    dy = torch.randn_like(right)
    ours, theirs = (torch.autograd.grad(out, tensors, dy) for out in (y, right))
    torch.testing.assert_close(y, right, rtol=0, atol=1e-10)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("network", ["small", "large"])
@pytest.mark.parametrize("name", [name for name in ON_CPU if name != "grouped"])
def test_a_whole_network_gives_the_same_with_every_convolution(network: str, name: str) -> None:
    net = build(network, stack_size=2, dtype=torch.float64)
    z = torch.rand(2, 4, 32, 32, dtype=torch.float64)
    results = []
    for chosen in ("grouped", name):
        use_kernels(net, choose_kernels(net, CPU, size=(32, 32), convolutions=[chosen]))
        assert {layer.compute for layer in net.modules() if isinstance(layer, StackedConv2d)} == {CONVOLUTIONS[chosen]}
        x = net(z)
        results.append((x, *torch.autograd.grad(x.square().sum(), list(net.parameters()))))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_triton_is_offered_on_cuda_alone() -> None:
    assert ON_CPU == ("grouped", "matmul")
    assert available(NORMALISATIONS, CPU) == ("torch",)
    with precision("float32", CPU):
        on_gpu = set(available(CONVOLUTIONS, torch.device("cuda")))
    assert on_gpu <= set(CONVOLUTIONS) == {"grouped", "matmul", "triton", "triton tf32x3"}
    with precision("tf32", CPU):
        assert set(available(CONVOLUTIONS, torch.device("cuda"))) == on_gpu - {"triton tf32x3"}


def flops(shape: LayerShape) -> int:
    """Of a convolution's forward pass; a multiplication and an addition count as two."""
    stride = dict(shape.options)["stride"]
    rows, columns = (-(-side // stride) for side in shape.x[-2:])
    return 2 * math.prod(shape.weight) * rows * columns


@pytest.mark.parametrize(("network", "side"), [("small", 17), ("large", 32)])
def test_layer_shapes_account_for_every_flop(network: str, side: int) -> None:
    net = build(network, stack_size=2)
    shapes = {n: s for n, s in layer_shapes(net, size=(side, side + 1)).items() if s.table is CONVOLUTIONS}
    assert set(shapes) == {name for name, layer in net.named_modules() if isinstance(layer, StackedConv2d)}
    with FlopCounterMode(display=False) as counter:
        net(torch.rand(2, 4, side, side + 1))
    assert sum(map(flops, shapes.values())) == counter.get_total_flops()
    # Only the layers that read z, which is fixed, need no gradient of their input.
    assert {name for name, shape in shapes.items() if not shape.gradient} == {"body.down.0.conv", "body.skip.conv"}
    with_gradient = layer_shapes(net, size=(side, side + 1), z_gradient=True)
    assert all(with_gradient[name].gradient for name in shapes)


def test_every_normalisation_and_join_has_its_shape_and_options() -> None:
    net = build("small", stack_size=3)
    shapes = {n: s for n, s in layer_shapes(net, size=(17, 18)).items() if s.table is not CONVOLUTIONS}
    modules = {name: module for name, module in net.named_modules() if name in shapes}
    assert set(shapes) == {n for n, m in net.named_modules() if isinstance(m, StackedNorm2d | StackedJoin2d)}
    for name, shape in shapes.items():
        assert shape.table is (NORMALISATIONS if isinstance(modules[name], StackedNorm2d) else JOINS)
    assert shapes["body.up.1.norm"] == LayerShape((1, 48, 17, 18), (3, 16), (("slope", 0.2), ("eps", 1e-5)))
    join = shapes["body.norm"]
    assert join == LayerShape((1, 48, 9, 9), (3, 20), (("upsample", "bilinear"), ("eps", 1e-5), ("size", (17, 18))))
    example = [tuple(t.shape) for t in join.example(device=CPU, dtype=torch.float32)]
    assert example == [(1, 48, 9, 9), (3, 20), (3, 20), (1, 12, 17, 18)]


@pytest.mark.parametrize("upsample", ["bilinear", "nearest"])
@pytest.mark.parametrize("skips", [0, 2])
def test_a_join_is_upsampling_concatenation_and_normalisation_network_by_network(skips: int, upsample: str) -> None:
    low, skip = torch.randn(1, 6, 3, 4), torch.randn(1, 2 * skips, 5, 8) if skips else None
    weight, bias = torch.rand(2, 3 + skips), torch.rand(2, 3 + skips)
    parts = []
    for b in range(2):
        image = nn.Upsample(scale_factor=2, mode=upsample)(low[:, 3 * b : 3 * b + 3])[..., :5, :8]
        if skip is not None:
            image = torch.cat([skip[:, 2 * b : 2 * b + 2], image], dim=1)
        parts.append(F.batch_norm(image, None, None, weight[b], bias[b], training=True, eps=1e-3))
    y = join_norm(low, weight, bias, skip, size=(5, 8), upsample=upsample, eps=1e-3)
    torch.testing.assert_close(y, torch.cat(parts, dim=1))


def test_a_cpu_takes_torch_s_kernels_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dipguard.engines.kernel_choice.measure", None)
    net = build("small", stack_size=2)
    chosen = choose_kernels(net, CPU, size=(32, 32))
    assert set(chosen) == set(layer_shapes(net, size=(32, 32)))
    assert set(chosen.values()) == {"grouped", "torch"}


@pytest.mark.parametrize("gradient", [False, True])
def test_measuring_times_each_candidate(gradient: bool) -> None:
    times = measure(dataclasses.replace(SHAPE, gradient=gradient), device=CPU, dtype=torch.float64, names=ON_CPU)
    assert set(times) == set(ON_CPU)
    assert all(0 < seconds < math.inf for seconds in times.values())


@pytest.mark.parametrize("shape", [SHAPE, NORM, JOIN])
def test_a_candidate_that_cannot_run_is_never_the_fastest(shape: LayerShape) -> None:
    usual = next(iter(shape.table))
    times = measure(shape, device=CPU, dtype=torch.float32, names=[usual, "triton"])
    assert math.isinf(times["triton"])
    assert math.isfinite(times[usual])


@pytest.mark.parametrize(
    ("name", "noise", "added", "allowed"),
    [
        ("matmul", 0.0, 0.0, True),
        ("matmul", 0.0, 1e-2, False),
        ("matmul", 0.0, float("nan"), False),
        ("matmul", 2e-6, 0.0, True),
        ("triton tf32x3", 0.0, 0.0, True),  # float32 only where its error is
        ("triton tf32x3", 1e-7, 0.0, False),
    ],
)
def test_a_candidate_that_disagrees_is_never_the_fastest(name, noise, added, allowed, monkeypatch) -> None:
    def wrong(x: Tensor, weight: Tensor, bias: Tensor, **options: object) -> Tensor:
        return grouped_conv2d(x, weight * (1 + noise), bias, **options) + added

    monkeypatch.setitem(CONVOLUTIONS, name, wrong)
    with precision("float32", CPU):
        times = measure(SHAPE, device=CPU, dtype=torch.float32, names=["grouped", name])
    assert math.isfinite(times[name]) == allowed


def test_a_stack_of_more_networks_than_are_compared_is_measured() -> None:
    stack = CHECKED + 3
    shape = LayerShape((1, 3 * stack, 8, 8), (stack, 4, 3, 3, 3), (("stride", 1), ("padding", "zeros")))
    with precision("float32", CPU):
        times = measure(shape, device=CPU, dtype=torch.float32, names=["grouped", "matmul"])
    assert all(math.isfinite(seconds) for seconds in times.values())


def test_a_candidate_whose_gradient_is_nan_is_never_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, weight: Tensor, bias: Tensor, **options: object) -> Tensor:
        return grouped_conv2d(x, weight + (0 * weight).sqrt(), bias, **options)  # the root's slope at 0 is infinite

    monkeypatch.setitem(CONVOLUTIONS, "matmul", wrong)
    assert math.isinf(measure(SHAPE, device=CPU, dtype=torch.float32, names=["grouped", "matmul"])["matmul"])


@pytest.mark.parametrize("name", ["matmul", "triton"])
def test_a_lack_of_memory_is_the_stacks_except_where_neighbourhoods_are_kept(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*args: object, **options: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(CONVOLUTIONS, name, lacking)
    names = {"device": CPU, "dtype": torch.float32, "names": ["grouped", name]}
    if name == "matmul":
        assert math.isinf(measure(SHAPE, **names)[name])
    else:
        with pytest.raises(torch.OutOfMemoryError):
            measure(SHAPE, **names)


def test_what_gains_most_is_measured_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LayerShape] = []

    def note(shape: LayerShape, *, names: tuple[str, ...], **options: object) -> dict[str, float]:
        seen.append(shape)
        return dict.fromkeys(names, 1.0)

    monkeypatch.setattr("dipguard.engines.kernel_choice.measure", note)
    offered = {"convolutions": ("grouped", "matmul"), "normalisations": ("torch", "triton")}
    choose_kernels(build("small", stack_size=1), CPU, size=(16, 16), **offered)
    tables = [shape.table for shape in seen]
    assert [len(list(group)) for _, group in itertools.groupby(tables, key=id)] == [2, 5, 11]
    assert (tables[0], tables[2], tables[-1]) == (JOINS, NORMALISATIONS, CONVOLUTIONS)
    assert seen[0].x[-2:] == (8, 8)
    assert seen[1].x[-2:] == (4, 4)


def test_when_the_time_is_up_nothing_is_compiled_where_a_kernel_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def noted(*args: Tensor, **options: object) -> Tensor:
        tried.append("triton")
        return grouped_conv2d(*args, **options)

    monkeypatch.setitem(CONVOLUTIONS, "triton", noted)
    net = build("small", stack_size=1)
    for budget, first, expected in ((-1.0, "grouped", False), (1e9, "grouped", True), (-1.0, "triton", True)):
        tried.clear()
        monkeypatch.setattr("dipguard.engines.kernel_choice.BUDGET", budget)
        choose_kernels(net, CPU, size=(16, 16), convolutions=dict.fromkeys([first, "triton", "matmul"]))
        assert bool(tried) == expected


@pytest.mark.parametrize(("memory", "tried"), [(30_000, False), (28_000 * 8, True)])
def test_matmul_is_not_tried_where_its_neighbourhoods_fill_the_memory(memory, tried, monkeypatch) -> None:
    # 6 channels of 64 pixels with 9 neighbours each, in float64: 27,648 bytes.
    monkeypatch.setattr("dipguard.engines.kernel_choice._memory", lambda device: memory)
    times = measure(SHAPE, device=CPU, dtype=torch.float64, names=["grouped", "matmul"])
    assert math.isfinite(times["matmul"]) == tried


def test_measuring_works_under_inference_mode_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    with torch.inference_mode():
        times = measure(SHAPE, device=CPU, dtype=torch.bfloat16, names=["grouped", "matmul"])
    assert all(math.isfinite(seconds) for seconds in times.values())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_candidate_that_fails_is_left_out_where_there_is_a_choice() -> None:
    chosen = choose_kernels(build("small", stack_size=1), CPU, size=(16, 16), normalisations=("torch", "triton"))
    assert set(chosen.values()) == {"grouped", "torch"}


def test_layers_for_which_no_candidate_works_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"none of triton, triton computes LayerShape\(x=.* on cpu"):
        choose_kernels(build("small", stack_size=1), CPU, size=(16, 16), normalisations=("triton", "triton"))


def test_a_choice_is_applied_to_the_layers_it_names() -> None:
    net = build("small", stack_size=1)
    usual = choose_kernels(net, CPU, size=(16, 16))
    use_kernels(net, {"head": "matmul", "body.up.0.conv": "triton", "body.norm": "triton", "body.up.1.norm": "triton"})
    layers = [
        (n, m.compute) for n, m in net.named_modules() if isinstance(m, StackedConv2d | StackedNorm2d | StackedJoin2d)
    ]
    changed = {n: function for n, function in layers if function not in (grouped_conv2d, norm_leaky_relu, join_norm)}
    convolutions = {"head": CONVOLUTIONS["matmul"], "body.up.0.conv": CONVOLUTIONS["triton"]}
    assert changed == {**convolutions, "body.up.1.norm": NORMALISATIONS["triton"], "body.norm": JOINS["triton"]}
    use_kernels(net, usual)
    assert net(torch.rand(1, net.spec.input_depth, 16, 16)).shape == (1, 3, 16, 16)


def test_a_networks_layers_return_to_torchs_operations() -> None:
    net = build("small", stack_size=1)
    use_kernels(net, {"head": "matmul", "body.norm": "triton", "body.up.1.norm": "triton"})
    use_first_kernels(net)
    assert {m.compute for m in net.modules() if hasattr(m, "compute")} == {grouped_conv2d, norm_leaky_relu, join_norm}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"convolutions": ["fft"]}, "`convolutions` must be one of grouped, matmul, triton, triton tf32x3, got 'fft'"),
        ({"normalisations": ("apex",)}, "`normalisations` must be one of torch, triton, got 'apex'"),
    ],
)
def test_unknown_candidates_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_kernels(build("small", stack_size=1), CPU, size=(32, 32), **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_fastest_kernel_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dipguard.engines.kernel_choice.BUDGET", 1e9)
    device = torch.device("cuda")
    net = build("small", stack_size=4).to(device)
    shapes = layer_shapes(net, size=(32, 32))
    for name, kernel in choose_kernels(net, device, size=(32, 32)).items():
        times = measure(shapes[name], device=device, dtype=torch.float32, names=available(shapes[name].table, device))
        assert times[kernel] <= 1.5 * min(times.values())  # a second measurement
