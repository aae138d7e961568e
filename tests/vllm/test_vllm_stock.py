"""vLLM without the plug-in on folders of `--target stock` in few bits, which say that they are compressed-tensors'.

Of 4 bits its kernel for CPUs computes with 16 bits, so the measure is how far transformers itself is from float32 in these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_host import SMALL, check_greedy, scores_of, texts, told_scores, vllm_says

import lorap

HALVES = ("bfloat16", "float16")
NEEDS_AVX512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="vLLM's kernel for 4 bits refuses CPUs without AVX-512"
)


@pytest.fixture(scope="module")
def prompts(tokens) -> list[list[int]]:
    return texts(tokens)


@pytest.fixture(scope="module")
def stock(make_model, tokens, tmp_path_factory) -> dict[str, Path]:
    """Of two families, one with biases; with a narrower FFN of whole groups, and of all channels."""
    place, found = tmp_path_factory.mktemp("stock"), {}
    plain = {key: value for key, value in SMALL.items() if key != "head_dim"}
    for name, family, weights, sparsity in (
        ("llama", "llama-gqa", "int4", 0.3),
        ("biases", "qwen2", "int4", 0.0),
        ("int8", "llama-gqa", "int8", 0.0),
    ):
        config = lorap.CompressionConfig(
            sparsity=sparsity, target="stock", weights=weights, group_size=32, correction_steps=0
        )
        model = make_model(family, **plain, intermediate_size=192)
        model, report = lorap.compress(model, calibration=tokens, config=config, progress=False)
        found[name] = lorap.save(model, place / name, report=report)
    return found


@pytest.fixture(scope="module")
def answers(stock, prompts) -> dict[tuple[str, str], Any]:
    """Of each folder and dtype, all in one process."""
    asked = [(name, dtype) for name in ("llama", "biases") for dtype in HALVES]
    asked += [("int8", "bfloat16"), ("llama", "float32")]
    jobs = [
        {"folder": stock[name], "prompts": prompts, "score": True, "options": {"dtype": dtype}} for name, dtype in asked
    ]
    return dict(zip(asked, vllm_says(jobs, VLLM_PLUGINS=""), strict=True))


@NEEDS_AVX512
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["llama", "biases"])
def test_4_bits_compute_what_transformers_computes(name, dtype, stock, prompts, answers) -> None:
    exact, own = scores_of(stock[name], prompts), told_scores(answers[name, dtype])
    rounding = (scores_of(stock[name], prompts, getattr(torch, dtype)) - exact).abs()
    difference = (own - exact).abs()
    print(
        f"{name}, {dtype}: {difference.mean():.4f} nats, transformers {rounding.mean():.4f}; largest {difference.max():.4f}"
    )
    assert difference.mean() < 2 * rounding.mean()
    assert difference.max() < 3 * rounding.max()
    check_greedy(stock[name], prompts, answers[name, dtype], tie=float(6 * rounding.max()))


@NEEDS_AVX512
def test_4_bits_with_float32_are_refused(answers) -> None:
    assert "not implemented for 'Float'" in answers["llama", "float32"]["error"]


def test_8_bits_have_no_kernel_on_cpus(answers) -> None:
    assert "Failed to find a kernel" in answers["int8", "bfloat16"]["error"]
