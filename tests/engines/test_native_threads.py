"""The native engine's threads: neither their number, nor whether they work in teams, nor the stack moves a bit."""

import pytest
import torch
from torch import Tensor

from dipguard.engines.native import PERIOD, TRIAL, NativeEngine, TeamChoice
from dipguard.engines.native_build import compiler
from dipguard.networks import NetworkSpec, build

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")

MOST = 5  # images
UNEVEN = NetworkSpec(
    n_d=(8, 12), n_u=(20, 4), n_s=(0, 5), k_d=(5, 3), k_u=(2, 4), k_s=(1, 3), input_depth=3, z_scale=0.1
)  # fmt: skip
NETWORKS: dict[str, tuple[str | NetworkSpec, tuple[int, int]]] = {
    "medium": ("medium", (32, 32)),
    "medium, odd sides": ("medium", (21, 35)),
    "uneven, odd sides": (UNEVEN, (17, 13)),
    "imagenet": ("imagenet", (33, 40)),
}


def seen(
    row: str, indices: list[int], threads: int, *, teams: bool, dtype: torch.dtype, padding: str, z_gradient: bool
) -> dict[int, list[Tensor]]:
    """By image: what two steps of gradient descent gave and left."""
    network, size = NETWORKS[row]
    net = build(network, stack_size=len(indices), indices=indices, padding=padding, dtype=dtype)
    draw = torch.Generator().manual_seed(1)
    given, z = (torch.rand(MOST, depth, *size, generator=draw).to(dtype) for depth in (3, net.spec.input_depth))
    z = (z[indices] / 30).requires_grad_(z_gradient)
    torch.set_num_threads(threads)  # put back after each test
    engine = NativeEngine(net, given[indices], z_gradient=z_gradient)
    (weights,) = engine.parameters()
    optimiser = torch.optim.SGD([weights], lr=0.01)
    for _ in range(2):
        engine.team_choice.teams = teams
        step = engine.step(z)
        optimiser.zero_grad()
        step.loss.backward()
        optimiser.step()
    assert weights.grad is not None
    found = [step.reconstructions, step.errors, weights.detach(), weights.grad]
    if z_gradient:
        assert z.grad is not None
        found.append(z.grad)
    return {index: [values[place] for values in found] for place, index in enumerate(indices)}


@pytest.mark.parametrize(
    ("row", "dtype", "padding", "z_gradient"),
    [
        pytest.param("medium", torch.float32, "zeros", False, marks=pytest.mark.slow),
        pytest.param("medium", torch.float64, "reflect", True, marks=pytest.mark.slow),
        pytest.param("medium, odd sides", torch.float32, "reflect", True, marks=pytest.mark.slow),
        pytest.param("uneven, odd sides", torch.float32, "zeros", True, marks=pytest.mark.slow),
        ("uneven, odd sides", torch.float64, "reflect", False),
        pytest.param("imagenet", torch.float32, "reflect", True, marks=pytest.mark.slow),
    ],
)
def test_threads_teams_and_stacks_move_no_bit(row: str, dtype: torch.dtype, padding: str, z_gradient: bool) -> None:
    def of(indices: list[int], threads: int, *, teams: bool) -> dict[int, list[Tensor]]:
        return seen(row, indices, threads, teams=teams, dtype=dtype, padding=padding, z_gradient=z_gradient)

    alone = {index: of([index], 1, teams=False)[index] for index in range(MOST)}
    assert not torch.equal(alone[0][0], alone[1][0])
    for threads in (1, 2, 3):
        for indices in ([4], [1, 0], [2, 4, 3], [3, 1, 0, 4, 2]):
            for index, values in of(indices, threads, teams=True).items():
                for got, expected in zip(values, alone[index], strict=True):
                    assert torch.equal(got, expected), (threads, indices, index)


@pytest.mark.slow
def test_more_threads_than_the_deepest_scales_have_rows() -> None:
    def of(threads: int, *, teams: bool) -> list[Tensor]:
        row, dtype = "medium, odd sides", torch.float32
        return seen(row, [0], threads, teams=teams, dtype=dtype, padding="reflect", z_gradient=True)[0]

    alone = of(1, teams=False)
    for threads in (7, 16):
        assert all(torch.equal(a, b) for a, b in zip(of(threads, teams=True), alone, strict=True))


def way_taken(cost: dict[bool, float], choice: TeamChoice, steps: int) -> list[bool]:
    """What each of the next steps does, if they take so long."""
    taken = []
    for _ in range(steps):
        taken.append(choice.teams)
        choice.record(cost[choice.teams])
    return taken


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_way_is_kept_and_both_are_tried_again(faster: bool) -> None:
    taken = way_taken({faster: 1.0, not faster: 9.0}, TeamChoice(), 2 * PERIOD)
    trial = [True] * TRIAL + [False] * TRIAL
    assert taken == 2 * (trial + [faster] * (PERIOD - 2 * TRIAL))


def test_the_way_changes_when_the_machine_does() -> None:
    choice = TeamChoice()
    way_taken({True: 1.0, False: 1.6}, choice, 200)
    assert choice.teams
    way_taken({True: 14.0, False: 1.6}, choice, PERIOD)
    assert way_taken({True: 14.0, False: 1.6}, choice, 20) == [False] * 20


def test_one_slow_step_does_not_settle_it() -> None:
    choice = TeamChoice()
    for number in range(2 * TRIAL):
        choice.record(50.0 if number == TRIAL - 1 else (1.0 if choice.teams else 1.6))
    assert choice.teams
