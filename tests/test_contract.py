"""A row of lorap/architectures/ that is not what the model computes is refused before anything is compressed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import lorap.architectures
from lorap.architectures import ARCHITECTURES, Architecture, find_architecture
from lorap.calibration.context import DecoderContext
from lorap.calibration.contract import verify_contract

LLAMA = ARCHITECTURES["llama"]


def rewired(**paths: str) -> Architecture:
    return replace(LLAMA, projections=LLAMA.projections | paths)


@pytest.fixture
def refusal(compress_small, monkeypatch):
    """What a compression says whose family has the given row; the model is as it was."""

    def refuse(model: Any, row: Architecture) -> str:
        monkeypatch.setattr(lorap.architectures, "ARCHITECTURES", {model.config.model_type: row})
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(lorap.ArchitectureError) as error:
            compress_small(model)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert "docs/models.md" in str(error.value)
        return str(error.value)

    return refuse


def test_another_activation(make_model, refusal) -> None:
    model = make_model("llama-gqa")
    for layer in model.model.layers:
        layer.mlp.other = nn.GELU()
    found = refusal(model, replace(LLAMA, activation="other"))
    assert "model.layers.0 is not what lorap knows of llama models" in found
    assert "down_proj reads is not GELU(gate_proj) * up_proj" in found
    difference = float(found.partition("relative difference is ")[2].partition(";")[0])
    x = torch.randn(1000) * 3
    assert 0.01 < difference < 2 * float((nn.functional.gelu(x) - nn.functional.silu(x)).norm() / x.norm()) + 1


def test_gate_and_up_exchanged(make_model, refusal) -> None:
    row = rewired(gate_proj="mlp.up_proj", up_proj="mlp.gate_proj")
    assert "what down_proj reads is not" in refusal(make_model("llama-gqa"), row)


def test_a_norm_that_the_row_does_not_know(refusal) -> None:
    """BitNet has one between gate * up and down."""
    sizes = {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 500, "hidden_act": "silu"}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bitnet", **sizes)).eval()
    assert "what down_proj reads is not" in refusal(model, LLAMA)


def test_a_norm_between_what_k_and_q_read(make_model, refusal, monkeypatch) -> None:
    model = make_model("llama-gqa")
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_pre_hook(
            lambda _module, args: (nn.functional.normalize(args[0], dim=-1),)
        )
    assert "what k_proj reads is not what q_proj reads" in refusal(model, LLAMA)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (rewired(v_proj="self_attn.k_proj"), "k_proj and v_proj are both model.layers.0.self_attn.k_proj"),
        (rewired(k_proj="self_attn.v_proj", v_proj="self_attn.k_proj"), "with v_proj silenced"),
        (rewired(gate_proj="self_attn.q_proj", q_proj="mlp.gate_proj"), "k_proj reads is not what q_proj reads"),
        (rewired(o_proj="mlp.down_proj", down_proj="self_attn.o_proj"), "what down_proj reads is not"),
        (replace(LLAMA, attention="mlp", mlp="mlp"), "what attention gives is not what o_proj gives"),
        (replace(LLAMA, mlp="self_attn", activation="act"), "what the FFN gives is not what down_proj gives"),
    ],
)
def test_wrong_paths(row, said, make_model, refusal) -> None:
    model = make_model("llama-mha")
    for layer in model.model.layers:
        layer.self_attn.act = layer.mlp.act_fn
    assert said in refusal(model, row)


def test_a_path_to_nothing_is_named(make_model, compress_small, monkeypatch) -> None:
    monkeypatch.setattr(lorap.architectures, "ARCHITECTURES", {"llama": rewired(up_proj="mlp.rise_proj")})
    with pytest.raises(lorap.ArchitectureError, match=r"model\.layers\.0\.mlp\.rise_proj does not exist"):
        compress_small(make_model("llama-gqa"))


def test_a_projection_that_is_called_twice(make_model, refusal, monkeypatch) -> None:
    model = make_model("llama-gqa")
    layer = model.model.layers[1]
    own = layer.mlp.forward
    layer.mlp.forward = lambda x: own(x) + 0 * own(x)
    layer.mlp.twice = nn.Identity()  # another structure than the first layer's
    assert "model.layers.1 is not" in (found := refusal(model, LLAMA))
    assert "is called 2 times in one forward pass, not once" in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_right_rows_pass_in_every_dtype(dtype, make_model) -> None:
    for family in ("llama-biases", "qwen3", "smollm3"):
        model = make_model(family).to(dtype)
        verify_contract(DecoderContext.of(model, device=torch.device("cpu")))


def test_only_one_layer_of_each_kind_runs(make_model) -> None:
    model = make_model("qwen3", num_hidden_layers=6)
    ran = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_args, index=index: ran.append(index))
    verify_contract(DecoderContext.of(model, device=torch.device("cpu")))
    assert [ran.count(index) for index in range(6)] == [3, 1, 1, 1, 1, 1]  # all are bypassed once


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("bitnet", "a norm between gate"),
        ("gpt_neox", "no gate"),
        ("gpt_oss", "mixtures of experts"),
        ("llama4_text", "what the router has scaled"),
        ("falcon_h1", "scales gate"),
    ],
)
def test_families_that_people_bring_are_refused_with_the_reason(model_type, why) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model(model_type, **sizes, num_key_value_heads=4, vocab_size=90, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(lorap.ArchitectureError, match=f"'{model_type}'.*{why}.*supported: llama, mistral"):
        find_architecture(model)
