from __future__ import annotations

import pytest
import torch

from dipguard.evaluation.outcome import Outcome
from dipguard.evaluation.pipeline import execute, prepare
from tests.tiny_run import TINY, typed_config


@pytest.fixture(scope="session")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A real run of three images, not yet reported."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    threads = torch.get_num_threads()
    run = prepare(typed_config(*TINY, "data.limit=3"), folder)
    result = execute(run)
    assert torch.get_num_threads() == threads
    return result
