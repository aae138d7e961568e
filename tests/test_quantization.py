"""int8 weights on top of compression: how far off, how small, and the same again after saving and loading."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorap
from lorap.checkpoint.folders import read_tensors
from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.load import find_model
from lorap.cli.compress import next_steps
from lorap.evaluation.info import describe_model, format_info

pytest.importorskip("torchao")

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


@pytest.fixture
def small(make_model, compress_small) -> Any:
    return compress_small(make_model("llama-biases"), storage="pivoted")[0]


def test_weights_are_rounded_to_one_of_255_steps_of_their_row(small) -> None:
    before = copy.deepcopy(small.state_dict())
    names = [name for name in before if name.endswith("weight") and before[name].ndim == 2 and "layers" in name]
    assert len(names) == 2 * (2 * 4 + 3)
    lorap.quantize_int8(small)
    for name in names:
        row_max = before[name].abs().amax(1, keepdim=True)
        found = small.get_parameter(name)
        assert found.qdata.dtype == torch.int8
        error = (found.dequantize() - before[name]).abs()
        assert (error <= 1.01 * row_max / 255).all()  # half a step of 2 * max / 255
        assert error.max() > 0
    for name in ("model.embed_tokens.weight", "lm_head.weight", f"{Q}.output_bias", f"{DOWN}.bias"):
        assert torch.equal(small.state_dict()[name], before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_is_the_same(family, dtype, make_model, compress_small, tokens, tmp_path) -> None:
    model, report = compress_small(make_model(family), storage="pivoted")
    floats = lorap.save(model, tmp_path / "float", report=report)
    model = AutoModelForCausalLM.from_pretrained(floats, dtype=dtype)
    unrounded = logits(model, tokens).float()
    model.save_pretrained(tmp_path / "float")
    lorap.quantize_int8(model)
    expected = logits(model, tokens)
    error = (expected.float() - unrounded).norm() / unrounded.norm()
    assert 1e-4 < error < 0.05
    model.save_pretrained(tmp_path / "int8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded, tokens), expected)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "int8/model.safetensors").read_bytes()
    sizes = [_decoder_bytes(tmp_path / name) for name in ("float", "int8")]
    assert 1 / dtype.itemsize < sizes[1] / sizes[0] < 1 / dtype.itemsize + 0.1  # scales and biases are the rest


def test_pruned_ffns_without_low_rank_layers(make_model, compress_small, tokens, tmp_path) -> None:
    model, _ = compress_small(make_model("qwen2"), sparsity=0.2, target="stock")
    assert not hasattr(model.config, "quantization_config")
    lorap.quantize_int8(model).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (settings["weights"], settings["format_version"], settings["ranks"]) == ("int8", 4, {})
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), logits(model, tokens))


@pytest.mark.parametrize("first", ["quantize", "optimize"])
def test_with_optimize_for_inference(first, small, tokens) -> None:
    """Where weights are int8 our kernels step back, and torchao's run."""
    expected = logits(lorap.quantize_int8(copy.deepcopy(small)), tokens)
    steps = [lorap.quantize_int8, lorap.optimize_for_inference]
    for step in steps if first == "quantize" else steps[::-1]:
        step(small)
    torch.testing.assert_close(logits(small, tokens), expected, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert small.generate(tokens[:1, :7], **options).shape == (1, 12)


def test_sharded_and_with_a_device_map(small, tokens, tmp_path) -> None:
    lorap.quantize_int8(small).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(logits(loaded, tokens), logits(small, tokens))


# Opens each folder, in an interpreter without lorap.
REFUSED = """
import sys, transformers
for folder in sys.argv[1:]:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    except Exception as refused:
        print("needs_import_lorap" in str(refused))
"""


def test_opened_without_lorap_it_is_refused(make_model, compress_small, tmp_path) -> None:
    """Also where no layer is low-rank: the int8 layers have guards of their own."""
    targets = ("lorap", "stock")
    for target in targets:
        model, _ = compress_small(make_model("llama-gqa"), sparsity=0.2, target=target)
        lorap.quantize_int8(model).save_pretrained(tmp_path / target)
    command = [sys.executable, "-c", REFUSED, *targets]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.stdout.split() == ["True", "True"], run.stdout + run.stderr


def test_a_missing_scale_is_refused(small, tmp_path) -> None:
    lorap.quantize_int8(small).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"{DOWN}._weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(lorap.CheckpointError, match=r"first model\.layers\.1\.mlp\.down_proj\._weight_scale"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_cannot_be_done_is_refused(small, monkeypatch, tmp_path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda _name: None)
        with pytest.raises(lorap.BackendError, match=r"int8 weights need torchao, .* pip install 'lorap\[quant\]'"):
            lorap.quantize_int8(copy.deepcopy(small))
    lorap.quantize_int8(small)
    with pytest.raises(lorap.ArchitectureError, match="the weights of this model are int8 already"):
        lorap.quantize_int8(small)
    for refused in (lorap.reconstruct, lambda model: lorap.export_stock(model, tmp_path / "plain")):
        with pytest.raises(lorap.ArchitectureError, match="are int8; reconstruct or export it before it is quantized"):
            refused(small)


@pytest.mark.parametrize("recipe", ["lorap", "best", "flap"])
def test_info_tells_the_kept_share_of_int8_weights(recipe, make_model, compress_small, tmp_path) -> None:
    """As without int8; scales are bytes and no parameters."""
    model, report = compress_small(make_model("llama-gqa"), recipe=recipe)
    lorap.save(model, tmp_path / "float", report=report)
    lorap.quantize_int8(model).save_pretrained(tmp_path / "int8")
    floats, int8 = (describe_model(find_model(tmp_path / name)) for name in ("float", "int8"))
    assert floats["params_before"] == report.params_total_before
    for name in ("params", "params_before", "param_ratio", "kinds", "ranks", "index_bytes"):
        assert int8[name] == floats[name], name
    scales = [info.nbytes for name, info in read_tensors(tmp_path / "int8").items() if name.endswith("_weight_scale")]
    assert int8["scale_bytes"] == sum(scales) > 0
    assert f"their scales take {sum(scales) / 1e3:,.1f} kB" in format_info(int8)
    assert floats["scale_bytes"] == 0


def test_info_of_a_dense_model_with_int8_weights(make_model, tmp_path) -> None:
    model = make_model("llama-biases")
    model.save_pretrained(tmp_path / "float")
    lorap.quantize_int8(model).save_pretrained(tmp_path / "int8")
    floats, int8 = (describe_model(find_model(tmp_path / name)) for name in ("float", "int8"))
    assert (int8["params"], int8["param_ratio"], int8["kinds"]) == (floats["params"], 1.0, floats["kinds"])


def test_versions_of_int8() -> None:
    assert LoRAPConfig(weights="int8").format_version == 4
    assert "weights" not in LoRAPConfig().to_dict()
    again = LoRAPConfig(**LoRAPConfig(weights="int8", storage="pivoted").to_dict())
    assert (again.weights, again.storage, again.format_version) == ("int8", "pivoted", 4)
    with pytest.raises(lorap.CheckpointError, match="int8 weights and format version 2, which has none; it must be 3"):
        LoRAPConfig(weights="int8", format_version=2)
    with pytest.raises(
        lorap.CheckpointError,
        match=r"quantization_config\.weights should be 'float', 'int8', 'int4', 'tcq2', .* or 'tcq6' and is 'int2'",
    ):
        LoRAPConfig(weights="int2")


def _decoder_bytes(folder: Any) -> int:
    return sum(info.nbytes for name, info in read_tensors(folder).items() if ".layers." in name and not info.is_index)


@pytest.mark.parametrize("weights", ["float", "int4"])
def test_no_command_is_suggested_that_refuses_the_folder(weights: str, make_model, compress_small) -> None:
    _, report = compress_small(make_model("llama-gqa"), recipe="lorap", weights=weights)
    commands = {command.split()[1] for command, _ in next_steps("dense", Path("out"), report)}
    assert {"eval", "generate"} <= commands
    assert ({"recover", "export"} <= commands) == (weights == "float")
