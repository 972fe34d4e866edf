"""One fit, every setting: what comes from the store is what a fit with that setting gives, bit by bit."""

import logging
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dipguard.defenses import DefenseResult
from dipguard.evaluation.matrix import Curves
from dipguard.store import Store
from dipguard.store.folder import read_entry, write_entry
from tests.store.parts import guard, list_entries, random_victim, smooth_images


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(scope="module")
def default_fits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store that holds the fits of the default settings."""
    store = Store(tmp_path_factory.mktemp("default"))
    guard(store).defend(smooth_images())
    assert store.counts == {"fitted": 3}
    return store.path


@pytest.fixture
def filled(default_fits: Path, tmp_path: Path) -> Store:
    """A copy of it."""
    return Store(shutil.copytree(default_fits, tmp_path / "filled"))


@cache
def direct(count: int, **options: Any) -> DefenseResult:
    """What the defence gives without a store."""
    without = guard(**options)
    assert without.store is None
    return without.defend(smooth_images(count))


def check_as_direct(store: Store, *, count: int = 3, **options: Any) -> None:
    """The defence with the store gives what it gives without one."""
    got = guard(store, **options).defend(smooth_images(count))
    wanted = direct(count, **{k: v for k, v in options.items() if k != "store_T"})
    for mine, other in zip(got.traces, wanted.traces, strict=True):
        # Some processors round a victim's logits otherwise in a batch of another size.
        torch.testing.assert_close(mine.scores, other.scores, rtol=0, atol=1e-5)
        rest = replace(mine, scores=other.scores)
        assert rest.equals(other), [n for n, x in rest.tensors().items() if not torch.equal(x, other.tensors()[n])]
    assert torch.equal(got.reconstructions, wanted.reconstructions)
    assert (got.reasons, got.used) == (wanted.reasons, wanted.used)
    for name in ("decisions_before", "decisions_after"):
        assert torch.equal(getattr(got, name), getattr(wanted, name))


def test_settings_of_the_stitch_replay_one_fit(store: Store):
    settings: list[dict[str, Any]] = [{}, {"tau": 0.1, "t0": 9, "K": 1, "beta": 0.1}]
    settings += [{"tau": 1.0}, {"t0": 3, "t0_unit": "samples", "rule": "above", "divide_by": "K"}]
    for setting in settings:
        check_as_direct(store, **setting)
    assert store.counts == {"fitted": 3, "replayed": 3 * (len(settings) - 1)}
    assert sum(len(trace.crossing_at) for trace in guard(store).defend(smooth_images()).traces) > 9


@pytest.mark.parametrize("seen", [{"decisions": 12}, pytest.param({"every": 2}, marks=pytest.mark.slow)], ids=str)
def test_one_long_fit_serves_every_T(store: Store, seen: dict[str, Any]):
    lengths = (18, 14, 24)  # not all are multiples of the 12 decisions
    for T in lengths:
        check_as_direct(store, T=T, store_T=lengths, **seen)
    assert store.counts == {"fitted": 3, "decided": 6}
    for T in lengths:
        check_as_direct(store, T=T, **seen)
    assert (store.counts["fitted"], store.counts["replayed"]) == (3, 9)
    last = {int(read_entry(info.path).arrays["steps"][-1]) for info in list_entries(store.path, layers=["fits"])}
    assert last == {23}


@pytest.mark.slow
def test_what_was_not_sampled_is_fitted_again_and_serves_both(store: Store):
    check_as_direct(store, T=18)
    check_as_direct(store)  # T=24
    check_as_direct(store, T=18)
    check_as_direct(store, T=18, K_max=7)
    check_as_direct(store, N=4)
    assert store.counts == {"fitted": 6, "replayed": 3, "decided": 6}


@pytest.mark.parametrize(
    ("options", "done"),
    [
        ({"N": 4}, "decided"),
        ({"scores": "probabilities"}, "decided"),
        ({"decisions": 6}, "decided"),
        pytest.param({"victim": random_victim(7)}, "decided", id="another victim"),
        ({"network": "medium"}, "fitted"),
        ({"lr": 0.02}, "fitted"),
    ],
    ids=str,
)
def test_other_decisions_reuse_the_fit_and_other_fits_are_other_entries(filled: Store, options, done):
    check_as_direct(filled, **options)
    assert filled.counts == {done: 3}


def test_a_larger_K_max_is_decided_and_then_serves_the_smaller(filled: Store):
    for K_max, K in ((5, 3), (9, 9), (5, 3), (1, 1)):
        check_as_direct(filled, K_max=K_max, K=K)
    assert filled.counts == {"decided": 3, "replayed": 9}


def test_only_missing_images_are_fitted(store: Store):
    guard(store).defend(smooth_images(4)[1:2], indices=[1])
    check_as_direct(store, count=4)
    assert store.counts == {"fitted": 1 + 3, "replayed": 1}


def test_the_same_image_twice_is_fitted_once(store: Store):
    images = smooth_images(1)
    got = guard(store).defend(images.repeat(2, 1, 1, 1), indices=[0, 0])
    assert torch.equal(got.reconstructions[0], got.reconstructions[1])
    assert sum(store.counts[name] for name in ("fitted", "decided", "replayed")) == 2
    assert store.counts["fitted"] == 1


@pytest.mark.parametrize("layer", ["traces", "fits"])
def test_a_damaged_entry_is_reported_and_made_again(filled: Store, layer: str, caplog: pytest.LogCaptureFixture):
    path = sorted((filled.path / layer).glob("??/*.npz"))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))
    with caplog.at_level(logging.WARNING, logger="dipguard.store"):
        check_as_direct(filled)
        check_as_direct(filled, N=4)  # reads the fits
    assert filled.counts["damaged"] == 1
    assert filled.counts["fitted"] == (1 if layer == "fits" else 0)
    assert [r.message for r in caplog.records if "damaged" in r.message and str(path) in r.message]
    check_as_direct(Store(filled.path))


def test_the_file_of_another_entry_is_damaged(store: Store):
    store.write("cells", "ab1", {}, {})
    shutil.copy(store.file("cells", "ab1"), store.file("cells", "ab2"))
    assert store.read("cells", "ab2") is None
    assert store.counts["damaged"] == 1
    assert store.read("cells", "ab1") is not None


BAD_HEADERS: dict[str, Any] = {"seconds": None, "settings": {"K_max": "many"}}
CHANGES = ["an array less", "a shorter array", "another array", "seconds"]


@pytest.mark.parametrize(
    ("layer", "change"),
    [*((layer, change) for layer in ("traces", "fits") for change in CHANGES), ("traces", "settings")],
)
def test_an_entry_with_other_content_is_reported_and_made_again(filled: Store, layer: str, change: str, caplog):
    path = sorted((filled.path / layer).glob("??/*.npz"))[0]
    entry = read_entry(path)
    arrays, header = dict(entry.arrays), dict(entry.header)
    if change in BAD_HEADERS:
        header[change] = BAD_HEADERS[change]
    elif change == "an array less":
        del arrays["loss"]
    else:
        arrays["loss" if change == "a shorter array" else "new"] = arrays["loss"][:-1]
    write_entry(path, arrays, header)
    with caplog.at_level(logging.WARNING, logger="dipguard.store"):
        check_as_direct(filled, **({} if layer == "traces" else {"N": 4}))
    assert filled.counts["damaged"] == 1
    assert str(path) in caplog.text


def test_without_samples_it_serves_every_T_but_no_other_victim(tmp_path: Path):
    store = Store(tmp_path, keep_samples=False)
    for more in ({"T": 18}, {}):
        check_as_direct(store, store_T=(18, 24), **more)
    assert (store.counts["fitted"], store.counts["replayed"]) == (3, 3)
    assert list_entries(tmp_path, layers=["fits"]) == []
    check_as_direct(store, victim=random_victim(7))
    assert store.counts["fitted"] == 6


def test_a_victim_that_answers_otherwise_is_asked_again(store: Store, caplog: pytest.LogCaptureFixture):
    class Masked(torch.nn.Module):
        """Neither weights nor plain attributes tell what it does."""

        def __init__(self, channels: list[int]) -> None:
            super().__init__()
            self.pick = lambda x: x[:, channels]
            self.inner = random_victim()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.pick(x))

    check_as_direct(store, victim=Masked([0, 1, 2]))
    with caplog.at_level(logging.WARNING, logger="dipguard.store"):
        check_as_direct(store, victim=Masked([2, 1, 0]))
    assert "answers otherwise" in caplog.text
    assert store.counts == {"fitted": 3, "decided": 3}


def test_under_inference_mode_and_on_inference_tensors(store: Store):
    with torch.inference_mode():
        first = guard(store).purify(smooth_images(1) * 1)
    x = guard(store).purify(smooth_images(1))
    assert torch.equal(first, x)
    x.requires_grad_(True).sum().backward()


@pytest.mark.slow
def test_curves_are_logged_of_fits_and_replays_alike(store: Store):
    logs = []
    for one in (None, store, store):
        curves = Curves()
        guard(one, K_max=20).defend(smooth_images(), logger=curves)
        logs.append(dict(curves.rows))
    assert logs[0].keys() == logs[1].keys() == logs[2].keys()
    for step, wanted in logs[0].items():
        assert logs[1][step] == logs[2][step] == pytest.approx(wanted, rel=1e-5)


def test_fits_in_mixed_precision_are_torchs_and_found_again(store: Store):
    mixed = guard(store, T=110, engine="auto", trainer={"precision": "bf16-mixed"})
    images = smooth_images(1)
    made = mixed.purify(images)
    assert torch.equal(mixed.purify(images), made)
    assert (store.counts["fitted"], store.counts["replayed"]) == (1, 1)
    guard(store, T=110, engine="auto").purify(images)
    assert store.counts["fitted"] == 2  # in full precision it is another fit


def test_a_store_that_cannot_be_written_costs_only_the_store(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store = Store(tmp_path / "store")
    for layer in ("fits", "traces", "locks"):
        (tmp_path / "store").mkdir(exist_ok=True)
        (tmp_path / "store" / layer).write_text("in the way")
    with caplog.at_level(logging.WARNING, logger="dipguard.store"):
        check_as_direct(store)
    assert "could not be kept" in caplog.text
    assert "no lock could be taken" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"store": 3}, TypeError, "`store` must be the path of a folder or null, got 3"),
        ({"store": ""}, TypeError, "`store` must be the path of a folder"),
        ({"store": __file__}, ValueError, "`store` must be a folder, got .* which is a file"),
        ({"store": None, "store_T": [30]}, ValueError, r"`store_T` needs a `store`, .* got \[30\]"),
        ({"store": "x", "store_T": 30}, TypeError, "`store_T` must be a list of integers, got 30"),
        ({"store": "x", "store_T": [0]}, ValueError, "`T` must be at least 1, got 0"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path):
    options = {**options, "store": tmp_path / "x"} if options["store"] == "x" else options
    with pytest.raises(error, match=message):
        guard(**options)
