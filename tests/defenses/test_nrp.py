"""NRP against a literal form of its description; its weights are not to be had here, so no figure of it is tested."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dipguard.defenses import build_defense
from dipguard.defenses.nrp import NRPNetwork


@pytest.fixture(scope="module")
def network() -> NRPNetwork:
    torch.manual_seed(2)
    network = NRPNetwork().requires_grad_(False)
    network.trunk_conv.weight *= 0.05  # the result then lies about [0, 1], partly outside
    network.trunk_conv.bias.fill_(0.5)
    return network


@pytest.fixture(scope="module")
def path(network, tmp_path_factory):
    file = tmp_path_factory.mktemp("nrp") / "NRP.pth"
    torch.save(network.state_dict(), file)
    return file


def literal(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    def conv(x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)

    x = conv(images, "conv_first")
    for block in range(23):
        y = x
        for dense in (1, 2, 3):
            name = f"RRDB_trunk.{block}.RDB{dense}.conv"
            y1 = F.leaky_relu(conv(y, name + "1"), 0.2)
            y2 = F.leaky_relu(conv(torch.cat((y, y1), 1), name + "2"), 0.2)
            y3 = F.leaky_relu(conv(torch.cat((y, y1, y2), 1), name + "3"), 0.2)
            y4 = F.leaky_relu(conv(torch.cat((y, y1, y2, y3), 1), name + "4"), 0.2)
            y = y + 0.2 * conv(torch.cat((y, y1, y2, y3, y4), 1), name + "5")
        x = x + 0.2 * y
    return conv(x, "trunk_conv")


def test_the_network_has_the_published_names_and_sizes(network):
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    expected = {"conv_first": (64, 3), "trunk_conv": (3, 64)}
    for block in range(23):
        for dense in (1, 2, 3):
            for number, widths in enumerate([(32, 64), (32, 96), (32, 128), (32, 160), (64, 192)], start=1):
                expected[f"RRDB_trunk.{block}.RDB{dense}.conv{number}"] = widths
    assert {name for name in shapes if name.endswith("weight")} == {f"{name}.weight" for name in expected}
    for name, (outputs, inputs) in expected.items():
        assert shapes[f"{name}.weight"] == (outputs, inputs, 3, 3)
        assert shapes[f"{name}.bias"] == (outputs,)
    assert len(shapes) == 2 * len(expected)
    assert sum(p.numel() for p in network.parameters()) == 16_550_275


def test_the_network_is_its_description(network, images):
    given = images[:1, :, :6, :7]
    expected = literal(network.state_dict(), given)
    assert torch.allclose(network(given), expected, atol=1e-5)
    # The last layer must not drown what goes before it: the blocks matter.
    state = dict(network.state_dict())
    state["RRDB_trunk.11.RDB2.conv3.weight"] = torch.zeros_like(state["RRDB_trunk.11.RDB2.conv3.weight"])
    assert not torch.allclose(literal(state, given), expected, atol=1e-7)


def test_the_result_is_limited_to_the_range_of_images(network, path, victim, images):
    given = images[:1, :, :8, :8]
    expected = network(given)
    assert 0 < ((expected < 0) | (expected > 1)).float().mean() < 0.9
    purified = build_defense("nrp", victim, weights=path).purify(given)
    assert torch.allclose(purified, expected.clamp(0, 1), atol=1e-6)
