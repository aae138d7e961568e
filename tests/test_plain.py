"""What `lorap info` reads without torch is what the full checks find, and what they refuse is never described."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES
from gguf_files import write_file
from old_int8 import save_old_int8
from safetensors.torch import load_file, save_file
from test_startup import IMPORTED

import lorap
from lorap.checkpoint.folders import INDEX, WEIGHTS
from lorap.checkpoint.layouts import PLAIN, dense_shapes
from lorap.checkpoint.load import find_model
from lorap.checkpoint.plain import find_plain
from lorap.errors import LoRAPError
from lorap.evaluation.info import describe_model

Q = "model.layers.1.self_attn.q_proj"
KINDS: dict[str, dict[str, Any]] = {
    "factors": {},
    "pivoted": {"storage": "pivoted"},
    "ffn low rank": {"recipe": "svd-llm"},
    "added bias": {"sublayers": ("mlp",), "allocation": "even", "bias_compensation": True},
    "free widths": {"recipe": "flap"},
    "one width": {"sublayers": ("mlp",)},
}


def described_both_ways(folder: Any) -> dict[str, Any]:
    plain = find_plain(folder)
    assert plain is not None
    assert plain.checked is None
    found = describe_model(plain)
    assert found == describe_model(find_model(folder))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_plain(family, make_model, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path, max_shard_size="60kB")
    assert (tmp_path / INDEX).exists()
    assert described_both_ways(tmp_path)["params"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama-biases", "qwen2", "qwen3"])
def test_compressed_models_are_plain(family, make_model, compress_small, tmp_path):
    for kind, options in KINDS.items():
        model, report = compress_small(make_model(family), **options)
        folder = lorap.save(model, tmp_path / kind.replace(" ", "-"), report=report)
        found = described_both_ways(folder)
        assert found["params"] == report.params_saved, kind


def test_int8_models_are_plain(make_model, compress_small, tmp_path):
    for storage in ("factors", "pivoted"):
        model, report = compress_small(make_model("qwen2"), storage=storage)
        save_old_int8(model, tmp_path / storage)
        found = described_both_ways(tmp_path / storage)
        assert found["params"] == report.params_saved
        assert found["scale_bytes"] > 0


@pytest.mark.parametrize("model_type", PLAIN)
def test_shapes_are_those_of_the_class_for_sizes_that_divide_nothing(model_type):
    config_class = type(transformers.AutoConfig.for_model(model_type))
    sizes = {"vocab_size": 77, "hidden_size": 45, "intermediate_size": 31, "num_hidden_layers": 3, "head_dim": 6}
    sizes |= {"num_attention_heads": 9, "num_key_value_heads": 3, "pad_token_id": None}
    for biases in ({}, {"attention_bias": True}, {"mlp_bias": True}):
        settings = sizes | biases
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config_class(**settings, tie_word_embeddings=False))
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert dense_shapes(model_type, settings) == expected, biases


def test_info_imports_neither_torch_nor_transformers(make_model, compress_small, tokenizer, tmp_path):
    pytest.importorskip("gguf")
    make_model("qwen3").save_pretrained(tmp_path / "dense")
    model, report = compress_small(make_model("llama-gqa"), storage="pivoted")
    lorap.save(model, tmp_path / "small", report=report)
    lorap.export_stock(lorap.reconstruct(model), tmp_path / "stock")
    save_old_int8(model, tmp_path / "int8")
    write_file(tmp_path / "m.gguf", make_model("qwen2"), tokenizer)
    runs = [(["info", str(tmp_path / name)], 0, "") for name in ("dense", "small", "stock", "int8", "m.gguf")]
    run = subprocess.run(
        [sys.executable, "-c", IMPORTED.format(runs=runs)], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.count(" parameters, ") == 5


# ----------------------------------------------------------------------------------------------------------------------
# What is not plain is for the full checks


@pytest.fixture
def folder(make_model, compress_small, tmp_path):
    model, report = compress_small(make_model("llama-gqa", tie_word_embeddings=False))
    return lorap.save(model, tmp_path / "small", report=report)


def test_what_is_plain_passes_the_full_checks(folder):
    """Every field of config.json with every kind of value, one after the other."""
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
    values = ["x", "silu", -1, 0, 10**9, 0.5, None, True, [0, 1], {"a": 1}, rope]
    fields = {
        *settings,
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "auto_map",
        "num_experts",
        "layer_types",
        "colour",
    }
    passed, wrong = 0, []
    for name in sorted(fields):
        for value in values:
            path.write_text(json.dumps(settings | {name: value}))
            if find_plain(folder) is not None:
                passed += 1
                try:
                    find_model(folder)
                except LoRAPError as error:
                    wrong.append((name, value, str(error)[-120:]))
    assert 20 < passed < len(fields) * len(values) / 2
    path.write_text(json.dumps(settings))
    for name in ("eos_token_id", "temperature", "top_p", "top_k", "max_new_tokens", "do_sample", "num_beams"):
        for value in values:
            (folder / "generation_config.json").write_text(json.dumps({name: value, "pad_token_id": 0}))
            if find_plain(folder) is not None:
                passed += 1
                try:
                    find_model(folder)
                except LoRAPError as error:
                    wrong.append((name, value, str(error)[-120:]))
    assert passed > 30
    assert wrong == []


CHANGES = {
    "missing": lambda tensors: tensors.pop(f"{Q}.right.weight"),
    "more": lambda tensors: tensors.update({f"{Q}.bias": torch.ones(64)}),
    "shape": lambda tensors: tensors.update({f"{Q}.left.weight": torch.ones(63, 2)}),
    "norm": lambda tensors: tensors.pop("model.norm.weight"),
    "integers": lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int64)}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_tensors_are_not_plain_and_are_refused(change, folder):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert find_plain(folder) is None
    with pytest.raises(LoRAPError):
        find_model(folder)


def test_other_files_are_not_plain(folder, tmp_path):
    for name, text in {
        "adapter_config.json": "{}",
        "generation_config.json": '{"num_return_sequences": 4}',
        "tokenizer_config.json": '{"auto_map": {}}',
        "shard-00001-model-00001-of-00001.safetensors": "",
    }.items():
        copy = shutil.copytree(folder, tmp_path / name)
        (copy / name).write_text(text)
        assert find_plain(copy) is None, name
    (folder / WEIGHTS).write_bytes(b"damaged")
    assert find_plain(folder) is None
