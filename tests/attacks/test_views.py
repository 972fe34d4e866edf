import torch
import torch.nn.functional as F

from dipguard.attacks.libraries import NeverFlat, Unsaturated, VictimView

from .conftest import Shadowed, scaled


def gradient(view, images, labels):
    x = images.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(view(x), labels), x)[0]


def test_gradients_that_are_there_stay_bit_for_bit(digits_cnn, digits):
    part = digits.select(0, 8)
    labels = (part.labels + 1) % 10  # of the right ones the victim may be so sure that the gradient has underflowed
    plain = gradient(VictimView(digits_cnn), part.images, labels)
    assert plain.abs().amax(dim=(1, 2, 3)).min() > 1e-6
    assert torch.equal(gradient(Unsaturated(digits_cnn), part.images, labels), plain)
    assert torch.equal(gradient(NeverFlat(digits_cnn), part.images, labels), plain)
    assert torch.equal(Unsaturated(digits_cnn)(part.images), VictimView(digits_cnn)(part.images))


def test_the_direction_is_that_of_cross_entropy_without_rounding(digits_cnn, digits):
    part = digits.select(0, 8)
    sure = scaled(digits_cnn, 50.0)
    labels = sure(part.images).argmax(1)  # so that all are sure of their label
    assert not gradient(sure, part.images, labels).flatten(1).any(dim=1).all()
    ours = _to_unit(gradient(Unsaturated(sure), part.images, labels))
    x = part.images.double().requires_grad_()
    try:
        logits = sure.double()(x)
        above = logits - logits.gather(1, labels[:, None])
        others = torch.ones_like(above).scatter(1, labels[:, None], 0).bool()
        # -log softmax = log(1 + the rivals' share), whose rounding loses nothing where that share is tiny.
        loss = torch.log1p((above.exp() * others).sum(1)).sum()
        exact = _to_unit(torch.autograd.grad(loss, x)[0])
    finally:
        digits_cnn.float()
    assert F.cosine_similarity(ours, exact).min() > 0.99


def _to_unit(gradients):
    """[N, D] in float64, the largest of each image 1: the gradients themselves are too small to be multiplied."""
    rows = gradients.double().flatten(1)
    assert (rows != 0).any(dim=1).all()
    return rows / rows.abs().amax(dim=1, keepdim=True)


def test_a_plateaus_noise_is_drawn_from_the_global_generator_alone(digits_cnn):
    dark = torch.full((2, 3, 32, 32), 0.1)
    labels = Shadowed(digits_cnn)(dark).argmax(1)
    assert not gradient(Unsaturated(Shadowed(digits_cnn)), dark, labels).any()
    torch.manual_seed(3)
    first = gradient(NeverFlat(Shadowed(digits_cnn)), dark, labels)
    torch.manual_seed(3)
    assert torch.equal(gradient(NeverFlat(Shadowed(digits_cnn)), dark, labels), first)
    assert first.abs().mean() > 0.5
    with torch.no_grad():
        assert torch.equal(NeverFlat(digits_cnn)(dark), VictimView(digits_cnn)(dark))
