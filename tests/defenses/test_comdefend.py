"""ComDefend against a literal form of its description, and against its authors' own results."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dipguard.data import load_data
from dipguard.defenses import build_defense
from dipguard.defenses.comdefend import ComDefendNetwork
from dipguard.seeding import image_generator
from dipguard.victims import build_victim


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    torch.manual_seed(3)
    network = ComDefendNetwork()
    path = tmp_path_factory.mktemp("comdefend") / "weights.pt"
    torch.save(network.state_dict(), path)
    return path


def literal(weights: dict[str, Tensor], images: Tensor, noise: Tensor) -> Tensor:
    """The description, layer by layer: sigmoid(code - noise) > 0.5 is one bit."""
    x = images - 0.5
    for number in range(8):
        x = F.elu(F.conv2d(x, weights[f"encoder.{number}.weight"], weights[f"encoder.{number}.bias"], padding="same"))
    code = F.conv2d(x, weights["encoder.8.weight"], weights["encoder.8.bias"], padding="same")
    y = (torch.sigmoid(code - noise) > 0.5).float()
    for number in range(8):
        y = F.elu(F.conv2d(y, weights[f"decoder.{number}.weight"], weights[f"decoder.{number}.bias"], padding="same"))
    return torch.sigmoid(F.conv2d(y, weights["decoder.8.weight"], weights["decoder.8.bias"], padding="same"))


def test_the_network_has_the_published_names_and_sizes():
    shapes = {name: tuple(value.shape) for name, value in ComDefendNetwork().state_dict().items()}
    encoder = [3, 16, 32, 64, 128, 256, 128, 64, 32, 12]
    decoder = [12, 32, 64, 128, 256, 128, 64, 32, 16, 3]
    expected = {}
    for part, widths in (("encoder", encoder), ("decoder", decoder)):
        for number in range(9):
            expected[f"{part}.{number}.weight"] = (widths[number + 1], widths[number], 3, 3)
            expected[f"{part}.{number}.bias"] = (widths[number + 1],)
    assert shapes == expected
    assert sum(p.numel() for p in ComDefendNetwork().parameters()) == 1_566_735


def test_a_whole_image_is_the_literal_form(victim, images, random_weights):
    weights = torch.load(random_weights, weights_only=True)
    defense = build_defense("comdefend", victim, weights=random_weights, seed=5, noise=0.7)
    noise = torch.empty(1, 12, 32, 32).normal_(0, 0.7, generator=image_generator(seed=5, index=3, purpose="comdefend"))
    expected = literal(weights, images[:1], noise)
    purified = defense.purify(images[:1], indices=torch.tensor([3]))
    assert torch.allclose(purified, expected, atol=1e-6)


def test_the_noise_does_not_depend_on_the_default_dtype(victim, images, random_weights):
    defense, given = build_defense("comdefend", victim, weights=random_weights), images[:1, :, :8, :8]
    expected = defense.purify(given)
    torch.set_default_dtype(torch.float64)
    assert torch.equal(defense.purify(given), expected)


def test_patches_are_separate_reversed_in_colour_and_cut_to_8_bits(victim, images, random_weights):
    given = torch.cat((torch.cat((images[0], images[1]), dim=2), torch.cat((images[2], images[3]), dim=2)), dim=1)[None]
    weights = torch.load(random_weights, weights_only=True)
    purified = build_defense("comdefend", victim, weights=random_weights, noise=0).purify(given)
    assert torch.equal((purified * 255).round() / 255, purified)
    for row in range(2):
        for column in range(2):
            patch = (0, slice(None), slice(32 * row, 32 * row + 32), slice(32 * column, 32 * column + 32))
            bgr = literal(weights, given[patch][None, [2, 1, 0]], torch.zeros(1))[0]
            lost = bgr[[2, 1, 0]] - purified[patch]
            assert -1e-5 < lost.min() <= lost.max() < 1 / 255 + 1e-5


def test_patches_are_for_larger_images_only_unless_told(victim, images, random_weights):
    def build(patches):
        return build_defense("comdefend", victim, weights=random_weights, noise=0, patches=patches)

    large = torch.cat((images[:1], images[1:2]), dim=3)
    assert torch.equal(build(None).purify(images[:1]), build(False).purify(images[:1]))
    assert torch.equal(build(None).purify(large), build(True).purify(large))
    assert not torch.equal(build(False).purify(large), build(True).purify(large))


def test_a_size_that_patches_do_not_fill_is_refused(victim, random_weights):
    defense = build_defense("comdefend", victim, weights=random_weights)
    with pytest.raises(ValueError, match=r"multiples of 32 pixels.*64x40.*`patches=False`"):
        defense.purify(torch.zeros(1, 3, 64, 40))
    with pytest.raises(ValueError, match="multiples of 32"):
        defense.output_size(299, 299)
    whole = build_defense("comdefend", victim, weights=random_weights, patches=False)
    assert whole.purify(torch.zeros(1, 3, 40, 36)).shape == (1, 3, 40, 36)


def read(path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None].float() / 255


def psnr(one: Tensor, other: Tensor) -> float:
    return float(-10 * (one - other).square().mean().log10())


@pytest.mark.slow
def test_it_makes_what_its_authors_made_of_all_their_images(real_data, victim):
    folder = real_data / "reference" / "comdefend"
    defense = build_defense("comdefend", victim, weights=real_data / "weights" / "comdefend.pt")
    names = sorted(path.name for path in (folder / "attack_image").glob("*.png"))
    assert len(names) == 7
    for name in names:
        given, expected = (read(folder / kind / name) for kind in ("attack_image", "defend_image"))
        # Noise differs from draw to draw, so the authors' result is met closely, not exactly.
        assert 39.5 < psnr(defense.purify(given), expected) < 48
        assert psnr(defense.purify(given.flip(1)).flip(1), expected) < 33
        assert psnr(given, expected) < 33


@pytest.mark.slow
def test_clean_cifar10_images_keep_their_class_and_quality(real_data):
    victim = build_victim("cifar10_resnet56", weights=real_data / "weights" / "resnet56-4bfd9763.th")
    data = load_data("arrays", path=real_data / "cifar10" / "tune.npz", limit=150)
    defense = build_defense("comdefend", victim, weights=real_data / "weights" / "comdefend.pt")
    purified = defense.purify(data.images, indices=data.indices)
    with torch.no_grad():
        right = [float((victim(x).argmax(1) == data.labels).float().mean()) for x in (data.images, purified)]
    assert 0.85 <= right[1] <= right[0]
    figures = [psnr(one, other) for one, other in zip(purified, data.images, strict=True)]
    assert 29 < sum(figures) / len(figures) < 31
