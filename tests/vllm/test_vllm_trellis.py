"""vLLM serves codes on a trellis, in each number of bits and several in one folder: tokens and log-probabilities of transformers.

Odd shapes: 132 inputs in groups of 32; ranks of 11 to 50 and widths of 67 and 90, which are no whole tiles of 64 rows; one head
of keys, whose 32 rows are none either.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest
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
    texts,
    vllm_says,
)

import lorap
from lorap.architectures import PROJECTIONS
from lorap.checkpoint.load import find_model, load_model, load_tokenizer
from lorap.weights import TRELLIS

KINDS = [TRELLIS.kind(bits) for bits in TRELLIS.bits]


def other_bits(base: int) -> dict[str, int]:
    """All bits in turns over the projections of three layers, so that some neighbours have the same and some have not."""
    names = [
        f"{layer}.{'self_attn' if role[0] in 'qkvo' else 'mlp'}.{role}" for layer in LAYERS for role in PROJECTIONS
    ]
    turns = cycle(bits for bits in TRELLIS.bits for _ in range(2))
    return {name: bits for name, bits in zip(names, turns, strict=False) if bits != base}


@pytest.fixture(scope="module")
def coded(make_model, tmp_path_factory) -> dict[str, Path]:
    """Small models, by what they show."""
    place = tmp_path_factory.mktemp("coded")
    plain = {key: value for key, value in ODD.items() if key != "head_dim"} | {"hidden_size": 128}
    folders = {kind: rounded(make_model("llama-biases", **ODD), place / kind, kind) for kind in KINDS}
    folders["pivoted"] = rounded(make_model("llama-biases", **ODD), place / "pivoted", KINDS[-1], storage="pivoted")
    mixed = {"other_bits": other_bits(TRELLIS.bits[0])}
    folders["mixed"] = rounded(make_model("llama-gqa", **ODD), place / "mixed", KINDS[0], **mixed)
    folders["biases"] = rounded(make_model("qwen2", **plain), place / "biases", KINDS[-1], group_size=96)
    dense = ODD | {"num_key_value_heads": 1, "intermediate_size": 192}
    folders["dense"] = place / "dense"
    lorap.quantize(make_model("qwen3", **dense), KINDS[1], group_size=256).save_pretrained(folders["dense"])
    return folders


@pytest.fixture(scope="module")
def prompts(tokens) -> list[list[int]]:
    return texts(tokens)


def test_tokens_and_scores_are_those_of_transformers(coded, prompts) -> None:
    mixed = json.loads((coded["mixed"] / "config.json").read_text())["quantization_config"]
    assert {mixed["weights"], *(TRELLIS.kind(bits) for bits in mixed["other_bits"].values())} == {*KINDS}
    answers = vllm_says([{"folder": folder, "prompts": prompts, "score": True} for folder in coded.values()])
    for name, answer in zip(coded, answers, strict=True):
        check_greedy(coded[name], prompts, answer)
        print(f"{name}: {check_scores(coded[name], prompts, answer):.1e} nats")


def test_compiled_it_says_the_same(coded, prompts) -> None:
    names = ("mixed", "dense")
    compiled = {"enforce_eager": False}
    answers = vllm_says([{"folder": coded[name], "prompts": prompts, "options": compiled} for name in names])
    for name, answer in zip(names, answers, strict=True):
        check_greedy(coded[name], prompts, answer)


def test_several_workers_are_refused(coded, prompts) -> None:
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    job = {"folder": coded["dense"], "prompts": prompts, "options": options}
    (answer,), log = run_vllm([job], VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert "error" in answer
    assert f"{KINDS[1]} weights are not shared out among 2 tensor-parallel workers; serve them with one" in log


def test_layers_of_a_real_model(tmp_path) -> None:
    """The first of SmolLM2-135M, each code the nearest; the search for those of all would take minutes."""
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "assets.py")], check=True, stdout=subprocess.DEVNULL)
    source = find_model(str(SMOLLM))
    model, tokenizer = load_model(source), load_tokenizer(source)
    model.model.layers = model.model.layers[:3]
    model.config.num_hidden_layers = 3
    text = WIKI.read_text("utf-8")
    prompts = [tokenizer(text[start : start + 400])["input_ids"][: 8 + 30 * n] for n, start in enumerate((0, 9000))]
    bits = TRELLIS.bits[1]
    other = dict.fromkeys((f"{LAYERS[0]}.mlp.down_proj", f"{LAYERS[1]}.self_attn.v_proj"), TRELLIS.bits[-1])
    lorap.quantize(model, TRELLIS.kind(bits), other_bits=other).save_pretrained(tmp_path)
    (answer,) = vllm_says([{"folder": tmp_path, "prompts": prompts, "score": True}])
    check_greedy(tmp_path, prompts, answer)
    check_scores(tmp_path, prompts, answer)
