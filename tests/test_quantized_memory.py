"""What opening a folder of weights in 4 bits takes in memory: its bytes once, mapped pages of its file counted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lorap
from lorap.algorithms import rounding

STATUS = Path("/proc/self/status")
LIMIT = 1.15  # times the bytes of the folder; 1.00 as it is, 1.4 and more where each exists twice

# In a process of its own, whose peak begins anew: first a tiny model, for what is imported and started once.
OPEN = """
import gc, sys, torch, lorap
from pathlib import Path
from transformers import AutoModelForCausalLM

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def open_and_answer(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(torch.tensor([[1]])).logits.isfinite().all()

torch.set_num_threads(1)
assert open_and_answer(sys.argv[1])
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is held now
before = peak()
assert open_and_answer(sys.argv[2])
print(peak() - before)
"""


def save_int4(folder: Path, *, hidden: int, width: int) -> Path:
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=width, num_hidden_layers=1, num_attention_heads=4, vocab_size=100
    )
    model = LlamaForCausalLM(config).bfloat16()
    lorap.quantize(model, "int4")
    model.save_pretrained(folder)
    return folder


def any_scales(weight: Tensor, importance: Tensor | None, *, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    return torch.full((weight.shape[0], -(-weight.shape[1] // group)), 0.01, dtype=dtype)


@pytest.mark.skipif(not STATUS.exists() or "VmHWM" not in STATUS.read_text(), reason="Linux tells the peak")
def test_opening_int4_and_one_token_take_the_bytes_of_the_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "search_scales", any_scales)  # the search takes long, and its outcome no memory
    torch.manual_seed(0)
    tiny, large = (
        save_int4(tmp_path / "tiny", hidden=64, width=100),
        save_int4(tmp_path / "large", hidden=1024, width=16_000),
    )
    command = [sys.executable, "-c", OPEN, str(tiny), str(large)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    stored = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert stored > 25e6  # some 15 MB more would fit into what was freed before
    # Less than once would mean that something of it was never read.
    assert 0.8 * stored < int(run.stdout.split()[-1]) < LIMIT * stored
