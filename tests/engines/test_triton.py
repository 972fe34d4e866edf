"""The Triton kernels: their results, in Triton's interpreter and on a GPU where there is one; and that they compile."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

CASES = Path(__file__).with_name("triton_cases.py")
TOLERANCES = {"float64": 1e-10, "float32": 2e-6}

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")


def run_cases(device: str, **variables: str) -> dict[str, list[float]]:
    command, environment = [sys.executable, str(CASES), device], {**os.environ, **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def too_far(differences: dict[str, list[float]]) -> dict[str, list[float]]:
    assert len(differences) >= 20
    # Neither `max` nor `>`: they would let a NaN pass.
    return {case: d for case, d in differences.items() if not all(v <= TOLERANCES[case.split(",")[0]] for v in d)}


@needs_triton
@pytest.mark.slow
def test_interpreted_kernels_give_torch_s_results() -> None:
    assert too_far(run_cases("cpu", TRITON_INTERPRET="1")) == {}


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_kernels_give_torch_s_results() -> None:
    assert too_far(run_cases("cuda")) == {}


# kernel, entries' dtype, float32 products, what the PTX must hold, what it must not
COMPILED = [
    ("forward_kernel", "fp32", "ieee", r"fma\.rn\.f32", r"mma"),
    ("forward_kernel", "fp32", "tf32", r"mma\S*\.tf32", r"fma\.rn\.f32"),
    ("forward_kernel", "fp32", "tf32x3", r"sub\S*\.f32[\s\S]*mma\S*\.tf32", r"fma\.rn\.f32"),
    ("forward_kernel", "bf16", "ieee", r"mma\S*\.bf16", r"tf32"),
    ("transposed", "fp32", "ieee", r"fma\.rn\.f32", r"mma"),
    ("transposed", "fp32", "tf32x3", r"sub\S*\.f32[\s\S]*mma\S*\.tf32", r"fma\.rn\.f32"),
    ("transposed", "bf16", "ieee", r"mma\S*\.bf16", r"tf32"),
    ("strided_gradient_kernel", "fp32", "ieee", r"fma\.rn\.f32", r"mma"),
    ("strided_gradient_kernel", "fp32", "tf32x3", r"sub\S*\.f32[\s\S]*mma\S*\.tf32", r"fma\.rn\.f32"),
    ("strided_gradient_kernel", "bf16", "ieee", r"mma\S*\.bf16", r"tf32"),
    ("weight_gradient_kernel", "fp32", "ieee", r"fma\.rn\.f32", r"mma"),
    ("weight_gradient_kernel", "fp32", "tf32", r"mma\S*\.tf32", r"mma\S*\.bf16"),
    ("weight_gradient_kernel", "fp32", "tf32x3", r"sub\S*\.f32[\s\S]*mma\S*\.tf32", r"fma\.rn\.f32"),
    ("weight_gradient_kernel", "bf16", "ieee", r"mma\S*\.bf16", r"tf32"),
    ("fold_kernel", "fp32", "ieee", r"add\.f32", r"atom"),
    ("fold_repeated", "bf16", "ieee", r"add\.f32", r"atom"),
    ("norm_kernel", "fp32", "ieee", r"sqrt", r"f64"),
    ("norm_large", "bf16", "ieee", r"sqrt", r"f64"),
    ("norm_gradient_kernel", "fp32", "ieee", r"fma\.rn\.f32", r"atom"),
    ("norm_gradient_small", "bf16", "ieee", r"fma\.rn\.f32", r"atom"),
    ("join", "fp32", "ieee", r"sqrt", r"f64"),
    ("join", "bf16", "ieee", r"sqrt", r"f64"),
    ("join_nearest", "fp32", "ieee", r"sqrt", r"f64"),
    ("join_gradient", "fp32", "ieee", r"fma\.rn\.f32", r"atom|f64"),
    ("join_gradient_nearest", "bf16", "ieee", r"fma\.rn\.f32", r"atom|f64"),
    ("upsampling_gradient_kernel", "fp32", "ieee", r"fma\.rn\.f32", r"atom|f64"),
    ("upsampling_gradient_nearest", "bf16", "ieee", r"add\.f32", r"atom|f64"),
]


VARIANTS = {
    "transposed": "forward_kernel", "fold_repeated": "fold_kernel", "norm_large": "norm_kernel", "join": "norm_kernel",
    "join_nearest": "norm_kernel", "norm_gradient_small": "norm_gradient_kernel",
    "join_gradient": "norm_gradient_kernel", "join_gradient_nearest": "norm_gradient_kernel",
    "upsampling_gradient_nearest": "upsampling_gradient_kernel",
}  # fmt: skip
"""Other constants for a kernel."""


def constants(name: str, precision: str) -> dict[str, Any]:
    import triton.language as tl

    products = {"SUM": tl.float32, "PRECISION": precision}
    tile = {"KERNEL": 3, "STRIDE": 1, "BLOCK_O": 32, "x_column": 1, **products}
    block = {"SUM": tl.float32, "BLOCK": 1024}
    small = {"SINGLE": True, **block}
    large = {"SINGLE": False, **block}
    return {
        "forward_kernel": {**tile, "TRANSPOSED": False},
        "transposed": {**tile, "TRANSPOSED": True},
        "strided_gradient_kernel": {"KERNEL": 3, "STRIDE": 2, "FIRST": 0, **products},
        "weight_gradient_kernel": tile,
        "fold_kernel": {"BEFORE": 1, "AFTER": 1, "REFLECT": True, **block},
        "fold_repeated": {"BEFORE": 1, "AFTER": 2, "REFLECT": False, **block},
        "norm_kernel": {"EPS": 1e-5, "SLOPE": 0.2, "UPSAMPLE": "none", **small},
        "norm_large": {"EPS": 1e-5, "SLOPE": 0.2, "UPSAMPLE": "none", **large},
        "norm_gradient_kernel": {"SLOPE": 0.2, "UPSAMPLE": "none", **large},
        "norm_gradient_small": {"SLOPE": 0.2, "UPSAMPLE": "none", **small},
        "join": {"EPS": 1e-5, "SLOPE": 1.0, "UPSAMPLE": "bilinear", **small},
        "join_nearest": {"EPS": 1e-5, "SLOPE": 1.0, "UPSAMPLE": "nearest", **large},
        "join_gradient": {"SLOPE": 1.0, "UPSAMPLE": "bilinear", **large},
        "join_gradient_nearest": {"SLOPE": 1.0, "UPSAMPLE": "nearest", **small},
        "upsampling_gradient_kernel": {"UPSAMPLE": "bilinear", **block},
        "upsampling_gradient_nearest": {"UPSAMPLE": "nearest", **block},
    }[name]


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton carries its assembler on Linux alone")
@pytest.mark.parametrize(
    ("capability", "name", "entries", "precision", "has", "has_not"),
    [
        pytest.param(capability, *row, marks=() if (capability, row[0]) == (90, "norm_kernel") else pytest.mark.slow)
        for capability, row in product((90, 80), COMPILED)
    ],
)
def test_kernels_compile_for_hopper_and_ampere(
    capability, name, entries, precision, has, has_not, tmp_path, monkeypatch
) -> None:
    # The interpreter takes Python that the compiler refuses, so this is no luxury; it needs no GPU.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dipguard.engines import _triton_kernels

    kernel = getattr(_triton_kernels, VARIANTS.get(name, name))
    fixed, options = constants(name, precision), {"enable_fp_fusion": True}
    if hasattr(kernel, "configs"):
        options["num_warps"] = kernel.configs[0].num_warps
        fixed |= kernel.configs[0].kwargs
        kernel = kernel.fn
    names = kernel.arg_names
    own_dtype = {"w", "bias", "weight", "dw", "db", "means", "scales"}
    activations = ("x", "y", "dy", "dx", "padded", "skip", "low", "dskip", "dhigh", "dlow")
    types = {n: f"*{entries}" for n in activations} | dict.fromkeys(own_dtype, "*fp32")
    signature = {n: "constexpr" if n in fixed else types.get(n, "i32") for n in names}
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in fixed.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(compiled.asm["cubin"]) > 1000
    assert re.search(has, compiled.asm["ptx"])
    assert not re.search(has_not, compiled.asm["ptx"])
    assert compiled.metadata.shared <= 100 * 1024  # at least two programs a multiprocessor
