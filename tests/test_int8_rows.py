"""Folders of int8 weights with one scale a row, of format versions 3 and 4: opened with the same weights, and packed then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES
from old_int8 import save_old_int8
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import lorap
from lorap.checkpoint.folders import read_tensors
from lorap.checkpoint.load import find_model, load_model
from lorap.evaluation.info import describe_model, format_info
from lorap.nn.quantized import QuantizedLinear

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


def in_floating_point(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    """``model`` with these in place of its own, in float32."""
    nn.Module.float(model)  # that of transformers refuses models which say that they are int8
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = weight.float()
    return model


@pytest.mark.parametrize(
    ("version", "storage", "dtype"), [(3, "factors", torch.float32), (4, "pivoted", torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_opened_they_are_the_same_weights_and_saved_they_are_packed(
    family, version, storage, dtype, make_model, compress_small, tokens, tmp_path
) -> None:
    model, _ = compress_small(make_model(family), storage=storage)
    weights = save_old_int8(model.to(dtype), tmp_path / "old", version=version)
    assert len(weights) > 2 * 7 - 1
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    assert opened.dtype == dtype
    for name, weight in weights.items():
        assert torch.equal(opened.get_submodule(name).dequantize(torch.float64), weight), name
    found, exact = logits(opened, tokens), logits(in_floating_point(model, weights), tokens)
    error = (found.float() - exact).norm() / exact.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.05)
    opened.save_pretrained(tmp_path / "new")
    settings = json.loads((tmp_path / "new" / "config.json").read_text())
    compression = settings["quantization_config"]
    assert [compression[name] for name in ("weights", "group_size", "format_version")] == ["int8", 64, 5]
    assert settings["hidden_act"] == "silu_needs_import_lorap"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "new"), tokens), found)


def test_in_another_dtype_sharded_without_the_head_and_on_the_disk(
    make_model, compress_small, tokens, tmp_path
) -> None:
    model, _ = compress_small(make_model("llama-biases"), storage="pivoted")
    weights = save_old_int8(model, tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    exact = logits(in_floating_point(model, weights), tokens)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu"), tokens), exact)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(lorap.optimize_for_inference(wide), tokens).float(), exact)
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base.get_submodule(DOWN.removeprefix("model.")).dequantize(torch.float64), weights[DOWN])
    where = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    options = {"device_map": where | {"model.layers": "disk"}, "offload_folder": tmp_path / "disk"}
    with pytest.raises(lorap.CheckpointError, match="cannot stay on the disk; open the model in memory"):
        AutoModelForCausalLM.from_pretrained(tmp_path, **options, offload_buffers=True)


def test_pruned_ffns_without_low_rank_layers(make_model, compress_small, tokens, tmp_path) -> None:
    model, _ = compress_small(make_model("qwen2"), sparsity=0.2, target="stock")
    weights = save_old_int8(model, tmp_path)
    exact = logits(in_floating_point(model, weights), tokens)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), exact)


def test_attention_of_another_kind_becomes_floating_point(tokens, tmp_path) -> None:
    """Its layers were int8 then, and are none of those that are packed."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2}
    inner = {"linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    sizes = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    kind = getattr(transformers, "Qwen3_5TextConfig", None) or pytest.skip("this transformers has no such family")
    model = AutoModelForCausalLM.from_config(kind(**heads, **inner, **sizes, bos_token_id=None, eos_token_id=0))
    weights = save_old_int8(model.eval(), tmp_path / "old")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    kinds = {name: type(opened.get_submodule(name)) for name in weights}
    assert {name for name, one in kinds.items() if one is nn.Linear} == {
        name for name in kinds if "linear_attn" in name
    }
    assert set(kinds.values()) == {nn.Linear, QuantizedLinear}
    torch.testing.assert_close(logits(opened, tokens), logits(in_floating_point(model, weights), tokens))
    opened.save_pretrained(tmp_path / "new")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "new"), tokens), logits(opened, tokens))


def test_damaged_tensors_are_refused_by_name(make_model, compress_small, tmp_path) -> None:
    model, _ = compress_small(make_model("llama-biases"), storage="pivoted")
    save_old_int8(model, tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    numbers, scale = f"{DOWN}._weight_qdata", f"{Q}.right._weight_scale"

    def with_nan(scales: torch.Tensor) -> torch.Tensor:
        return scales.index_fill(0, torch.tensor([5]), torch.nan)

    for name, how, said in [
        (f"{DOWN}._weight_scale", None, f"first {DOWN}._weight_scale"),
        (numbers, None, f"first {numbers}"),
        (scale, with_nan, f"{scale} is nan in row 5, group 0"),
        (scale, lambda t: t.to(torch.int32), f"{scale} is torch.int32; floating point is needed"),
        (scale, lambda t: t[:-1], f"{scale} has the shape"),
        (scale, lambda t: t[:, 0], f"{scale} has the shape"),
        (numbers, lambda t: t[:, :-1], f"{numbers} has the shape"),
        (numbers, lambda t: t[:-1], f"{numbers} has the shape"),
        (numbers, lambda t: t.float(), f"{numbers} is stored as F32; whole numbers"),
        (numbers, lambda t: t.to(torch.int16), f"{numbers} is torch.int16; torch.int8 is needed"),
        (numbers, lambda t: t.to(torch.uint8), f"{numbers} is torch.uint8; torch.int8 is needed"),
    ]:
        tensors = dict(whole)
        found = tensors.pop(name)
        if how is not None:
            tensors[name] = how(found).contiguous()
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(lorap.CheckpointError) as caught:
            AutoModelForCausalLM.from_pretrained(tmp_path)
        assert said in str(caught.value), str(caught.value)
        with pytest.raises(lorap.CheckpointError, match=name):
            load_model(find_model(tmp_path))


@pytest.mark.parametrize("recipe", ["lorap", "best", "flap"])
def test_info_tells_the_kept_share(recipe, make_model, compress_small, tmp_path) -> None:
    """As without int8; scales are bytes and no parameters."""
    model, report = compress_small(make_model("llama-gqa"), recipe=recipe)
    lorap.save(model, tmp_path / "float", report=report)
    save_old_int8(model, tmp_path / "int8")
    floats, int8 = (describe_model(find_model(tmp_path / name)) for name in ("float", "int8"))
    assert floats["params_before"] == report.params_total_before
    for name in ("params", "params_before", "param_ratio", "kinds", "ranks", "index_bytes"):
        assert int8[name] == floats[name], name
    scales = [info.nbytes for name, info in read_tensors(tmp_path / "int8").items() if name.endswith("_weight_scale")]
    assert int8["scale_bytes"] == sum(scales) > 0
    assert f"their scales take {sum(scales) / 1e3:,.1f} kB" in format_info(int8)
    assert floats["scale_bytes"] == 0


def test_doors_that_need_floating_point_say_so(make_model, compress_small, tmp_path: Path) -> None:
    model, _ = compress_small(make_model("llama-gqa"))
    save_old_int8(model, tmp_path / "old")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    for refused in (lorap.reconstruct, lambda model: lorap.export_stock(model, tmp_path / "plain")):
        with pytest.raises(lorap.ArchitectureError, match="are int8; reconstruct or export it before it is quantized"):
            refused(opened)
    with pytest.raises(lorap.ArchitectureError, match="are int8 already"):
        lorap.quantize(opened, "int4")
    with pytest.raises(lorap.CheckpointError, match="the weights of old are int8, and adapters cannot be merged"):
        lorap.recover(tmp_path / "old", tmp_path / "tuned")
