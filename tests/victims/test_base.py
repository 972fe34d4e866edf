import warnings

import pytest
import torch
from torch import nn

from dipguard import DIPGuard
from dipguard.attacks import build_attack
from dipguard.classifier import Decider, frozen
from dipguard.victims import Normalised, build_victim, check_victim
from dipguard.victims.base import first_line

from .conftest import exported, linear


def _modes(module):
    return [part.training for part in module.modules()]


def test_normalised_computes_by_hand(images):
    network = linear()
    victim = Normalised(network, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2))
    by_hand = images.clone()
    for channel, (mean, std) in enumerate(((0.1, 0.5), (0.2, 0.25), (0.3, 2))):
        by_hand[:, channel] = (by_hand[:, channel] - mean) / std
    assert torch.allclose(victim(images), network(by_hand), atol=1e-6)


def test_a_network_alone_may_have_another_precision(images):
    victim = Normalised(linear(), mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    victim.network.bfloat16()
    assert victim(images.bfloat16()).dtype == torch.bfloat16
    assert victim.mean.dtype == torch.float32
    assert victim.double()(images.float()).dtype == torch.float64


def test_normalisation_moves_with_the_module(images):
    victim = Normalised(linear(), mean=(0.1, 0.2, 0.3), std=(1, 1, 1)).double()
    assert victim(images.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"mean": (0.5,), "std": (1, 1, 1)}, "mean"),
        ({"mean": (0, 0, 0), "std": (1, 1)}, "std"),
        ({"mean": (0, 0, 0), "std": (1, 0, 1)}, "std"),
    ],
)
def test_normalised_refuses(options, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        Normalised(linear(), **options)


def test_frozen_puts_every_mode_and_flag_back_even_after_an_error():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 3))
    network.train()
    network[1].eval()
    network[3].weight.requires_grad_(False)
    modes, flags = _modes(network), [p.requires_grad for p in network.parameters()]
    seen = []

    def look_and_fail():
        with frozen(network):
            seen.append(any(_modes(network)) or any(p.requires_grad for p in network.parameters()))
            raise KeyError

    with pytest.raises(KeyError):
        look_and_fail()
    assert seen == [False]
    assert _modes(network) == modes
    assert [p.requires_grad for p in network.parameters()] == flags


def test_check_victim_returns_logits_and_changes_nothing(images):
    victim = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 30 * 30, 10)).train()
    statistics = victim[1].running_mean.clone()
    scores = check_victim(victim, images)
    assert scores.shape == (4, 10)
    assert not scores.requires_grad
    assert all(_modes(victim))
    assert torch.equal(victim[1].running_mean, statistics)


class _Last(nn.Module):
    """A real linear classifier followed by ``function``."""

    def __init__(self, function):
        super().__init__()
        self.network, self.function = linear(), function

    def forward(self, images):
        return self.function(self.network(images))


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda s: s[:, :, None], ValueError, "\\[B, C\\].*\\(4, 10, 1\\)"),
        (lambda s: s[:2], ValueError, "\\(2, 10\\) for 4 images"),
        (lambda s: s[:, :1], ValueError, "C of at least 2"),
        (lambda s: s.flatten(), ValueError, "\\(40,\\)"),
        (lambda s: s.argmax(1), TypeError, "torch.int64"),
        (lambda s: (s, s), TypeError, "tuple"),
        (lambda s: s * float("nan"), ValueError, "finite"),
    ],
)
def test_check_victim_refuses(images, function, error, message):
    with pytest.raises(error, match=f"`victim`.*{message}"):
        check_victim(_Last(function), images)


def test_check_victim_refuses_a_function_and_bad_images(images):
    with pytest.raises(TypeError, match=r"`victim` must be a torch\.nn\.Module"):
        check_victim(linear().forward, images)
    with pytest.raises(TypeError, match=r"`images`.*255"):
        check_victim(linear(), torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


def test_probabilities_are_a_warning(images):
    with pytest.warns(UserWarning, match="probabilities"):
        check_victim(_Last(lambda s: s.softmax(1)), images)


@pytest.mark.parametrize("function", [lambda s: s, lambda s: s.log_softmax(1), lambda s: s.sigmoid()])
def test_other_scores_are_no_warning(images, function):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_victim(_Last(function), images)


def test_build_victim_refuses_unknown_names_and_options():
    with pytest.raises(ValueError, match=r"`victim`.*digits_cnn.*torchvision.*'lenet'"):
        build_victim("lenet")
    with pytest.raises(TypeError, match="'cifar10_resnet20' takes no option 'depth'; its options are: none"):
        build_victim("cifar10_resnet20", depth=56)


def _network():
    layers = (nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(900, 10))
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize(
    "form",
    [
        lambda network: torch.jit.freeze(torch.jit.script(network)),
        lambda network: torch.jit.script(network),
        lambda network: torch.jit.trace(network, torch.rand(1, 3, 32, 32)),
        pytest.param(exported, marks=pytest.mark.slow),
    ],
    ids=["frozen", "scripted", "traced", "exported"],
)
def test_scripted_and_exported_victims_are_served(images, form):
    network = _network()
    victim = form(network)
    with torch.no_grad():
        expected = network(images)
    assert torch.allclose(check_victim(victim, images), expected, atol=1e-5)
    assert torch.allclose(Decider(nn.Sequential(victim))(images[:3]), expected[:3], atol=1e-5)
    attacked = build_attack("fgsm", victim, eps_255=8)(images, expected.argmax(1))
    assert 0 < float((attacked - images).abs().max()) <= 8.01 / 255


def _of_four(network):
    """What torch.export leaves, made in a moment."""
    traced = torch.fx.symbolic_trace(network)
    next(iter(traced.graph.nodes)).meta["val"] = torch.empty(4, 3, 32, 32)
    return traced


REFUSED = r"`victim` must take any number of images.*batches of 4.*dynamic_shapes"


def test_a_victim_for_one_batch_is_refused_at_the_door():
    with pytest.raises(ValueError, match=REFUSED):
        DIPGuard(nn.Sequential(_of_four(_network())))


@pytest.mark.slow
def test_a_victim_that_was_exported_for_one_batch_is_refused_and_its_program_told_from_it():
    program = torch.export.export(_network(), (torch.rand(4, 3, 32, 32),))
    with pytest.raises(ValueError, match=REFUSED):
        DIPGuard(nn.Sequential(program.module()))
    with pytest.raises(TypeError, match=r"`victim` must be a torch\.nn\.Module, got ExportedProgram; take its"):
        DIPGuard(program)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_victim_is_asked_in_its_own_precision(images, dtype):
    assert check_victim(linear().to(dtype), images).dtype == torch.promote_types(dtype, torch.float32)


def test_images_of_a_size_that_it_cannot_read_are_named_with_its_own():
    victim = Normalised(linear(), mean=(0, 0, 0), std=(1, 1, 1), size=(32, 32))
    message = r"`surrogate` cannot read images of 16x16 pixels; it was made for 32x32 \(give .*mat1"
    with pytest.raises(ValueError, match=message):
        check_victim(victim, torch.rand(1, 3, 16, 16), name="surrogate")


def test_messages_of_libraries_are_given_on_one_line_without_terminal_codes():
    coloured = RuntimeError("\x1b[31m\nWeights only load \x1b[1;4mfailed\x1b[0m.\nMore")
    assert first_line(coloured) == "Weights only load failed."
    assert first_line(KeyError()) == "KeyError"
