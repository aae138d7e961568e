"""Packed weights for hosts without lorap: the layout of compressed-tensors, whose own reader is among the hosts (tests/hosts)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import assert_refused, last_json, run
from safetensors.torch import load_file
from torch import Tensor

import lorap
from lorap.checkpoint.folders import read_tensors
from lorap.checkpoint.load import find_model, load_model
from lorap.nn.quantized import QuantizedLinear

SIZES = {"hidden_size": 96, "intermediate_size": 352, "num_attention_heads": 3, "num_key_value_heads": 1}


def unpacked(words: Tensor, scales: Tensor, shape: Tensor, bits: int, group: int) -> Tensor:
    """A weight as compressed-tensors computes it: the lowest bits of a word first, half of the range taken off."""
    values = torch.stack([words >> shift & (1 << bits) - 1 for shift in range(0, 32, bits)], -1).flatten(1)
    numbers = values[:, : int(shape[1])] - (1 << bits - 1)
    assert numbers.shape[1] == scales.shape[1] * group
    return numbers * scales.float().repeat_interleave(group, 1)


@pytest.mark.parametrize(
    ("weights", "sparsity", "dtype"), [("int4", 0.3, torch.float32), ("int8", 0.0, torch.bfloat16)]
)
def test_the_folder_holds_what_the_model_computes_with(
    weights: str, sparsity: float, dtype: torch.dtype, make_model, compress_small, tmp_path: Path
) -> None:
    model = make_model("llama-biases", **SIZES).to(dtype)
    options: dict[str, Any] = {"recipe": "best", "correction_steps": 0, "target": "stock", "group_size": 32}
    model, report = compress_small(model, sparsity=sparsity, weights=weights, **options)
    lorap.save(model, tmp_path, report=report)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["hidden_act"], config["intermediate_size"] % 32) == ("silu", 0)
    assert (config["intermediate_size"] < 352) == (sparsity > 0)
    settings, bits = config["quantization_config"], int(weights[3:])
    assert (settings["quant_method"], settings["format"]) == ("compressed-tensors", "pack-quantized")
    assert settings["ignore"] == ["lm_head"]
    (group,) = settings["config_groups"].values()
    assert group["targets"] == ["Linear"]
    scheme = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    assert group["weights"] == scheme
    tensors = load_file(tmp_path / "model.safetensors")
    packed = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(packed) == 2 * 7
    for name, module in packed.items():
        stored = [tensors[f"{name}.{leaf}"] for leaf in ("weight_packed", "weight_scale", "weight_shape")]
        assert torch.equal(unpacked(*stored, bits, 32), module.dequantize(torch.float32))
        assert f"{name}.weight" not in tensors
    opened = load_model(find_model(tmp_path))  # as a source: the same numbers in floating point
    for name, module in packed.items():
        assert torch.equal(opened.get_parameter(f"{name}.weight"), module.dequantize(torch.float32).to(dtype))
    for door in (lorap.export_stock, lorap.export_gguf, lorap.export_deci):
        options = {"tokenizer": None} if door is lorap.export_gguf else {}
        with pytest.raises(lorap.ArchitectureError, match=f"are {weights}; reconstruct or export it before"):
            door(model, tmp_path / "out", **options)
    with pytest.raises(lorap.ArchitectureError, match=f"are {weights} already"):
        lorap.quantize(model, "int8")


def test_both_commands_tell_its_bytes_and_refuse_rows_of_broken_groups(model_folder, small_text, tmp_path) -> None:
    options = ["--target", "stock", "--calibration", small_text, "--eval-text", "none", "--recipe", "lorap"]
    options += ["--num-calibration-samples", 8, "--calibration-seq-len", 32]
    sized = [*options, "--group-size", 32, "--bits-per-weight", 4.5]
    planned = last_json(run("plan", model_folder, *sized, "--no-time", "--json"))
    done = last_json(run("compress", model_folder, tmp_path / "out", *sized, "--quiet", "--json"))
    assert planned["config"] == done["config"]
    assert (planned["config"]["weights"], planned["intermediate_size"] % 32) == ("int4", 0)
    assert planned["bytes"] == sum(tensor.nbytes for tensor in read_tensors(tmp_path / "out").values())
    for command in (["plan", model_folder], ["compress", model_folder, tmp_path / "no"]):
        # FFNs of 100 channels, all of which stay; and inputs of 64, which are no whole group of 96.
        whole = run(*command, *options, "--weights", "int4", "--sparsity", 0)
        assert_refused(whole, "100 inputs of down_proj are no multiple of")
        broken = run(*command, *options, "--weights", "int8", "--group-size", 96, "--sparsity", 0.3)
        assert_refused(broken, "64 inputs of q_proj are no multiple of")
        assert "64" in broken.stderr.split("choose")[1]
    assert not (tmp_path / "no").exists()


def test_no_format_exports_a_folder_of_packed_weights(make_model, compress_small, tokenizer, tmp_path) -> None:
    model, report = compress_small(make_model("llama-gqa"), weights="int4")
    lorap.save(model, tmp_path / "small", report=report, tokenizer=tokenizer)
    for kind in ("stock", "gguf", "deci"):
        refused = run("export", tmp_path / "small", tmp_path / kind, "--format", kind)
        assert_refused(refused, "the weights of this model are int4")
        assert not (tmp_path / kind).exists()
