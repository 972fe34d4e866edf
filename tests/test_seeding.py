"""The random streams of an image: apart from each other, and what is drawn from them."""

import random

import numpy as np
import pytest
import torch

from dipguard.seeding import draw_z, further_index, image_generator, kept_rng


def test_z_is_drawn_as_asked() -> None:
    uniform = draw_z((4, 64, 64), indices=[3, 8], seed=1, scale=0.1)
    assert (0 <= uniform).all()
    assert 0.0999 < float(uniform.max()) <= 0.1
    assert float(uniform.mean()) == pytest.approx(0.05, rel=0.03)
    assert not torch.equal(uniform[0], uniform[1])
    gaussian = draw_z((4, 64, 64), indices=[3, 8], seed=1, kind="gaussian", scale=0.5)
    assert float(gaussian.std()) == pytest.approx(0.5, rel=0.03)
    assert float(gaussian.mean()) == pytest.approx(0, abs=0.02)


def test_each_seed_index_and_purpose_has_a_stream_of_its_own() -> None:
    keys = [(s, i, p) for s in (0, 1) for i in (0, 1) for p in ("weights", "z", "jitter")]
    seeds = {image_generator(seed=s, index=i, purpose=p).initial_seed() for s, i, p in keys}
    assert len(seeds) == len(keys)


def test_further_indices_are_all_different() -> None:
    found = {further_index(index, number) for index in range(100) for number in range(1, 11)}
    assert len(found) == 1000
    assert found.isdisjoint(range(100))


def test_random_states_are_put_back_after_an_error_too() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with pytest.raises(ZeroDivisionError), kept_rng():
        _ = torch.rand(3), np.random.rand(3), random.random(), 1 / 0
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
