"""A reconstructed model computes what its factors computed, in ordinary layers, and leaves no trace that it does not need."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from torch import nn
from transformers import AutoModelForCausalLM

import lorap
from lorap.checkpoint.reconstruct import dense
from lorap.nn.linear import Linear

Q = "model.layers.0.self_attn.q_proj"


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def pair(out_features: int, in_features: int, rank: int, *, pivoted: bool, bias: bool, dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(3)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    rows = torch.randperm(out_features, generator=generator)[:rank].sort().values if pivoted else None
    left = random(out_features - rank if pivoted else out_features, rank)
    return lorap.LowRankLinear.from_factors(
        left, random(rank, in_features), random(out_features) if bias else None, rows
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("pivoted", [False, True], ids=["factors", "pivoted"])
def test_a_layer_is_the_product_rounded_once(pivoted: bool, bias: bool, dtype: torch.dtype) -> None:
    layer = pair(23, 17, 5, pivoted=pivoted, bias=bias, dtype=dtype).eval()
    left, right = layer.left.weight.double(), layer.right.weight.double()
    expected = torch.empty(23, 17, dtype=torch.float64)
    if pivoted:
        others = [row for row in range(23) if row not in layer.pivot_rows.tolist()]
        expected[layer.pivot_rows], expected[others] = right, left @ right
    else:
        expected = left @ right
    found = dense(layer)
    assert type(found) is nn.Linear
    assert (found.in_features, found.out_features, found.training) == (17, 23, False)
    assert found.weight.dtype == dtype
    # Half a step of the dtype, and what the product itself was off: in float32 for two bytes, in float64 else.
    product = (1e-6 if dtype.itemsize == 2 else 1e-14) * expected.abs().max()
    bound = expected.abs() * torch.finfo(dtype).eps / 2 + product
    assert ((found.weight.double() - expected).abs() <= bound).all()
    assert found.bias is layer.bias
    assert (found.bias is None) == (not bias)


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_and_no_pair_does(family: str, storage: str, make_model, compress_small, tokens, tmp_path) -> None:
    model, report = compress_small(make_model(family), storage=storage)
    expected = logits(model, tokens)
    loaded = AutoModelForCausalLM.from_pretrained(lorap.save(model, tmp_path / "small", report=report))
    for one in (model, loaded):
        assert lorap.reconstruct(one) is one
        assert not any(isinstance(module, lorap.LowRankLinear) for module in one.modules())
        assert_close(logits(one, tokens), expected)
        one.save_pretrained(tmp_path / "dense")
        config = json.loads((tmp_path / "dense/config.json").read_text())
        assert "quantization_config" not in config
        assert config["intermediate_size"] == 50
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        assert torch.equal(logits(again, tokens), logits(one, tokens))
        one.half()  # which transformers refuses for what it takes for quantized


def test_biases_and_requires_grad_are_taken_over(make_model, compress_small) -> None:
    model, _ = compress_small(make_model("llama-biases"), storage="pivoted")
    bias = model.get_submodule(Q).bias
    model.get_submodule(Q).right.weight.requires_grad_(False)
    lorap.reconstruct(model)
    assert model.get_submodule(Q).bias is bias
    assert not model.get_submodule(Q).weight.requires_grad
    assert model.get_submodule(Q.replace("q_proj", "k_proj")).weight.requires_grad


@pytest.mark.parametrize("optimize", [lorap.merge_shared_inputs, lorap.optimize_for_inference])
def test_also_after_merging_and_merged_again(optimize, make_model, compress_small, tokens) -> None:
    model, _ = compress_small(make_model("llama-gqa"), storage="pivoted")
    expected = logits(model, tokens)
    model = lorap.reconstruct(optimize(model))
    for length in (1, 32):  # the merged ops serve short inputs
        assert_close(logits(model, tokens[:2, :length]), expected[:2, :length])
    assert model.get_submodule(Q).weight.shape == (64, 64)
    model.get_submodule(Q).weight.data.zero_()  # a group left behind would go on with the factors
    with torch.no_grad():
        assert not model.get_submodule(Q)(torch.randn(1, 64)).any()
    optimize(model)
    assert isinstance(model.get_submodule(Q), Linear)
    assert model.get_submodule(Q).group is model.get_submodule(Q.replace("q_proj", "v_proj")).group


def test_a_dense_projection_leaves_the_group_of_its_neighbours(make_model, compress_small, tokens) -> None:
    """It would keep their factors in memory, and run them for nothing."""
    model, _ = compress_small(make_model("llama-gqa"))
    k_proj = Q.replace("q_proj", "k_proj")
    model.set_submodule(k_proj, dense(model.get_submodule(k_proj)))
    expected = logits(model, tokens[:1, :3])
    lorap.optimize_for_inference(model)
    assert model.get_submodule(k_proj).group is model.get_submodule(Q).group is not None
    lorap.reconstruct(model)
    assert model.get_submodule(k_proj).group is None
    assert_close(logits(model, tokens[:1, :3]), expected)


def test_widths_of_their_own_keep_the_marks_they_need(make_model, compress_small, tokens, tmp_path) -> None:
    """Layers of different widths and added biases: lorap is still needed, and opens it."""
    options = {"recipe": "flap", "sparsity": 0.3}
    model, _ = compress_small(make_model("llama-gqa"), **options)
    marks = model.config.quantization_config
    expected = logits(model, tokens)
    lorap.reconstruct(model)
    left = model.config.quantization_config
    assert left.intermediate_sizes == marks.intermediate_sizes
    assert len(set(left.intermediate_sizes.values())) == 2
    assert left.biases == marks.biases
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokens), expected)


def test_free_widths_with_low_rank_attention(make_model, compress_small, tokens, tmp_path) -> None:
    model, _ = compress_small(make_model("llama-mha"), recipe="best", sparsity=0.4)
    marks = model.config.quantization_config
    assert marks.ranks
    assert len(set(marks.intermediate_sizes.values())) == 2
    expected = logits(model, tokens)
    lorap.reconstruct(model).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (settings["ranks"], settings["format_version"]) == ({}, 4)
    assert settings["intermediate_sizes"] == marks.intermediate_sizes
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), expected)


def test_a_dense_model_is_left_as_it_is(make_model, tokens) -> None:
    model = make_model("qwen2")
    before = copy.deepcopy(model.state_dict())
    lorap.reconstruct(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_no_plain_factor_is_refused_before_anything_changes(make_model, compress_small) -> None:
    model, _ = compress_small(make_model("llama-gqa"))
    last = model.get_submodule("model.layers.1.self_attn.o_proj")
    handle = last.left.register_forward_hook(lambda *_: None)
    with pytest.raises(lorap.ArchitectureError, match=r"layers\.1\.self_attn\.o_proj are not plain linear layers"):
        lorap.reconstruct(model)
    assert isinstance(model.get_submodule(Q), lorap.LowRankLinear)
    handle.remove()
    last.left.weight = nn.Parameter(last.left.weight.to("meta"))
    with pytest.raises(lorap.ArchitectureError, match=r"o_proj are not in memory; load the model without offloading"):
        lorap.reconstruct(model)
