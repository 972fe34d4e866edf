"""The victim behind the Decider: read as it is, whatever memory layout it can take."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dipguard.classifier import Decider, ask_together, logits_of, steps_together


class Viewer(nn.Module):
    """A convolution whose map is flattened by .view, which only the usual layout allows."""

    flatten = staticmethod(lambda x: x.view(len(x), -1))

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4 * 8 * 8, 5)
        self.layouts: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.layouts.append(x.is_contiguous())
        return self.head(self.flatten(self.conv(x)))


class Reader(Viewer):
    """The same without .view."""

    flatten = staticmethod(lambda x: x.flatten(1))


@pytest.mark.parametrize(("kind", "layouts"), [(Reader, [False, False]), (Viewer, [False, True, True])])
def test_channels_last_is_tried_and_given_up_once_where_it_cannot_be_read(kind, layouts, images: Tensor) -> None:
    victim, small = kind(), images[:6, :, :8, :8].contiguous()
    with torch.no_grad():
        expected = victim(small)
    victim.layouts.clear()
    torch.testing.assert_close(Decider(victim, batch=3)(small), expected, rtol=0, atol=1e-5)
    assert victim.layouts == layouts
    # An attack reads the victim in the same layout, and its gradients are those of the usual one.
    gradients = []
    for read in (victim, partial(logits_of, victim)):
        x = small.clone().requires_grad_()
        gradients.append(torch.autograd.grad(read(x).square().sum(), x)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert gradients[1].is_contiguous()
    assert victim.layouts[len(layouts) :] == [True, layouts[-1]]


def test_decisions_do_not_depend_on_the_callers_autocast(images: Tensor) -> None:
    decide, small = Decider(Reader()), images[:6, :, :8, :8]
    wanted = torch.zeros(6, dtype=torch.int64)
    expected, gradient = decide(small), decide.gradient(small, wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(decide(small), expected)
        assert all(map(torch.equal, decide.gradient(small, wanted), gradient))


class Switched(Reader):
    """Notes how convolutions multiply on a GPU while it is asked."""

    def forward(self, x: Tensor) -> Tensor:
        self.products = torch.backends.cudnn.conv.fp32_precision
        return super().forward(x)


def test_decisions_are_made_without_tf32(images: Tensor) -> None:
    victim, convolutions = Switched(), torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    try:
        convolutions.fp32_precision = "tf32"
        Decider(victim)(images[:1, :, :8, :8])
        assert (victim.products, convolutions.fp32_precision) == ("ieee", "tf32")
    finally:
        convolutions.fp32_precision = before


def test_an_error_of_the_victim_stays_its_own(images: Tensor) -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        Decider(Reader())(images[:6, :, :8, :4])


@pytest.mark.parametrize(("images", "steps"), [(1, 64), (2, 32), (24, 3), (63, 2), (64, 1), (500, 1)])
def test_steps_of_a_small_stack_make_a_batch(images: int, steps: int) -> None:
    assert steps_together(images) == steps


class Hungry(nn.Module):
    """Memory runs out for more than ``most`` images."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.sizes = most, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.most:
            torch.empty(2**60)
        return x.flatten(2).sum(dim=2)


def test_where_memory_runs_out_a_batch_is_halved() -> None:
    parts = [torch.randint(9, (count, 3, 4, 4)).float() for count in (2, 3)]  # whole numbers, whose sums are exact
    victim = Hungry(2)
    decide = Decider(victim)
    found = ask_together(decide, parts)
    assert victim.sizes == [5, 3, 2, 1, 2]
    decide(parts[1])
    assert victim.sizes[5:] == [2, 1]
    for part, logits in zip(parts, found, strict=True):
        assert torch.equal(logits, part.flatten(2).sum(dim=2))
    with pytest.raises(RuntimeError, match="allocate"):
        Decider(Hungry(0))(parts[0])


class InPlace(Viewer):
    """It normalises the images that it is given, and writes its logits to the same place each time."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = torch.empty(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.buffer.copy_(super().forward(x.sub_(0.5).div_(0.2)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_victim_may_change_what_it_is_given_and_what_it_returned(images: Tensor, layout: torch.memory_format) -> None:
    victim, given = InPlace(), images[:6, :, :8, :8].contiguous(memory_format=layout)
    kept, scaled = given.clone(), ((given - 0.5) / 0.2).contiguous()
    decide = Decider(victim, batch=2)
    with torch.no_grad():
        expected = torch.cat([Viewer.forward(victim, part).clone() for part in scaled.split(2)])
    for _ in range(2):
        torch.testing.assert_close(decide(given), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(given, kept)
    decide.gradient(given[:2], torch.tensor([0, 1]))
    assert torch.equal(given, kept)


@pytest.mark.parametrize(("side", "size"), [(32, 512), (64, 512), (224, 64), (512, 12), (3000, 1)])
def test_a_victim_is_asked_about_fewer_large_images_at_once(side: int, size: int) -> None:
    assert Decider(Reader()).batch(side, side) == size
    assert Decider(Reader(), batch=3).batch(side, side) == 3


def test_photographs_come_in_several_batches() -> None:
    sizes: list[int] = []
    victim = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    victim.register_forward_hook(lambda module, given, logits: sizes.append(len(logits)))
    photos = torch.rand(70, 3, 224, 224)
    torch.testing.assert_close(Decider(victim)(photos), photos.mean(dim=(2, 3)))
    assert sizes == [64, 6]


def test_the_gradient_is_that_of_a_classs_log_probability(images: Tensor) -> None:
    victim, parts = Reader().double().train(), images[:2, :, :8, :8].double()
    with torch.inference_mode():
        likelihoods, gradients = Decider(victim).gradient(parts.clone(), torch.tensor([3, 1]))
    for place in ((0, 0, 0, 0), (0, 1, 3, 5), (1, 2, 7, 7)):
        step = torch.zeros_like(parts)
        step[place] = 1e-5
        row, wanted = place[0], (3, 1)[place[0]]
        with torch.no_grad():
            up, down = (float(victim(parts + change).log_softmax(1)[row, wanted]) for change in (step, -step))
        assert float(gradients[place]) == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-8)
        assert float(likelihoods[row]) == pytest.approx((up + down) / 2, abs=1e-6)
    assert victim.training
    assert all(weight.requires_grad and weight.grad is None for weight in victim.parameters())
