"""The majority vote over several purifications of an image, against a literal form; and seeds drawn at random."""

from collections import Counter

import pytest
import torch
from torch import nn

from dipguard.defenses import Defense, build_defense
from dipguard.defenses.comdefend import ComDefendNetwork
from dipguard.seeding import further_index
from tests.defenses.test_intermediates import TINY, defended

INDICES = [4, 2, 2**35 + 7, 0]


class FirstIndex(nn.Module):
    """Reads 256 times the first pixel as the class, of 16."""

    def forward(self, images):
        return -(256 * images[:, 0, 0, :1] - torch.arange(16.0)).abs()


class Told(Defense):
    """Writes classes that are told into the first pixel, one draw of an image after the other."""

    name = "told"
    random = True

    def __init__(self, told):
        super().__init__(FirstIndex())
        self.votes = len(told)
        self.told = [decision for draw in told for decision in draw]

    def purify_image(self, image, index):
        made = image.clone()
        made[:, 0, 0] = self.told.pop(0) / 256
        made[:, 1, 1] = len(self.told) / 256
        return made


@pytest.mark.parametrize(
    ("draws", "winner", "number"),
    [([3, 5, 5], 5, 1), ([5, 5, 3], 5, 0), ([1, 2, 3], 1, 0), ([1, 2, 2, 1], 1, 0), ([4, 1, 2, 2, 1], 1, 1)],
)
def test_the_first_image_of_the_class_with_most_votes_is_the_result(draws, winner, number):
    defense = Told([[draw, 7] for draw in draws])
    made = defense.defend(torch.zeros(2, 3, 4, 4), indices=[8, 9])
    assert made.decisions_after.tolist() == [winner, 7]
    left = [2 * len(draws) - 1 - 2 * draw for draw in (number, 0)]
    assert [round(256 * float(image[0, 1, 1])) for image in made.reconstructions] == [left[0], left[1] - 1]


@pytest.mark.parametrize("name", ["paper", "mirror", "dip_fixed"])
def test_a_vote_is_a_literal_majority_of_single_purifications(small_images, small_victim, name):
    single, voting = defended(name, small_victim), defended(name, small_victim, votes=5)
    made = voting.defend(small_images[:4], indices=INDICES)
    for row, index in enumerate(INDICES):
        image = small_images[row : row + 1]
        looks = [index, *(further_index(index, number) for number in range(1, 5))]
        draws = [single.defend(image, indices=[look]) for look in looks]
        decisions = [int(draw.decisions_after) for draw in draws]
        (winner, _), *_ = Counter(decisions).most_common()
        expected = draws[decisions.index(winner)]
        assert torch.allclose(made.reconstructions[row], expected.reconstructions[0], atol=1e-5)
        assert (int(made.decisions_after[row]), made.reasons[row]) == (winner, expected.reasons[0])
        if made.traces:
            assert made.traces[row].index == index
            again = voting.rebuild(made.traces[row]).image
            assert torch.allclose(again.float(), made.reconstructions[row], atol=1e-6)
    assert torch.equal(voting.purify(small_images[:4], indices=INDICES), made.reconstructions)
    assert voting.steps_per_image == 5 * single.steps_per_image
    assert (voting.settings["votes"], "votes" in single.settings) == (5, False)


@pytest.mark.parametrize("name", ["paper", "mirror"])
def test_intermediates_are_those_of_the_purification_that_won(small_images, small_victim, name):
    voting = defended(name, small_victim, votes=3)
    made = voting.intermediates(small_images[:3], indices=INDICES[:3])
    result = voting.defend(small_images[:3], indices=INDICES[:3])
    assert torch.equal(made["stitched"].views[0], result.reconstructions)
    for key, count in voting.intermediate_views.items():
        assert made[key].readings == count
        assert made[key].views.shape[1:] == (3, 3, 16, 16)
    last = torch.stack([trace.last for trace in result.traces], dim=1).float()
    assert torch.equal(made["last"].views, last[-len(made["last"].views) :])


def test_comdefend_votes_over_its_noise(victim, images, tmp_path):
    torch.save(ComDefendNetwork().state_dict(), path := tmp_path / "comdefend.pt")
    voting = build_defense("comdefend", victim, weights=path, votes=3)
    assert voting.purify(images[:2]).shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="`votes` must be 1 without `noise`, since all would be the same, got 3"):
        build_defense("comdefend", victim, weights=path, votes=3, noise=0)


@pytest.mark.parametrize(
    ("name", "votes", "error", "message"),
    [
        ("paper", 0, ValueError, "`votes` must be at least 1, got 0"),
        ("mirror", 1.5, TypeError, "`votes` must be an integer, got 1.5"),
        ("jpeg", 3, TypeError, "votes"),
    ],
)
def test_bad_votes_are_refused(small_victim, name, votes, error, message):
    with pytest.raises(error, match=message):
        build_defense(name, small_victim, votes=votes)


@pytest.mark.parametrize("name", ["paper", "mirror", "dip_fixed", "dipdefend"])
def test_without_a_seed_each_defence_draws_its_own_which_can_be_used_again(small_images, small_victim, name):
    options = {"progress": False, **TINY.get(name, {"T": 4})}
    first, second = (build_defense(name, small_victim, seed=None, **options) for _ in range(2))
    assert first.seed != second.seed
    assert {fit.seed for fit in first.dip_fits}.isdisjoint({fit.seed for fit in second.dip_fits})
    made, other = (defense.purify(small_images[:1]) for defense in (first, second))
    assert not torch.equal(made, other)
    again = build_defense(name, small_victim, seed=first.seed, **options)
    assert torch.equal(again.purify(small_images[:1]), made)
