import re

import pytest
import torch

from dipguard.cli import CommandError
from dipguard.cli.job import choose_size, make_defense, make_victim, parse_options
from dipguard.cli.main import main
from dipguard.defenses import DEFENSES
from dipguard.victims import VICTIMS, Normalised

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("true", True),
        ("False", False),
        ("no", False),
        ("null", None),
        ("above", "above"),
        ("012", "012"),
        ("[1, 2]", [1, 2]),
        ("a=b", "a=b"),
        ("{pad_type: same}", {"pad_type": "same"}),
        ("[cat, dog]", ["cat", "dog"]),
    ],
)
def test_values_are_json_or_what_hydra_would_read(text, value):
    (found,) = parse_options([f"key={text}"], argument="--option", own={}).values()
    assert (found, type(found)) == (value, type(value))


def test_a_broken_map_is_named():
    with pytest.raises(CommandError, match=r"--victim-option: 'model=\{pad_type: same' is neither JSON nor YAML"):
        parse_options(["model={pad_type: same"], argument="--victim-option", own={})


def test_a_model_after_the_colon(tmp_path):
    from torchvision.models import squeezenet1_1

    network = squeezenet1_1(num_classes=3)
    torch.save(network.state_dict(), tmp_path / "own.pt")
    options = {"num_classes": 3}
    victim = make_victim("torchvision:squeezenet1_1", weights=str(tmp_path / "own.pt"), options=options, device=CPU)
    assert victim(torch.rand(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(CommandError, match="given twice"):
        make_victim("torchvision:resnet18", weights=None, options={"arch": "resnet18"}, device=CPU)


def _reads_any_size(**more):
    layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 10))
    return Normalised(layers, mean=(0, 0, 0), std=(1, 1, 1), **more)


def test_the_size_is_the_victims_own_unless_another_is_asked_for():
    assert choose_size(_reads_any_size(size=(20, 30)), None) == (20, 30)
    assert choose_size(_reads_any_size(size=(20, 30)), 40) == (40, 40)
    with pytest.raises(CommandError, match="--size: this victim does not say"):
        choose_size(_reads_any_size(), None)


@pytest.mark.parametrize(
    ("name", "size", "options", "steps"),
    [
        ("paper", 32, {}, 1000),
        ("paper", 224, {}, 3000),
        ("paper", 224, {"T": 700}, 700),
        ("dipdefend", 32, {}, 4000),
        ("dipdefend", 224, {}, 2400),
        ("dip_fixed", 224, {}, 501),
        ("mirror", 32, {}, 510),
        ("mirror", 224, {}, 250),
    ],
)
def test_photographs_get_the_papers_settings_for_photographs(name, size, options, steps):
    made = make_defense(name, _reads_any_size(), seed=0, options=options, size=(size, size))
    assert made.steps_per_image == steps
    if name == "paper":
        assert made.fit_options.network == ("imagenet" if size == 224 else "cifar10")


def test_list_names_every_victim_and_defence_with_its_options(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in (*VICTIMS, *DEFENSES):
        assert f"\n  {name}: " in printed
    assert "quality=75" in printed
    assert "arch=resnet50 " in printed
    assert not set(printed) & set("`'~") - set("'")
    assert not re.search(r":class:|\?\?\?|None|True|='", printed), "markup or Python's own notation"


def test_help_and_version(capsys):
    for words in (["--help"], ["purify", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 0
    assert "--victim" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["purify"], ["purify", "a", "b", "--victim"], ["fly"]])
def test_half_a_command_is_refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
