"""mlx-lm opens what lorap writes for hosts without it, and refuses the rest. Run by `make test-mlx`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm import load
from mlx_lm.utils import load_model

FOLDERS = Path(os.environ["HOST_FOLDERS"])
EXPECTED = json.loads((FOLDERS / "expected.json").read_text("utf-8"))
TEXT = EXPECTED.pop("text")


@pytest.mark.parametrize("name", [*EXPECTED, "deci"])
def test_losses_are_those_of_transformers_5(name: str) -> None:
    """Also of a folder with a width per layer, whose Python mlx-lm does not run."""
    expected = EXPECTED.get(name) or json.loads((FOLDERS / "deci.json").read_text("utf-8"))
    model, _ = load_model(FOLDERS / name)
    tokens = mx.array([expected["tokens"]])
    found = nn.losses.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])
    difference = mx.abs(found - mx.array(expected["losses"])).max().item()
    print(f"{name}: loss {found.mean().item():.6f}, largest difference of a token {difference:.1e}")
    assert difference < 1e-3


def test_text_becomes_the_same_tokens() -> None:
    _, tokenizer = load(str(FOLDERS / "llama"))
    assert tokenizer.encode(TEXT["text"]) == TEXT["ids"]


def test_a_compressed_folder_is_refused() -> None:
    with pytest.raises(ValueError, match="needs_import_lorap"):
        load_model(FOLDERS / "compressed")
