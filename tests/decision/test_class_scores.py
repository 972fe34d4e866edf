from dataclasses import replace

import pytest
import torch
from torch import nn

from dipguard.decision import DecisionTrace
from dipguard.decision.class_scores import class_scores, clipped, mirrored, stitch_mirrored


@pytest.mark.parametrize(("width", "shift"), [(8, 2), (32, 2), (224, 7), (512, 16)])
def test_a_mirrored_copy_is_the_same_picture_read_backwards(width, shift):
    images = torch.rand(2, 3, 4, width, generator=torch.Generator().manual_seed(1))
    turned, moved = mirrored(images), mirrored(images, flip=False)
    for column in range(width):  # a reflecting border shows the pixel as far inside
        assert torch.equal(moved[..., column], images[..., abs(column - shift)])
        assert torch.equal(turned[..., column], images[..., width - 1 - abs(column - shift)])


def test_clipped_values_are_as_near_to_the_given_ones_as_asked():
    generator = torch.Generator().manual_seed(3)
    given, samples = torch.rand(2, 2, 3, 4, 4, generator=generator)
    got = clipped(samples, given, distances=torch.tensor([0.1, 0.0]))
    for place in torch.nonzero(torch.ones(3, 4, 4)).tolist():
        value, sample = float(given[0][tuple(place)]), float(samples[0][tuple(place)])
        assert float(got[0][tuple(place)]) == pytest.approx(min(max(sample, value - 0.1), value + 0.1), abs=1e-6)
    assert torch.equal(got[1], given[1])
    assert torch.allclose(clipped(samples, given, distances=torch.ones(2)), samples)


def test_class_scores_are_mean_probabilities():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    got = class_scores(logits, own=2, own_class_weight=1.0)
    less = class_scores(logits, own=2, own_class_weight=0.25)
    for c in range(4):
        slow = sum(float(torch.exp(logits[s, c]) / torch.exp(logits[s]).sum()) for s in range(5)) / 5
        assert float(got[c]) == pytest.approx(slow, abs=1e-6)
        assert float(less[c]) == pytest.approx(slow * (0.25 if c == 2 else 1), abs=1e-6)
    with pytest.raises(ValueError, match="`own_class_weight`"):
        class_scores(logits, own=2, own_class_weight=1.5)
    with pytest.raises(ValueError, match="at least one reading"):
        class_scores(logits[:0], own=2, own_class_weight=1.0)


class Brightness(nn.Module):
    """Class 1 where the mean is at least one half, else class 0."""

    def forward(self, images):
        mean = images.flatten(1).mean(dim=1)
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)


def grey(*levels):
    return torch.stack([torch.full((3, 4, 4), level) for level in levels])


def traced(images, given, *, target, victim=None, **changed):
    """A trace with samples whose mirrored copies are read as a class."""
    victim, S = victim or Brightness(), len(images)
    trace = DecisionTrace(
        index=0, given=given, given_scores=victim(given[None])[0], steps=torch.arange(S), scores=victim(images),
        quality=torch.ones(S), loss=torch.ones(S), crossing_at=torch.zeros(0, dtype=torch.int64), alpha=torch.zeros(0),
        on_boundary=torch.zeros(0, 3, 4, 4), last=images[-1:], samples=images,
        mirrored_logits=torch.eye(2)[target].expand(S, 2),
    )  # fmt: skip
    return replace(trace, **changed)


def stitched(images, given, *, victim=None, flip=True, **about):
    """Samples stitched as a class, which is the one that the mirrored copies are read as."""
    traces, classify = [traced(images, given, victim=victim, **about)], victim or Brightness()
    return stitch_mirrored(traces, own_class_weight=1.0, classify=classify, flip=flip)[0]


@pytest.mark.parametrize(
    ("levels", "target", "level", "used"), [((0.6, 0.8, 0.2), 1, 0.7, [0, 1]), ((0.6, 0.8, 0.2), 0, 0.2, [2])]
)
def test_samples_of_the_target_are_averaged(levels, target, level, used):
    made = stitched(grey(*levels), grey(0.2)[0], target=target)
    assert (made.reason, made.used.tolist()) == ("class_scores", used)
    assert torch.allclose(made.image, grey(level)[0])


class LeftEdge(nn.Module):
    """Class 1 where the left edge is bright, else class 0; the brighter, the surer."""

    def forward(self, images):
        edge = images[:, :, :, 0].flatten(1).mean(dim=1)
        return torch.stack([0.5 - edge, edge - 0.5], dim=1)


@pytest.mark.parametrize("flip", [True, False])
def test_where_no_sample_is_read_as_the_class_mirrored_copies_that_are_become_the_image(flip):
    images = grey(0.1, 0.2, 0.3)
    images[:2, :, :, 1 if flip else 2] = torch.tensor([0.7, 0.9])[:, None, None]  # comes to the left edge
    copies = mirrored(images, flip=flip)
    assert LeftEdge()(images).argmax(1).tolist() == [0, 0, 0]
    assert LeftEdge()(copies).argmax(1).tolist() == [1, 1, 0]
    about = {"victim": LeftEdge(), "mirrored_logits": 9 * LeftEdge()(copies), "target": 1, "flip": flip}
    made = stitched(images, grey(0.2)[0], **about)
    if flip:
        assert (made.reason, made.used.tolist()) == ("mirrored_copies", [0, 1])
        assert torch.allclose(made.image, copies[:2].mean(0))
    else:
        assert (made.reason, made.used.tolist()) == ("no_sample_of_class", [0, 1, 2])
        assert torch.allclose(made.image, images.mean(0))


def test_where_neither_samples_nor_copies_are_read_as_the_class_all_are_averaged():
    logits = torch.tensor([[4.0, 3.9, 0.0], [0.0, 3.9, 4.0]])  # the second class is ahead in the mean alone
    images = grey(0.2, 0.3, 0.9)
    first = torch.tensor([1.0, 0, 0])
    about = {"given_scores": first, "scores": first.expand(3, 3), "mirrored_logits": logits[[0, 1, 1]], "target": 1}
    made = stitched(images, grey(0.2)[0], **about)
    assert (made.reason, made.used.tolist()) == ("no_sample_of_class", [0, 1, 2])
    assert torch.allclose(made.image, grey(1.4 / 3)[0])


def test_a_mean_that_is_read_otherwise_gives_way_to_the_sample_that_scores_highest():
    class Far(nn.Module):
        """Class 1 where the brightness is far from a half."""

        def forward(self, images):
            far = (images.flatten(1).mean(dim=1) - 0.5).abs() - 0.3
            return torch.stack([-far, far], dim=1)

    made = stitched(grey(0.1, 0.95, 0.88), grey(0.5)[0], target=1, victim=Far())
    assert (made.reason, made.used.tolist()) == ("class_scores", [1])
    assert torch.equal(made.image, grey(0.95)[0])


def test_bad_arguments_of_the_stitch_are_refused():
    with pytest.raises(ValueError, match="trace must hold its `samples` and `mirrored_logits`"):
        stitched(grey(0.1), grey(0.1)[0], target=0, samples=None)


def test_images_that_are_stitched_together_are_those_of_one_at_a_time():
    given, asked = grey(0.2)[0], []
    cases = [((0.6, 0.8), 1), ((0.4, 0.45), 1), ((0.6, 0.7), 0)]
    traces = [traced(grey(*levels), given, target=target) for levels, target in cases]

    def classify(images):
        asked.append(len(images))
        return Brightness()(images)

    options = {"own_class_weight": 1.0, "classify": classify}
    together = stitch_mirrored(traces, **options)
    assert asked == [3]  # all means at once
    for trace, ours in zip(traces, together, strict=True):
        (alone,) = stitch_mirrored([trace], **options)
        assert torch.equal(ours.image, alone.image)
        assert ours.used.tolist() == alone.used.tolist()
