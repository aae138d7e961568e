"""What the tests of vLLM share: vLLM in a process of its own, transformers' opinion of what it says, and small checkpoints."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lorap
from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.hf_quantizer import attach_quantization_config

found = importlib.util.find_spec("vllm")
if found is None or found.origin is None:  # this folder bears the name too
    pytest.skip("run by `make test-vllm`, in an environment with vLLM", allow_module_level=True)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SMOLLM = ROOT / ".cache" / "SmolLM2-135M-Instruct"
WIKI = ROOT / ".cache" / "wiki.txt"
ENVIRONMENT = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
# vLLM's CPU attention wants heads of 32 or more.
SMALL = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 3}
# By layer: ranks of the projections that are low-rank, and the width of the FFN, None for all of it.
SHAPES = [
    ({"q_proj": 41, "v_proj": 17, "o_proj": 50}, 67),
    ({"k_proj": 23, "down_proj": 31, "up_proj": 37}, None),
    ({"q_proj": 11, "k_proj": 12, "v_proj": 13}, 90),
]
# 132 inputs are no whole groups of 32.
ODD = SMALL | {"hidden_size": 132}
WHOLE = [({}, 256), ({"q_proj": 41}, None), ({}, 256)]
# What the logits of two hosts may differ by in float32.
TIE = 1e-3
# How far log-probabilities of one token may be from those in transformers, in nats.
LIMIT = 1e-3
LAYERS = [f"model.layers.{index}" for index in range(3)]


def vllm_says(jobs: list[dict[str, Any]], **environment: str) -> list[Any]:
    """The answers of speak.py."""
    return run_vllm(jobs, **environment)[0]


def run_vllm(jobs: list[dict[str, Any]], **environment: str) -> tuple[list[Any], str]:
    """The answers of speak.py and what vLLM and its workers logged."""
    done = subprocess.run(
        [sys.executable, str(HERE / "speak.py")],
        input=json.dumps([job | {"folder": str(job["folder"])} for job in jobs]),
        capture_output=True,
        text=True,
        env=ENVIRONMENT | environment,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr + done.stdout  # workers log to standard output


@torch.no_grad()
def scores_of(folder: Path, prompts: list[list[int]], dtype: torch.dtype = torch.float32) -> Tensor:
    """The log-probability of each token of the prompts but the first of each, one behind the other, in transformers."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), []
    for prompt in prompts:
        ids = torch.tensor(prompt)
        logits: Tensor = model(ids[None]).logits[0, :-1]
        found.append(logits.float().log_softmax(-1).gather(1, ids[1:, None])[:, 0])
    return torch.cat(found)


def told_scores(answers: Any) -> Tensor:
    """The same in an answer of vLLM."""
    assert "scores" in answers, answers
    return torch.tensor([score for scores in answers["scores"] for score in scores])


def check_scores(folder: Path, prompts: list[list[int]], answers: Any, limit: float = LIMIT) -> float:
    """The log-probability of each token of the prompts is that of transformers within ``limit``; the largest difference."""
    worst = float((told_scores(answers) - scores_of(folder, prompts)).abs().max())
    assert worst < limit, worst
    return worst


@torch.no_grad()
def check_greedy(folder: Path, prompts: list[list[int]], answers: Any, length: int = 16, tie: float = TIE) -> None:
    """Each token is the one that transformers finds likeliest behind those before it."""
    answers = answers["tokens"] if isinstance(answers, dict) and "tokens" in answers else answers
    assert isinstance(answers, list), answers
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    eos = model.generation_config.eos_token_id
    stops = set(eos if isinstance(eos, list) else [eos])
    for prompt, tokens in zip(prompts, answers, strict=True):
        assert len(tokens) == length or tokens[-1] in stops
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        behind = logits.max(dim=1).values - chosen
        assert float(behind.max()) < tie, f"{tokens}, likelier {logits.argmax(dim=1).tolist()}"


def narrow(mlp: Any, width: int) -> None:
    """Keep the first channels of an FFN."""
    for role in ("gate_proj", "up_proj", "down_proj"):
        old = getattr(mlp, role)
        weight = old.weight.data[:, :width] if role == "down_proj" else old.weight.data[:width]
        old.weight = nn.Parameter(weight.clone())
        if old.bias is not None and role != "down_proj":
            old.bias = nn.Parameter(old.bias.data[:width].clone())
        old.out_features, old.in_features = weight.shape


def shrink(model: Any, folder: Path, *, storage: str = "factors", biases: bool = False, shapes: Any = SHAPES) -> Path:
    """Save ``model`` with the projections and widths of ``shapes``."""
    ranks, widths, added = {}, {}, []
    for index, (layer_ranks, width) in enumerate(shapes):
        layer = model.model.layers[index]
        if width is not None:
            narrow(layer.mlp, width)
            widths[f"model.layers.{index}.mlp"] = width
        if biases and "down_proj" not in layer_ranks:
            layer.mlp.down_proj.bias = nn.Parameter(torch.randn(layer.mlp.down_proj.out_features))
            added.append(f"model.layers.{index}.mlp.down_proj")
        for role, rank in layer_ranks.items():
            parent = "mlp" if role in ("up_proj", "down_proj") else "self_attn"
            name = f"model.layers.{index}.{parent}.{role}"
            low = lorap.LowRankLinear.from_linear(model.get_submodule(name), rank, pivoted=storage == "pivoted")
            model.set_submodule(name, low)
            ranks[name] = rank
    attach_quantization_config(
        model, LoRAPConfig(ranks=ranks, intermediate_sizes=widths, storage=storage, biases=added)
    )
    model.save_pretrained(folder)
    return folder


def rounded(model: Any, folder: Path, weights: str, *, storage: str = "factors", **options: Any) -> Path:
    """``model`` with the ranks and widths of SHAPES, in few bits."""
    shrink(model, folder / "float", storage=storage)
    model = AutoModelForCausalLM.from_pretrained(folder / "float")
    lorap.quantize(model, weights, **({"group_size": 32} | options)).save_pretrained(folder)
    shutil.rmtree(folder / "float")
    return folder


def texts(tokens: Tensor) -> list[list[int]]:
    """Seven real texts of 5 to 23 tokens, and one of 90, which torch multiplies and not lorap's kernels."""
    return [row[: 5 + 3 * index].tolist() for index, row in enumerate(tokens[:7])] + [
        tokens[:3].flatten()[:90].tolist()
    ]
