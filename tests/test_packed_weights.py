"""Weights in packed groups of 4 and 8 bits: of dense and compressed models, the same after loading, refused when damaged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorap
from lorap.checkpoint.folders import stored_parameters
from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.load import find_model, load_model
from lorap.evaluation.info import describe_model, format_info
from lorap.nn.linear import LowRankLinear, count_parameters, weight_of
from lorap.nn.quantized import QuantizedLinear, decoder_linears

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
OPTIONS = [("int4", 32), ("int8", 64)]


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


def quantized_layers(model: Any) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.mark.parametrize(
    ("family", "weights", "group_size"), [*((family, "int4", 32) for family in FAMILIES), ("llama-biases", "int8", 64)]
)
def test_saved_and_loaded_it_is_the_same(family, weights, group_size, make_model, tokens, tmp_path) -> None:
    make_model(family).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    names = [name for name, _ in decoder_linears(model)]
    before = logits(model, tokens)
    lorap.quantize(model, weights, group_size=group_size)
    expected = logits(model, tokens)
    change = float((expected - before).float().norm() / before.float().norm())
    assert 0 < change < (0.4 if weights == "int4" else 0.03)
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(quantized_layers(opened)) == names
    assert torch.equal(logits(opened, tokens), expected)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["quantization_config"]["format_version"] == 5
    assert settings["hidden_act"] == "silu_needs_import_lorap"
    opened.save_pretrained(tmp_path / "again")
    assert {**load_file(tmp_path / "again" / "model.safetensors")}.keys() == load_file(
        tmp_path / "model.safetensors"
    ).keys()


@pytest.mark.parametrize(("weights", "group_size"), OPTIONS)
@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_a_compressed_model_takes_it_too(
    storage, weights, group_size, make_model, compress_small, tokens, tmp_path
) -> None:
    model, _ = compress_small(make_model("llama-biases"), storage=storage, sparsity=0.6)
    before = logits(model, tokens)
    lorap.quantize(model, weights, group_size=group_size, calibration=tokens)
    expected = logits(model, tokens)
    assert float((expected - before).norm() / before.norm()) < (0.4 if weights == "int4" else 0.02)
    pairs = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    assert {pair.pivot_rows is not None for pair in pairs} == {storage == "pivoted" and weights == "int8"}
    model.save_pretrained(tmp_path)
    opened = lorap.optimize_for_inference(AutoModelForCausalLM.from_pretrained(tmp_path))
    torch.testing.assert_close(logits(opened, tokens), expected)
    assert describe_model(find_model(tmp_path))["storage"] in (storage, "factors")


def test_a_pivoted_pair_that_would_be_larger_as_factors_becomes_dense_in_4_bits(
    make_model, compress_small, tokens, tmp_path
) -> None:
    model, _ = compress_small(make_model("llama-gqa"), storage="pivoted", sparsity=0.1, allocation="even")
    pairs = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    assert Q in pairs
    lorap.quantize(model, "int4", group_size=32).save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(opened.get_submodule(Q), QuantizedLinear)
    assert torch.equal(logits(opened, tokens), logits(model, tokens))


def test_calibrated_rounding_changes_outputs_less(make_model, tokens) -> None:
    dense = make_model("llama-gqa")
    exact, losses = logits(dense, tokens), {}
    for calibration in (None, tokens):
        model = lorap.quantize(copy.deepcopy(dense), "int4", group_size=32, calibration=calibration)
        losses[calibration is None] = float((logits(model, tokens) - exact).norm())
    assert losses[False] < 0.9 * losses[True]


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("recipe", ["best", "lorap"])
def test_compress_rounds_what_it_makes(
    recipe, sparsity, make_model, compress_small, tokens, tmp_path, short_steps
) -> None:
    options = {"recipe": recipe, "sparsity": sparsity, "weights": "int4", "group_size": 32}
    model, report = compress_small(make_model("llama-gqa"), **options)
    assert report.config.storage == "factors"
    layers = quantized_layers(model)
    assert len(layers) == len([*model.model.layers.modules()]) - len(
        [m for m in model.model.layers.modules() if not isinstance(m, QuantizedLinear)]
    )
    assert not list(decoder_linears(model))
    out = lorap.save(model, tmp_path / "out", report=report)
    assert stored_parameters(out) == report.params_saved == count_parameters(model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out), tokens), logits(model, tokens))
    assert "int4 with a scale for each 32" in (out / "README.md").read_text()
    info = describe_model(find_model(out))
    assert info["params"] == report.params_saved
    assert info["weights"] == "int4"
    assert 4 < info["bits_per_weight"] < 7  # guards and shapes weigh as much as weights in a model of this size
    if sparsity:
        assert info["param_ratio"] == pytest.approx(report.param_ratio)
    assert "int4 in groups of 32" in format_info(info)


def test_a_run_to_a_folder_goes_on_behind_the_last_rounded_layer(
    model_folder, small_text, tmp_path, monkeypatch, short_steps
) -> None:
    from lorap.compression import pipeline

    config = lorap.CompressionConfig(
        sparsity=0.4, weights="int4", group_size=32, num_calibration_samples=8, calibration_seq_len=32
    )
    options = lorap.RunOptions(calibration=str(small_text), progress=False, device="cpu")
    lorap.compress_to_folder(model_folder, tmp_path / "whole", config, options)
    round_layer, rounded = pipeline.round_layer, []

    def interrupted(context: Any, index: int, *args: Any, **kwargs: Any) -> None:
        if index == 1 and len(rounded) == 1:
            rounded.append("stopped")
            raise KeyboardInterrupt
        rounded.append(index)
        round_layer(context, index, *args, **kwargs)

    monkeypatch.setattr(pipeline, "round_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lorap.compress_to_folder(model_folder, tmp_path / "out", config, options)
    lorap.compress_to_folder(model_folder, tmp_path / "out", config, options)
    assert rounded == [0, "stopped", 1]
    whole, out = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert whole.keys() == out.keys()
    assert all(torch.equal(whole[name], out[name]) for name in whole)


@pytest.fixture
def folder(make_model, compress_small, tmp_path) -> Path:
    model, report = compress_small(make_model("llama-gqa"), weights="int4", group_size=32)
    return lorap.save(model, tmp_path / "folder", report=report)


def change(folder: Path, name: str, how: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = how(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def scale_of(value: float) -> Any:
    def put(scales: torch.Tensor) -> torch.Tensor:
        scales[-1, -1] = value
        return scales

    return put


def test_damaged_tensors_are_refused_by_name(folder) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    for name, how, said in [
        (f"{Q}.right.weight_scale", scale_of(torch.nan), f"{Q}.right.weight_scale is nan in row"),
        (f"{DOWN}.weight_scale", scale_of(-torch.inf), f"{DOWN}.weight_scale is -inf in row 63"),
        (f"{DOWN}.weight_scale", lambda t: t[:, :-1].contiguous(), f"{DOWN}.weight_scale has the shape"),
        (f"{DOWN}.weight_packed", lambda t: t[:, :-1].contiguous(), f"{DOWN}.weight_packed has the shape"),
        (f"{DOWN}.weight_packed", lambda t: t.long(), f"{DOWN}.weight_packed is torch.int64; int32"),
        (f"{DOWN}.weight_packed", lambda t: t.float(), f"{DOWN}.weight_packed is stored as F32; whole numbers"),
        (f"{DOWN}.weight_packed", lambda t: t.view(torch.float32), f"{DOWN}.weight_packed is stored as F32"),
        (f"{DOWN}.weight_shape", lambda t: t.float() + 0.4, f"{DOWN}.weight_shape is stored as F32"),
        (f"{DOWN}.weight_shape", lambda t: t + 1, f"{DOWN}.weight_shape says"),
        (f"{Q}.left.weight_packed", lambda t: t[:-1].contiguous(), f"{Q}.left.weight_packed has the shape"),
    ]:
        change(folder, name, how)
        for door in (lambda: load_model(find_model(folder)), lambda: AutoModelForCausalLM.from_pretrained(folder)):
            with pytest.raises(lorap.CheckpointError, match="weight_") as caught:
                door()
            assert said in str(caught.value)
        (folder / "model.safetensors").write_bytes(whole)


def test_a_wrong_group_size_is_refused(folder) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    for group_size, said in [
        (64, "weight_scale has the shape"),
        (48, "group_size"),
        (None, "int4 and tcq weights have one"),
    ]:
        settings["quantization_config"]["group_size"] = group_size
        path.write_text(json.dumps(settings))
        with pytest.raises(lorap.CheckpointError, match=said):
            AutoModelForCausalLM.from_pretrained(folder)


def test_versions_are_the_lowest_that_fit() -> None:
    assert LoRAPConfig(weights="int8").format_version == 4
    assert LoRAPConfig(weights="int8", group_size=64).format_version == 5
    with pytest.raises(lorap.CheckpointError, match=r"int4 weights in groups of 64 and format version 4.* must be 5"):
        LoRAPConfig(weights="int4", group_size=64, format_version=4)
    with pytest.raises(lorap.CheckpointError, match="float weights and group_size 64"):
        LoRAPConfig(group_size=64)


def test_doors_that_need_floating_point_say_so(folder, tmp_path, make_model, compress_small) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    uneven = compress_small(make_model("llama-gqa"), recipe="flap", sparsity=0.3, weights="int4")[0]
    doors = [
        lambda: lorap.quantize(model, "int8"),
        lambda: lorap.reconstruct(model),
        lambda: lorap.compress(model),
        lambda: lorap.export_stock(model, tmp_path / "stock"),
        lambda: lorap.export_stock(uneven, tmp_path / "stock"),
        lambda: lorap.export_gguf(model, tmp_path / "gguf", tokenizer=None),
        lambda: lorap.export_deci(model, tmp_path / "deci"),
        lambda: lorap.recover(folder, tmp_path / "tuned"),
        lambda: lorap.compress_to_folder(folder, tmp_path / "out"),
    ]
    for door in doors:
        with pytest.raises(lorap.LoRAPError, match=r"int4|compressed by lorap already") as caught:
            door()
        assert "\n" not in str(caught.value)
    with pytest.raises(lorap.ConfigError, match="choose one of int4, int8, tcq2, tcq3, tcq4"):
        lorap.quantize(make_model("llama-gqa"), "float")
    with pytest.raises(lorap.ConfigError, match="group_size"):
        lorap.quantize(make_model("llama-gqa"), "int4", group_size=48)
    with pytest.raises(lorap.ConfigError, match="int4 weights are too coarse for pivoted storage"):
        lorap.CompressionConfig(weights="int4", storage="pivoted")


def test_the_weight_of_a_layer_is_what_it_computes_with(make_model) -> None:
    model = lorap.quantize(make_model("llama-gqa"), "int4", group_size=32)
    layer = model.get_submodule(DOWN)
    eye = torch.eye(layer.in_features)
    torch.testing.assert_close(layer(eye).T, weight_of(layer))


def test_attention_of_another_kind_stays_as_it_is(tokens, tmp_path) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2}
    inner = {"linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    sizes = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    kind = getattr(transformers, "Qwen3_5TextConfig", None) or pytest.skip("this transformers has no such family")
    config = kind(**heads, **inner, **sizes, bos_token_id=None, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    lorap.quantize(model, "int4", group_size=32, calibration=tokens).save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(opened, tokens), logits(model, tokens))
    names = list(quantized_layers(opened))
    assert not [name for name in names if "linear_attn" in name]
    assert len(names) == 4 * 3 + 4  # three layers have a linear attention
