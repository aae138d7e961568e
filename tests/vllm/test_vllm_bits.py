"""vLLM serves weights in 8 and 4 bits: tokens and log-probabilities of transformers, and what it refuses.

Odd shapes: 132 inputs in groups of 32, so that the last group has 4; ranks of 11 to 50, widths of 67 and 90.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from old_int8 import save_old_int8
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vllm_host import (
    LAYERS,
    ODD,
    ROOT,
    SMOLLM,
    WIKI,
    check_greedy,
    check_scores,
    rounded,
    run_vllm,
    shrink,
    texts,
    vllm_says,
)

import lorap
from lorap.checkpoint.load import find_model, load_model, load_tokenizer

# One of q, k and v; one of gate and up; one that is alone.
OTHER = dict.fromkeys((f"{LAYERS[0]}.self_attn.k_proj", f"{LAYERS[1]}.mlp.up_proj", f"{LAYERS[2]}.mlp.down_proj"), 8)


@pytest.fixture(scope="module")
def packed(make_model, tmp_path_factory) -> dict[str, Path]:
    """Small models, by what they show."""
    place = tmp_path_factory.mktemp("packed")
    plain = {key: value for key, value in ODD.items() if key != "head_dim"} | {"hidden_size": 128}
    dense = lorap.quantize(make_model("qwen3", **ODD), "int4", group_size=32)
    dense.save_pretrained(place / "dense")
    return {
        "int4": rounded(make_model("llama-biases", **ODD), place / "int4", "int4"),
        "int8, pivoted": rounded(make_model("llama-biases", **ODD), place / "int8", "int8", storage="pivoted"),
        "mixed": rounded(make_model("llama-gqa", **ODD), place / "mixed", "int4", other_bits=OTHER),
        "smollm3": rounded(make_model("smollm3", **ODD), place / "smollm3", "int4", group_size=64),
        "biases": rounded(make_model("qwen2", **plain), place / "biases", "int8", group_size=96),
        "dense": place / "dense",
    }


@pytest.fixture(scope="module")
def prompts(tokens) -> list[list[int]]:
    return texts(tokens)


def test_tokens_and_scores_are_those_of_transformers(packed, prompts) -> None:
    settings = json.loads((packed["int8, pivoted"] / "config.json").read_text())["quantization_config"]
    assert (settings["storage"], settings["weights"], settings["group_size"]) == ("pivoted", "int8", 32)
    assert json.loads((packed["mixed"] / "config.json").read_text())["quantization_config"]["other_bits"] == OTHER
    answers = vllm_says([{"folder": folder, "prompts": prompts, "score": True} for folder in packed.values()])
    for folder, answer in zip(packed.values(), answers, strict=True):
        check_greedy(folder, prompts, answer)
        check_scores(folder, prompts, answer)


def test_compiled_it_says_the_same(packed, prompts) -> None:
    compiled = {"enforce_eager": False}
    names = ("mixed", "int8, pivoted")
    answers = vllm_says([{"folder": packed[name], "prompts": prompts, "options": compiled} for name in names])
    for name, answer in zip(names, answers, strict=True):
        check_greedy(packed[name], prompts, answer)


def edited(folder: Path, copy_to: Path, **tensors: Any) -> Path:
    """A copy with other values of some tensors; None takes one out."""
    shutil.copytree(folder, copy_to)
    stored = load_file(copy_to / "model.safetensors")
    for name, change in tensors.items():
        found = stored.pop(name)
        if change is not None:
            stored[name] = change(found.clone()).contiguous()
    save_file(stored, copy_to / "model.safetensors", metadata={"format": "pt"})
    return copy_to


def test_damaged_packs_are_named_and_several_workers_refused(packed, prompts, tmp_path) -> None:
    q, down = f"{LAYERS[0]}.self_attn.q_proj.right", f"{LAYERS[0]}.mlp.down_proj"
    good = packed["int8, pivoted"]

    def spoil(scales: torch.Tensor) -> torch.Tensor:
        scales[3, 1] = float("inf")
        return scales

    cases = {
        f"{q}.weight_packed has the shape": {f"{q}.weight_packed": lambda t: t[:, 1:]},
        f"{down}.weight_scale": {f"{down}.weight_scale": None},
        f"{down}.weight_packed is stored as F32": {f"{down}.weight_packed": lambda t: t.float()},
        f"{q}.weight_scale is inf in row 3, group 1": {f"{q}.weight_scale": spoil},
        f"{down}.weight_shape says [132, 68]": {f"{down}.weight_shape": lambda t: t + torch.tensor([0, 1])},
        f"{LAYERS[0]}.self_attn.q_proj.pivot_rows must ascend": {
            f"{LAYERS[0]}.self_attn.q_proj.pivot_rows": lambda t: t * 0
        },
    }
    folders = [edited(good, tmp_path / str(index), **changes) for index, changes in enumerate(cases.values())]
    answers = vllm_says([{"folder": folder, "prompts": prompts} for folder in folders])
    for message, answer in zip(cases, answers, strict=True):
        assert message in answer["error"], (message, answer)
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    (answer,), log = run_vllm(
        [{"folder": packed["mixed"], "prompts": prompts, "options": options}], VLLM_CPU_OMP_THREADS_BIND="0|1"
    )
    assert "error" in answer
    assert "int4 and int8 weights are not shared out among 2 tensor-parallel workers; serve them with one" in log


def test_int8_with_one_scale_a_row(make_model, prompts, tmp_path) -> None:
    """Of older folders, whose numbers are packed as they are read."""
    shrink(make_model("llama-gqa", **ODD), tmp_path / "float", storage="pivoted")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    save_old_int8(model, tmp_path / "int8")
    (answer,) = vllm_says([{"folder": tmp_path / "int8", "prompts": prompts, "score": True}])
    check_greedy(tmp_path / "int8", prompts, answer)
    check_scores(tmp_path / "int8", prompts, answer)


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_a_real_model(weights, tmp_path) -> None:
    """SmolLM2-135M, plain rounding."""
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "assets.py")], check=True, stdout=subprocess.DEVNULL)
    source = find_model(str(SMOLLM))
    model, tokenizer = load_model(source), load_tokenizer(source)
    text = WIKI.read_text("utf-8")
    prompts = [
        tokenizer(text[start : start + 400])["input_ids"][: 8 + 12 * n] for n, start in enumerate((0, 9000, 20000))
    ]
    other = {f"{LAYERS[0]}.mlp.down_proj": 8} if weights == "int4" else {}
    lorap.quantize(model, weights, other_bits=other).save_pretrained(tmp_path)
    (answer,) = vllm_says([{"folder": tmp_path, "prompts": prompts, "score": True}])
    check_greedy(tmp_path, prompts, answer)
    check_scores(tmp_path, prompts, answer)
