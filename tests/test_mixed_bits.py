"""4 and 8 bits in one folder: the same after loading, in fused ops too, and refused where config.json is damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

import lorap
from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.layouts import compressed_shapes, dense_shapes
from lorap.checkpoint.load import find_model
from lorap.evaluation.info import describe_model, format_info
from lorap.nn import ops
from lorap.nn.linear import LowRankLinear
from lorap.nn.quantized import QuantizedLinear

# Of q, k and v one, of gate and up one, and both factors of a pair.
Q, UP, DOWN, OUT = (
    f"model.layers.{name}" for name in ("0.self_attn.q_proj", "0.mlp.up_proj", "1.mlp.down_proj", "1.self_attn.o_proj")
)
OTHER = dict.fromkeys((Q, UP, DOWN, OUT), 8)


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


def bits_of(model: Any) -> dict[str, int]:
    return {name: part.bits for name, part in model.named_modules() if isinstance(part, QuantizedLinear)}


@pytest.mark.parametrize(("weights", "other"), [("int4", 8), ("int8", 4)])
@pytest.mark.parametrize("storage", ["dense", "factors", "pivoted"])
def test_saved_and_loaded_it_is_the_same(storage, weights, other, make_model, compress_small, tokens, tmp_path) -> None:
    model = make_model("llama-biases", hidden_size=60, num_attention_heads=3, num_key_value_heads=1)
    if storage != "dense":
        model, _ = compress_small(model, storage=storage, sparsity=0.6)
    lorap.quantize(model, weights, group_size=32, other_bits=dict.fromkeys(OTHER, other), calibration=tokens)
    stored = bits_of(model)
    asked = {
        name: other if name.removesuffix(".left").removesuffix(".right") in OTHER else 12 - other for name in stored
    }
    assert stored == asked
    assert (f"{Q}.left" in stored) == (storage != "dense")
    assert not any(part.pivot_rows is not None for part in model.modules() if isinstance(part, LowRankLinear))
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (settings["format_version"], settings["other_bits"]) == (6, dict.fromkeys(OTHER, other))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert bits_of(opened) == stored
    assert torch.equal(logits(opened, tokens), expected)
    bare = AutoModel.from_pretrained(tmp_path)
    assert bits_of(bare) == {name.removeprefix("model."): bits for name, bits in stored.items()}
    opened.save_pretrained(tmp_path / "again")
    first, again = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    info = describe_model(find_model(tmp_path))
    assert (info["weights"], info["other_bits"]) == (weights, {f"int{other}": 4})
    assert f"int{other} in 4 projections and {weights} in all others, in groups of 32" in format_info(info)


def test_names_and_shapes_are_known_without_torch(make_model, compress_small, tmp_path) -> None:
    model, _ = compress_small(make_model("llama-gqa"), sparsity=0.5)
    lorap.quantize(model, "int4", group_size=32, other_bits=OTHER).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    fields = LoRAPConfig(**config["quantization_config"])
    dense = dense_shapes("llama", config)
    assert {name: shape for name, shape in compressed_shapes(dense, fields).items() if name != "lm_head.weight"} == {
        name: tuple(tensor.shape)
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
        if name != "lm_head.weight"
    }
    fields.other_bits["lm_head"] = 8
    assert compressed_shapes(dense, fields) is None


@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_merged_it_computes_the_same(sparsity, make_model, compress_small, tokens, monkeypatch) -> None:
    """Gate and up of different bits run each by itself, and those of the same as one."""
    model = make_model("llama-gqa")
    if sparsity:
        model, _ = compress_small(model, sparsity=sparsity)
    lorap.quantize(model, "int4", group_size=32, other_bits=OTHER)
    expected, asked, served = logits(model, tokens), [], ops.served
    monkeypatch.setattr(ops, "served", lambda name, x: asked.append(name) or served(name, x))
    lorap.optimize_for_inference(model)
    for count in (1, 3, 32):
        found = logits(model, tokens[:1, :count])
        torch.testing.assert_close(found, expected[:1, :count], rtol=1e-4, atol=1e-4)
    assert asked.count("quantized_silu_gated_linear") == 3


def test_a_pair_whose_factors_differ_computes_each_by_itself(make_model, compress_small) -> None:
    """No folder holds one, but who builds it must not get numbers that are read in the wrong bits."""
    model, _ = compress_small(make_model("llama-gqa"), sparsity=0.6)
    pair = lorap.quantize(model, "int8", group_size=32).get_submodule(Q)
    numbers = torch.randint(-8, 8, (pair.out_features, pair.rank))
    scales = torch.full((pair.out_features, -(-pair.rank // 32)), 0.1)
    pair.left = QuantizedLinear.from_numbers(numbers, scales, bits=4, group_size=32)
    x = torch.randn(2, pair.in_features)
    torch.testing.assert_close(pair(x), x @ pair.right.dequantize().T @ (0.1 * numbers.float()).T, rtol=1e-3, atol=1e-4)


def test_versions_are_the_lowest_that_fit() -> None:
    assert LoRAPConfig(weights="int4", group_size=64, other_bits={Q: 8}).format_version == 6
    assert LoRAPConfig(weights="int4", group_size=64).format_version == 5
    assert "other_bits" not in LoRAPConfig(weights="int4", group_size=64).to_dict()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"other_bits": {Q: 7}}, f"other_bits.{Q} should be 2, 3, 4, 5, 6 or 8 and is 7"),
        ({"other_bits": {Q: True}}, f"other_bits.{Q} should be 2, 3, 4, 5, 6 or 8 and is True"),
        ({"other_bits": {Q: 4}}, f"other_bits says 4 for {Q}, but int4 weights are in 4 bits already"),
        ({"other_bits": {Q[:-6]: 8}}, f"other_bits names {Q[:-6]}, but the decoder layers have no such projection"),
        (
            {"other_bits": {f"{Q}.left": 8}},
            f"other_bits names {Q}.left, but the decoder layers have no such projection",
        ),
        ({"other_bits": {"lm_head": 8}}, "other_bits names lm_head, but"),
        ({"other_bits": [Q]}, f"other_bits should be .* and is \\['{Q}'\\]"),
        ({"other_bits": {UP: 8}}, r"weight_packed has the shape .* but config.json makes it"),
        ({"format_version": 5}, r"int4 weights in groups of 32 and other_bits and format version 5.* must be 6"),
        ({"format_version": 9}, "format version 9 and this lorap reads 1 to 8"),
        ({"other_bits": {Q: 3}}, f"other_bits says 3 for {Q}, but int4 weights go with int4 or int8 alone"),
        ({"weights": "float", "group_size": None}, f"says 8 for {Q}, but float weights are not packed"),
        ({"weights": "int8", "group_size": None}, f"says 8 for {Q}, but int8 weights are not packed"),
    ],
    ids=str,
)
def test_damaged_entries_are_refused_by_name(fields, said, mixed_folder, tmp_path) -> None:
    shutil.copytree(mixed_folder, tmp_path / "damaged")
    path = tmp_path / "damaged" / "config.json"
    settings = json.loads(path.read_text())
    settings["quantization_config"] |= fields
    path.write_text(json.dumps(settings))
    with pytest.raises(lorap.CheckpointError, match=said):
        AutoModelForCausalLM.from_pretrained(tmp_path / "damaged")


@pytest.fixture(scope="module")
def mixed_folder(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    lorap.quantize(make_model("llama-gqa"), "int4", group_size=32, other_bits={Q: 8}).save_pretrained(folder)
    return folder


def test_a_name_twice_and_an_older_reader_are_refused(mixed_folder, tmp_path, monkeypatch) -> None:
    shutil.copytree(mixed_folder, tmp_path / "twice")
    path = tmp_path / "twice" / "config.json"
    path.write_text(path.read_text().replace(f'"{Q}": 8', f'"{Q}": 8, "{Q}": 8'))
    with pytest.raises(lorap.CheckpointError, match=Q):
        find_model(tmp_path / "twice")
    monkeypatch.setattr("lorap.checkpoint.quantization_fields.FORMAT_VERSIONS", (1, 2, 3, 4, 5))
    with pytest.raises(lorap.CheckpointError, match="format version 6 and this lorap reads 1 to 5"):
        AutoModelForCausalLM.from_pretrained(mixed_folder)


def test_doors_that_need_floating_point_say_both(mixed_folder, make_model, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixed_folder)
    for door in (
        lambda: lorap.quantize(model, "int8"),
        lambda: lorap.reconstruct(model),
        lambda: lorap.export_stock(model, tmp_path / "stock"),
        lambda: lorap.export_gguf(model, tmp_path / "gguf", tokenizer=None),
        lambda: lorap.recover(mixed_folder, tmp_path / "tuned"),
    ):
        with pytest.raises(lorap.LoRAPError, match="int4 and int8"):
            door()
    with pytest.raises(lorap.CheckpointError, match=r"names model\.layers\.9\.mlp\.up_proj, but"):
        lorap.quantize(make_model("llama-gqa"), "int4", other_bits={"model.layers.9.mlp.up_proj": 8})
