"""Damaged checkpoints and texts, for a moment; ``python tests/fuzz/run.py --minutes 10`` does it for long."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz_targets import TARGETS, Folders, outcomes, reasons
from hypothesis import HealthCheck, settings

EXAMPLES = {"header": 800, "pickle": 400, "index": 600, "info": 500, "quantization_config": 800, "load": 400}
EXAMPLES |= {"doors": 150, "texts": 300, "gguf": 100, "reports": 300}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folders]:
    memory = Path("/dev/shm")  # a disk would be most of the time
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path_factory.getbasetemp()) as place:
        yield Folders(Path(place))


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_checkpoint_is_refused_or_opened(name: str, folders: Folders) -> None:
    options = {"max_examples": EXAMPLES[name], "deadline": None, "database": None, "derandomize": True}
    settings(suppress_health_check=list(HealthCheck), **options)(folders.target(name))()
    refused, opened = outcomes[name, "refused"], outcomes[name, "opened"]
    assert refused > opened > 0  # what is whole is among the inputs, so that only a fault refuses all
    assert len(reasons[name]) >= 10  # otherwise one damage hides everything behind it
