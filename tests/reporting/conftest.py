import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.plan import prepare
from dipguard.evaluation.runner import run
from tests.tiny_run import TINY, typed_config


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """A real run of three images, not yet reported."""
    threads = torch.get_num_threads()
    matrix = prepare(typed_config(*TINY, "data.limit=3"), tmp_path_factory.mktemp("reported") / "run")
    assert run(matrix) == []
    assert torch.get_num_threads() == threads
    return matrix


@pytest.fixture
def matrix(finished: Matrix, tmp_path: Path) -> Matrix:
    """The same run in a folder of its own."""
    return replace(finished, folder=Path(shutil.copytree(finished.folder, tmp_path / "run")))
