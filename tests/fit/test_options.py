"""The options of a fit, checked in one place."""

import json

import pytest

from dipguard.fit import DecideOptions, FitOptions, Stitcher, StitchOptions
from dipguard.fit.options import trace_settings
from dipguard.networks import PRESETS


def test_settings_are_json_values_with_z_scale_resolved() -> None:
    fit = FitOptions(network=PRESETS["imagenet"])
    settings = trace_settings(fit, DecideOptions(), StitchOptions(**STITCH))
    assert json.loads(json.dumps(settings)) == settings
    assert settings["z_scale"] == 1 / 100
    assert settings["network"]["n_d"] == [64] * 5
    assert {"T": 1000, "tau": 0.7, "seed": 0, "matmul_precision": "float32"}.items() <= settings.items()
    assert FitOptions(z_scale=0.5).as_settings()["z_scale"] == 0.5


STITCH = {"tau": 0.7, "t0": 50, "K": 15, "beta": 0.5}
FIT_ERRORS = [
    ({"seed": None}, TypeError, "`seed` must be an integer, got None"),
    ({"seed": 1.0}, TypeError, "`seed` must be an integer, got 1.0"),
    ({"seed": True}, TypeError, "`seed` must be an integer, got True"),
    ({"seed": -1}, ValueError, "`seed` must be at least 0, got -1"),
    ({"network": "tiny"}, ValueError, "`network` must be one of"),
    ({"z": "normal"}, ValueError, "`z` must be one of uniform, gaussian, got 'normal'"),
    ({"z_scale": 0.0}, ValueError, "`z_scale` must be above 0"),
    ({"dead_zone": -1}, ValueError, "`dead_zone` must be finite and at least 0, got -1"),
    ({"jitter": -0.1}, ValueError, "`jitter` must be finite and at least 0, got -0.1"),
    ({"lr": 0.0}, ValueError, "`lr` must be above 0"),
    ({"dtype": "float16"}, ValueError, "`dtype` must be one of float32, float64, got 'float16'"),
    ({"init": "zeros"}, ValueError, "`init` must be one of"),
    ({"padding": "same"}, ValueError, "`padding` must be one of"),
    ({"engine": "cuda"}, ValueError, "`engine` must be one of auto, torch, native.*, got 'cuda'"),
    ({"matmul_precision": "tf32"}, ValueError, "`matmul_precision` 'tf32' needs `engine` 'torch' or 'cuda_graph'"),
    (
        {"matmul_precision": "tf32", "engine": "torch", "dtype": "float64"},
        ValueError,
        "`matmul_precision` 'tf32' needs `dtype` 'float32', got 'float64'",
    ),
    ({"optimise_z": 1}, TypeError, "`optimise_z` must be true or false, got 1"),
]
DECIDE_ERRORS = [
    ({"T": 10, "decisions": None, "every": 6}, ValueError, "`every` must be from 1 to 5, got 6"),
    ({"N": 0}, ValueError, "`N` must be at least 1"),
    ({"scores": "odds"}, ValueError, "`scores` must be one of"),
    ({"K_max": 0}, ValueError, "`K_max` must be at least 1"),
]
STITCH_ERRORS = [
    ({**STITCH, "tau": 1.5}, ValueError, "`tau` must be from 0 to 1, got 1.5"),
    ({**STITCH, "t0": 2.0}, TypeError, "`t0` must be an integer"),
    ({**STITCH, "K": 0}, ValueError, "`K` must be at least 1"),
    ({**STITCH, "beta": -0.1}, ValueError, "`beta` must be finite and at least 0"),
    ({**STITCH, "t0_unit": "epochs"}, ValueError, "`t0_unit` must be one of steps, samples"),
    ({**STITCH, "divide_by": "all"}, ValueError, "`divide_by` must be one of found, K"),
]
BAD = {FitOptions: FIT_ERRORS, DecideOptions: DECIDE_ERRORS, StitchOptions: STITCH_ERRORS, Stitcher: STITCH_ERRORS[:1]}


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"), [(kind, *row) for kind, rows in BAD.items() for row in rows]
)
def test_bad_options_are_named(kind, options, error, message) -> None:
    with pytest.raises(error, match=message):
        kind(**options)
