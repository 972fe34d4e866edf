import json

import pytest
import torch

from dipguard.attacks import build_attack


def test_it_counts_what_the_victim_still_reads(digits_cnn, digits):
    part = digits.select(0, 16)
    attack = build_attack("fgsm", digits_cnn, eps_255=1, batch_size=5)
    attacked = attack(part.images, part.labels)
    report = attack.report(part.images, attacked, part.labels)
    read = digits_cnn(attacked).argmax(1)
    assert torch.equal(report.fooled, read != part.labels)
    assert torch.equal(attack.fooled(attacked, part.labels), report.fooled)
    assert torch.equal(report.wrong_before, digits_cnn(part.images).argmax(1) != part.labels)
    assert 0 < report.not_fooled < 16
    assert report.accuracy == report.not_fooled / 16
    change = (attacked - part.images).flatten(1)
    assert torch.allclose(report.linf, change.abs().amax(1))
    assert torch.allclose(report.l2, (change**2).sum(1).sqrt())


def test_its_summary_is_json_and_means_over_those_that_it_turned(digits_cnn, digits):
    part = digits.select(0, 16)
    attack = build_attack("pgd", digits_cnn)
    report = attack.report(part.images, attack(part.images, part.labels), part.labels)
    summary = report.summary()
    assert json.loads(json.dumps(summary)) == summary
    turned = report.fooled & ~report.wrong_before
    assert summary["l2_mean"] == pytest.approx(float(report.l2[turned].mean()))
    assert summary["settings"] == attack.settings
    nothing = build_attack("none", digits_cnn).report(part.images, part.images, part.labels).summary()
    assert (nothing["linf_mean"], nothing["linf_max"]) == (None, 0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_leaves_victim_and_grad_mode_alone(digits_cnn, digits, mode):
    part = digits.select(0, 4)
    attack = build_attack("fgsm", digits_cnn)
    attacked = attack(part.images, part.labels)
    victim = digits_cnn.train()
    try:
        with mode():
            report = attack.report(part.images, attacked, part.labels)
        assert victim.training
        report.l2.add_(0)  # an inference tensor would refuse
    finally:
        victim.eval()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attacked": torch.zeros(3, 3, 32, 32)}, ValueError, "`attacked` must have the shape \\(4, 3, 32, 32\\)"),
        ({"attacked": torch.full((4, 3, 32, 32), 2.0)}, ValueError, "`attacked` must lie in \\[0, 1\\]"),
        ({"labels": torch.tensor([0, 1, 2])}, ValueError, "`labels`"),
        ({"indices": torch.tensor([0])}, ValueError, "`indices`"),
        ({"attacked": torch.ones(4, 3, 32, 32)}, RuntimeError, "'fgsm' changed a pixel by 1, its budget is 0.0313"),
    ],
)
def test_bad_input_is_refused(digits_cnn, digits, change, error, message):
    given = {"images": digits.images[:4], "attacked": digits.images[:4], "labels": digits.labels[:4]}
    with pytest.raises(error, match=message):
        build_attack("fgsm", digits_cnn).report(**{**given, **change})
