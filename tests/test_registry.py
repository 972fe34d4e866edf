import subprocess
import sys

import pytest

from dipguard.attacks import ATTACKS
from dipguard.data import DATASETS, load_data
from dipguard.registry import check_options, resolve
from dipguard.victims import VICTIMS

TARGETS = [*DATASETS.values(), *(row[0] for row in VICTIMS.values()), *ATTACKS.values()]


@pytest.mark.parametrize("target", sorted(set(TARGETS)))
def test_every_row_points_to_code(target):
    assert callable(resolve({"row": target}, "row", argument="row"))


def test_an_unknown_name_lists_those_that_exist():
    with pytest.raises(ValueError, match=r"`data`.*digits, cifar10, arrays, image_folder.*'mnist'"):
        load_data("mnist")


@pytest.mark.parametrize(("name", "known"), [("digits", "none"), ("cifar10", "split, download")])
def test_an_unknown_option_lists_those_that_exist(name, known):
    with pytest.raises(TypeError, match=f"'{name}' takes no option 'colour'; its options are: {known}$"):
        load_data(name, colour=True)


def test_hidden_options_are_not_the_callers():
    def build(*, weights: str, arch: str) -> None: ...

    check_options(build, {"arch": "x"}, owner="it", hidden=("weights",))
    with pytest.raises(TypeError, match="'weights'; its options are: arch"):
        check_options(build, {"weights": "x"}, owner="it", hidden=("weights",))


@pytest.mark.slow  # a second interpreter imports torch and Lightning
def test_importing_the_rooms_imports_no_attack_library():
    code = "import sys, dipguard.data, dipguard.victims, dipguard.attacks; print('torchattacks' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
