"""The parts that the integrations share: places in a batch, positions in a data set, pixels."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from dipguard.integrations.inputs import LoaderPositions, Pixels, content_indices
from dipguard.integrations.lightning import part_of, with_part

from .projects import KINDS, MEAN, STD, pack, unpack


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tensor"])
def test_another_tensor_in_its_place_leaves_the_batch_as_it_is(kind: str) -> None:
    x, y, other = torch.zeros(2, 3, 4, 4), torch.tensor([1, 2]), torch.ones(2, 3, 4, 4)
    batch = pack(kind, x, y)
    place = KINDS[kind][0]
    keys = place if isinstance(place, tuple) else (place,)
    new = with_part(batch, keys, other)
    assert type(new) is type(batch)
    assert unpack(kind, new)[0] is other
    assert unpack(kind, new)[1] is y
    assert part_of(new, keys, name="images") is other
    assert unpack(kind, batch)[0] is x


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_positions_are_the_data_sets(processes: int, batch_size: int) -> None:
    data = TensorDataset(torch.arange(7))
    counted = []
    for rank in range(processes):
        sampler = DistributedSampler(data, processes, rank, shuffle=False) if processes > 1 else None
        loader = DataLoader(data, batch_size=batch_size, sampler=sampler)
        positions = LoaderPositions(loader)
        for (batch,) in loader:
            found, repeated = positions.next(len(batch))
            assert torch.equal(found, batch)
            counted += batch[~repeated].tolist()
    assert sorted(counted) == list(range(7))


def test_positions_of_what_has_no_sampler_are_counted() -> None:
    positions = LoaderPositions([torch.zeros(2), torch.zeros(3)])
    assert positions.next(2)[0].tolist() == [0, 1]
    found, repeated = positions.next(3)
    assert (found.tolist(), repeated.any()) == ([2, 3, 4], False)


def test_content_settles_an_index() -> None:
    images = torch.rand(4, 3, 8, 8)
    indices = content_indices(images)
    assert len(set(indices.tolist())) == 4
    assert int(indices.min()) >= 2**32
    assert torch.equal(content_indices(images.flip(0)), indices.flip(0))
    assert torch.equal(content_indices(images.contiguous(memory_format=torch.channels_last)), indices)
    images[2, 0, 0, 0] += 1e-3
    assert (content_indices(images) == indices).tolist() == [True, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normalisation_is_undone_and_done_again(dtype: torch.dtype) -> None:
    images = (torch.randint(0, 256, (2, 3, 4, 4)) / 255).double()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    given = ((images - mean) / std).to(dtype)
    pixels = Pixels(MEAN, STD).restore(given)
    assert pixels.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 4 * torch.finfo(dtype).eps
    assert float((pixels - images).abs().max()) <= max(tolerance, 1e-6)
    assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 1
    assert torch.allclose(Pixels(MEAN, STD).normalise(pixels).double(), given.double(), atol=16 * tolerance)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("pixels", [Pixels(), Pixels(MEAN, STD)], ids=["plain", "normalised"])
def test_images_of_other_than_three_channels_are_refused(pixels: Pixels, channels: int) -> None:
    with pytest.raises(ValueError, match=rf"`images` must .*\(2, {channels}, 4, 4\)"):
        pixels.restore(torch.rand(2, channels, 4, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers_are_refused(bad: float) -> None:
    images = torch.full((1, 3, 4, 4), bad)
    for pixels in (Pixels(), Pixels(MEAN, STD)):
        with pytest.raises(ValueError, match="must"):
            pixels.restore(images)
