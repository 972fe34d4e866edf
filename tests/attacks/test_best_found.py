import pytest
import torch

from dipguard.attacks.best_found import LOSSES, BestFound, joined, margins


def picture(value, count=1):
    return torch.full((count, 3, 2, 2), value)


def test_the_margin_is_above_0_where_misread():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 7.0]])
    assert margins(logits, torch.tensor([0, 1])).tolist() == [-1.0, 2.0]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_several_views(name):
    logits, labels = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4, 2])
    true = logits.softmax(-1)[:, torch.arange(3), labels]
    expected = {"ce": -true.mean(0).log() - torch.tensor(4.0).log(), "margin": margins(logits[0], labels)}
    if name == "margin":
        logits = logits[:1].expand(4, -1, -1)
    assert torch.allclose(LOSSES[name](logits, labels), expected[name], atol=1e-6)


def test_the_best_is_misread_by_most_draws_and_then_by_most():
    found = BestFound(picture(0.5, 2), torch.tensor([0, 1]))
    right, wrong, worse = [2.0, 0.0], [0.0, 1.0], [0.0, 4.0]
    seen = [
        (0.1, [[right, right], [right, right]]),  # nothing: the best so far all the same
        (0.2, [[wrong, right], [right, right]]),  # half of the first image's draws
        (0.3, [[worse, right], [worse, right]]),  # all of them
        (0.4, [[wrong, right], [wrong, right]]),  # all of them, by less
        (0.6, [[worse, wrong], [right, right]]),  # for the second image [0, 1] is right, by less than [0, 2] was
    ]
    for value, logits in seen:
        scores = torch.tensor(logits)
        scores[:, 1] = scores[:, 1].flip(-1)  # of class 1
        found.see(picture(value, 2), scores)
    assert [float(image.mean()) for image in found.images] == [pytest.approx(0.3), pytest.approx(0.6)]
    assert found.history == [2, 1, 1, 1, 0]
    assert found.last_history == [2, 1, 1, 1, 0]
    assert found.withstood.tolist() == [False, False]


def test_the_last_look_may_be_worse_than_the_best():
    found = BestFound(picture(0.5), torch.tensor([0]))
    for value, logits in ((0.1, [0.0, 1.0]), (0.2, [1.0, 0.0])):
        found.see(picture(value), torch.tensor([[logits]]))
    found.stay()
    assert (found.history, found.last_history) == ([0, 0, 0], [0, 1, 1])
    assert torch.allclose(found.images, picture(0.1))


def test_some_of_the_images():
    found = BestFound(picture(0.5, 3), torch.tensor([0, 0, 0]))
    found.see(picture(0.7, 2), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), rows=torch.tensor([2, 0]))
    assert found.images[:, 0, 0, 0].tolist() == pytest.approx([0.7, 0.5, 0.7])
    assert found.withstood.tolist() == [True, True, False]


def test_batches_of_several_lengths_are_joined_without_their_start():
    assert joined([[2, 2, 1], [2, 0]], total=4) == [0.5, 0.25]
    assert joined([[2], [1]], total=3) == [1.0]
