import pytest
import torch

from dipguard.decision import DecisionTrace
from dipguard.decision.evidence import mirrored, stitch_evidence
from dipguard.defenses import build_defense
from dipguard.defenses.mirror_stacks import MirrorStacks
from dipguard.fit import Decider

TINY = {"T": 24, "t0": 6, "every": 6, "fit": {"dtype": "float64", "engine": "torch"}, "progress": False}


def stacks(victim, **options):
    return MirrorStacks(build_defense("dipguard", victim, **{**TINY, **options}))


@pytest.mark.parametrize("mirror", [True, False])
def test_stacks_give_what_purify_gives_and_traces_that_say_why(images, victim, tmp_path, mirror):
    images = images[:3]
    guard = stacks(victim, mirror=mirror)
    order = [4, 0, 7]
    results = list(guard.defend_stacks(images, indices=order, stack_size=2))
    assert [len(result.traces) for result in results] == [2, 1]
    made = torch.cat([result.reconstructions for result in results])
    assert torch.equal(made, guard.row.purify(images, indices=torch.tensor(order)))
    decide = Decider(victim)
    for i, trace in enumerate(trace for result in results for trace in result.traces):
        assert trace.index == order[i]
        assert trace.steps.tolist() == [11, 17, 23, 35, 41, 47]
        loaded = DecisionTrace.load(trace.save(tmp_path / f"{i}.safetensors"))
        assert loaded.equals(trace)
        assert torch.equal(guard.rebuild(loaded).image.to(made), made[i])
        assert torch.allclose(trace.scores, decide(trace.samples).cpu(), atol=1e-5)
        turned = decide(mirrored(trace.samples, shift=(0, 2), flip=mirror)).cpu()
        assert torch.allclose(trace.turned, turned, atol=1e-5)
        assert torch.equal(trace.last, trace.samples[[2, 5]])
        assert int(trace.given_scores.argmax()) == int(decide(images[i : i + 1]).argmax())
    for result in results:
        assert set(result.seconds) == {"start", "fit", "decide"}
        assert set(result.reasons) <= {"evidence", "no_reader"}
        assert torch.equal(result.decisions_after, decide(result.reconstructions).argmax(1))


def test_a_trace_without_mirrored_readings_is_refused(images, victim):
    (result,) = stacks(victim).defend_stacks(images[:1])
    trace = result.traces[0]
    tensors = {**trace.tensors(), "index": trace.index, "settings": trace.settings}
    for name in ("turned", "samples"):
        less = DecisionTrace(**{key: value for key, value in tensors.items() if key != name})
        with pytest.raises(ValueError, match="`trace` must hold"):
            stitch_evidence(less, trust=0.5, classify=Decider(victim), betas=[])


def test_bad_images_and_indices_are_refused(images, victim):
    with pytest.raises(ValueError, match="`indices` must hold one index an image"):
        list(stacks(victim).defend_stacks(images[:1], indices=[1, 2]))
    with pytest.raises(ValueError, match="`images`"):
        list(stacks(victim).defend_stacks(images * 300))
