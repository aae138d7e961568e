"""transformers and compressed-tensors open packed weights that lorap wrote, without it: `make test-compressed-tensors`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

FOLDERS = Path(os.environ["HOST_FOLDERS"])
EXPECTED = json.loads((FOLDERS / "packed.json").read_text("utf-8"))


@pytest.mark.parametrize("name", EXPECTED)
def test_losses_are_those_of_lorap(name: str) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(FOLDERS / name, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.tensor([EXPECTED[name]["tokens"]])
    with torch.no_grad():
        logits = model.eval()(tokens).logits
    found = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
    difference = (found - torch.tensor(EXPECTED[name]["losses"])).abs()
    print(f"{name}: loss {found.mean():.6f}, largest difference of a token {difference.max():.1e}")
    assert difference.max() < 1e-4
    assert "lorap" not in sys.modules
