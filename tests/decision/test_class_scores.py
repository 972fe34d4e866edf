import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dipguard.classifier import Decider
from dipguard.decision import DecisionTrace
from dipguard.decision.class_scores import class_scores, clipped, mirrored, moved, shifted, stitch_mirrored


@pytest.mark.parametrize(("width", "shift"), [(8, 2), (32, 2), (224, 7), (512, 16)])
def test_a_mirrored_copy_is_the_same_picture_read_backwards(width, shift):
    images = torch.rand(2, 3, 4, width, generator=torch.Generator().manual_seed(1))
    turned, moved = mirrored(images), mirrored(images, flip=False)
    for column in range(width):  # a reflecting border shows the pixel as far inside
        assert torch.equal(moved[..., column], images[..., abs(column - shift)])
        assert torch.equal(turned[..., column], images[..., width - 1 - abs(column - shift)])


@pytest.mark.parametrize(("height", "width", "shift"), [(8, 8, 3), (6, 32, 3), (224, 224, 7), (3, 100, 2)])
def test_shifted_copies_are_the_same_picture_elsewhere(height, width, shift):
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    copies = shifted(images)
    assert copies.shape == (4, 2, 3, height, width)
    assert torch.equal(copies[0, ..., shift:], images[..., :-shift])
    assert torch.equal(copies[1, ..., :-shift], images[..., shift:])
    assert torch.equal(copies[2, :, :, shift:], images[:, :, :-shift])
    assert torch.equal(copies[3, :, :, :-shift], images[:, :, shift:])
    for i in range(shift):  # a reflecting border shows the pixel as far inside
        assert torch.equal(copies[0, ..., i], images[..., shift - i])


def test_clipped_values_are_as_near_to_the_given_ones_as_asked():
    generator = torch.Generator().manual_seed(3)
    given, samples = torch.rand(2, 2, 3, 4, 4, generator=generator)
    got = clipped(samples, given, distances=torch.tensor([0.1, 0.0]))
    for place in torch.nonzero(torch.ones(3, 4, 4)).tolist():
        value, sample = float(given[0][tuple(place)]), float(samples[0][tuple(place)])
        assert float(got[0][tuple(place)]) == pytest.approx(min(max(sample, value - 0.1), value + 0.1), abs=1e-6)
    assert torch.equal(got[1], given[1])
    assert torch.allclose(clipped(samples, given, distances=torch.ones(2)), samples)


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
def test_class_scores_step_away_from_the_given_image(beta):
    readings, given = torch.randn(5, 4, generator=torch.Generator().manual_seed(2)), torch.tensor([0.1, 0.4, 3.0, -2.0])
    moved = given + torch.randn(3, 4, generator=torch.Generator().manual_seed(4))
    got = class_scores(readings, given, moved, beta=beta)

    def probability(logits, c):
        return math.exp(logits[c]) / sum(math.exp(z) for z in logits)

    for c in range(4):
        likely = sum(probability(logits, c) for logits in readings.tolist()) / 5
        rises = [math.log(probability(logits, c) / probability(given.tolist(), c)) for logits in moved.tolist()]
        assert float(got[c]) == pytest.approx(math.log(likely) + beta * min(rises), abs=1e-6)
    others = [torch.stack([part.flip(-1), part], dim=-2) for part in (readings, given, moved)]
    assert torch.allclose(class_scores(*others, beta=beta), torch.stack([got.flip(-1), got]))


def test_a_class_that_an_attack_made_unlikely_scores_higher():
    readings, clean, attacked = torch.tensor([[2.0, 1.9, 0.0]]), torch.tensor([3.0, 2, 0]), torch.tensor([9.0, -9, 0])
    assert int(class_scores(readings, clean, clean[None], beta=0.5).argmax()) == 0
    assert int(class_scores(readings, attacked, readings, beta=0.5).argmax()) == 1
    assert int(class_scores(readings, attacked, attacked[None], beta=0.5).argmax()) == 0  # as noise is, moved or not
    once = class_scores(readings, attacked, torch.stack([readings[0], attacked]), beta=0.5)
    never = class_scores(readings, attacked, attacked[None], beta=0.5)
    assert once[1] == never[1], "a class must come back in every copy"


def test_logits_of_any_size_have_finite_scores():
    huge = torch.tensor([[2000.0, 0.0, -2000.0]])
    assert class_scores(huge, -huge[0], huge, beta=0.5).isfinite().all()


def test_bad_arguments_of_class_scores_are_refused():
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="`beta` must be finite and at least 0"):
        class_scores(logits, logits[0], logits, beta=-1.0)
    with pytest.raises(ValueError, match="at least one reading"):
        class_scores(logits[:0], logits[0], logits, beta=0.5)


class Brightness(nn.Module):
    """Class 1 where the mean is at least one half, else class 0."""

    def forward(self, images):
        mean = images.flatten(1).mean(dim=1)
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)


class Steep(nn.Module):
    """Class 1 where the mean is above one half, else class 0; sure of it close by."""

    def forward(self, images):
        mean = 999 * (images.flatten(1).mean(dim=1) - 0.5)
        return torch.stack([-mean, mean], dim=1)


class Gentle(Steep):
    """The same, less sure."""

    def forward(self, images):
        return super().forward(images) / 9.99


def grey(*levels):
    return torch.stack([torch.full((3, 4, 4), level) for level in levels])


def traced(images, given, *, target, victim=None, **changed):
    """A trace with samples whose mirrored copies are read as a class."""
    victim, S = victim or Brightness(), len(images)
    trace = DecisionTrace(
        index=0, given=given, given_scores=victim(given[None])[0], steps=torch.arange(S), scores=victim(images),
        quality=torch.ones(S), loss=torch.ones(S), crossing_at=torch.zeros(0, dtype=torch.int64), alpha=torch.zeros(0),
        on_boundary=images[:0], last=images[-1:], samples=images,
        mirrored_logits=torch.eye(victim(images).shape[1])[target].expand(S, -1),
    )  # fmt: skip
    return replace(trace, **changed)


def stitched(images, given, *, victim=None, **about):
    """Samples stitched as a class, which is the one that the mirrored copies are read as."""
    decider = Decider(victim or Brightness())
    return stitch_mirrored([traced(images, given, victim=victim, **about)], decider=decider, beta=0.0)[0]


@pytest.mark.parametrize(
    ("levels", "target", "level", "used"), [((0.6, 0.8, 0.2), 1, 0.7, [0, 1]), ((0.6, 0.8, 0.2), 0, 0.2, [2])]
)
def test_samples_of_the_target_are_averaged(levels, target, level, used):
    made = stitched(grey(*levels), grey(0.2)[0], target=target)
    assert (made.reason, made.used.tolist()) == ("class_scores", used)
    assert torch.allclose(made.image, grey(level)[0])


def test_where_no_sample_is_read_as_the_class_their_mean_is_moved_until_it_is():
    made = stitched(grey(0.45, 0.49, 0.5), grey(0.2)[0], target=1, victim=Steep())
    assert (made.reason, made.used.tolist()) == ("moved", [0, 1, 2])
    assert torch.allclose(made.image, grey(1.44 / 3 + 11 * 0.5 / 255)[0])  # the eleventh step is the first past 0.5


def test_it_is_moved_until_the_victim_is_sure_and_only_where_it_is_read_wrongly():
    images = grey(0.49, 0.502)  # the second is read rightly, with a probability of 0.6
    made = moved(images, torch.tensor([1, 1]), decider=Decider(Gentle()))
    assert torch.allclose(made[0], images[0] + 11 * 0.5 / 255, atol=1e-6)  # six steps would only pass one half
    assert torch.equal(made[1], images[1])
    bright = grey(0.45)
    bright[0, :, 0, 0] = 1.0
    assert float(moved(bright, torch.tensor([1]), decider=Decider(Steep())).max()) == 1.0


def test_each_image_is_stitched_by_its_own_readings():
    draw = torch.Generator().manual_seed(7)
    victim = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).requires_grad_(False)
    victim[1].weight.copy_(torch.randn(4, 192, generator=draw))
    given, x = torch.rand(16, 3, 8, 8, generator=draw), torch.rand(16, 6, 3, 8, 8, generator=draw)
    traces = [
        traced(x[b], given[b], target=0, victim=victim, mirrored_logits=victim(mirrored(x[b]))) for b in range(16)
    ]
    near = torch.stack([victim(copy) for copy in shifted(given)])

    def targets(readings, beta):
        return [
            int(class_scores(t.mirrored_logits, t.given_scores, near[:, b], beta=beta).argmax())
            for t, b in zip(traces, readings, strict=True)
        ]

    wanted = targets(range(16), 2.0)
    assert wanted != targets([0] * 16, 2.0)
    assert wanted != targets(range(16), 0.0)
    made = stitch_mirrored(traces, beta=2.0, decider=Decider(victim))
    for trace, one, target in zip(traces, made, wanted, strict=True):
        used = (trace.scores.argmax(1) == target).nonzero().flatten().tolist()
        assert one.used.tolist() == (used or list(range(6)))


def test_a_mean_that_is_read_otherwise_is_moved():
    class Far(nn.Module):
        """Class 1 where the brightness is far from a half."""

        def forward(self, images):
            far = 999 * ((images.flatten(1).mean(dim=1) - 0.5).abs() - 0.3)
            return torch.stack([-far, far], dim=1)

    made = stitched(grey(0.19, 0.99, 0.99, 0.99, 0.4), grey(0.5)[0], target=1, victim=Far())
    assert (made.reason, made.used.tolist()) == ("moved", [0, 1, 2, 3])
    assert torch.allclose(made.image, grey(3.16 / 4 + 6 * 0.5 / 255)[0])


def test_an_image_that_is_too_far_from_its_class_says_so():
    made = stitched(grey(0.3), grey(0.2)[0], target=1, victim=Steep())
    assert (made.reason, made.used.tolist()) == ("not_reached", [0])
    assert torch.allclose(made.image, grey(0.3 + 8 / 255)[0])


class InferenceMode(Steep):
    def forward(self, images):
        with torch.inference_mode():
            return super().forward(images)


class Numpy(Steep):
    def forward(self, images):
        return torch.from_numpy(super().forward(images.detach()).numpy())


@pytest.mark.parametrize("victim", [InferenceMode, Numpy])
def test_an_image_stays_as_it_is_where_the_victim_has_no_gradient(victim):
    with pytest.warns(UserWarning, match="the victim has no gradient, so images that it reads as another class"):
        made = stitched(grey(0.49), grey(0.2)[0], target=1, victim=victim())
    assert made.reason == "not_reached"
    assert torch.equal(made.image, grey(0.49)[0])


def test_images_move_alone_and_only_as_far_as_needed():
    images, targets = grey(0.49, 0.7, 0.48, 0.51, 0.999), torch.tensor([1, 1, 1, 0, 1])
    got = moved(images, targets, decider=Decider(Steep()))
    for i, steps in enumerate((6, 0, 11, -6, 0)):
        assert torch.allclose(got[i], images[i] + steps * 0.5 / 255, atol=1e-6)
        assert torch.equal(got[i : i + 1], moved(images[i : i + 1], targets[i : i + 1], decider=Decider(Steep())))


def test_on_a_gpu_images_move_in_batches(monkeypatch):
    """A device that says that it is one: the images stay where they are."""
    monkeypatch.setattr("dipguard.decision.class_scores.device_of", lambda victim: torch.device("cuda"))
    images, targets = grey(0.49, 0.48, 0.3, 0.7, 0.51), torch.tensor([1, 1, 1, 1, 0])
    asked = []
    victim = Steep()
    victim.register_forward_hook(lambda module, given, logits: asked.append(len(logits)))
    got = moved(images, targets, decider=Decider(victim, batch=24))
    assert asked == [5, *[3] * 16, *[1] * 7]
    for i, steps in enumerate((6, 11, 16, 0, -6)):
        assert torch.allclose(got[i], images[i] + steps * 0.5 / 255, atol=1e-6)


class Hungry(Steep):
    """Memory runs out for a gradient of more than ``most`` images."""

    most = 1

    def forward(self, images):
        if images.requires_grad and len(images) > self.most:
            torch.empty(2**60)
        return super().forward(images)


def test_where_memory_runs_out_images_move_in_smaller_batches(monkeypatch):
    monkeypatch.setattr("dipguard.decision.class_scores.device_of", lambda victim: torch.device("cuda"))
    images, targets, victim = grey(0.49, 0.48, 0.51), torch.tensor([1, 1, 0]), Hungry()
    got = moved(images, targets, decider=Decider(victim))
    for i, steps in enumerate((6, 11, -6)):
        assert torch.allclose(got[i], images[i] + steps * 0.5 / 255, atol=1e-6)
    victim.most = 0
    with pytest.raises(RuntimeError, match="allocate"):
        moved(images, targets, decider=Decider(victim))


class Late(Steep):
    """The second gradient fails."""

    asked = 0

    def forward(self, images):
        self.asked += images.requires_grad
        if self.asked > 13:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().forward(images)


def test_a_later_error_is_not_taken_for_a_missing_gradient():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        moved(grey(0.49, 0.48), torch.tensor([1, 1]), decider=Decider(Late()))


def test_a_gradient_that_is_not_a_number_moves_nothing():
    class Root(Steep):
        """Its gradient is 0/0 where the picture's first pixel is black."""

        def forward(self, images):
            return super().forward(images) + 0 * images[:, :1, 0, 0].sqrt()

    image = grey(0.45)
    image[0, 0, 0, 0] = 0
    got = moved(image, torch.tensor([1]), decider=Decider(Root()))
    assert float(got[0, 0, 0, 0]) == 0
    assert torch.allclose(got[0, 1:], image[0, 1:] + 8 / 255)


def test_bad_arguments_of_the_stitch_are_refused():
    with pytest.raises(ValueError, match="trace must hold its `samples` and `mirrored_logits`"):
        stitched(grey(0.1), grey(0.1)[0], target=0, samples=None)


def test_images_that_are_stitched_together_are_those_of_one_at_a_time():
    given = grey(0.2)[0]
    cases = [((0.6, 0.8), 1), ((0.48, 0.49), 1), ((0.6, 0.7), 0)]
    traces = [traced(grey(*levels), given, target=target, victim=Steep()) for levels, target in cases]
    options = {"beta": 0.0, "decider": Decider(Steep())}
    together = stitch_mirrored(traces, **options)
    assert [made.reason for made in together] == ["class_scores", "moved", "not_reached"]
    for trace, ours in zip(traces, together, strict=True):
        (alone,) = stitch_mirrored([trace], **options)
        assert torch.equal(ours.image, alone.image)
        assert ours.used.tolist() == alone.used.tolist()
