"""Folders for vLLM's DeciLMForCausalLM: their config, as hosts read it, and their tensors. vLLM itself runs in tests/vllm."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands import run as command
from safetensors import safe_open
from test_llamacpp import cut, run
from transformers import AutoConfig

import lorap
from lorap.checkpoint.folders import read_tensors
from lorap.integrations.configuration_deci import DeciConfig

SIZES = {"hidden_size": 128, "intermediate_size": 600}


def fields(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text("utf-8"))


@pytest.mark.parametrize(("widths", "whole"), [((512, 256), True), ((512, 257), False), ((600, 600), False)])
def test_hosts_read_the_widths(widths, whole, make_model, tokenizer, tmp_path) -> None:
    """By the rule of vLLM and others: ffn_mult, or else intermediate_size, as attributes of a config that the folder explains."""
    model = cut(
        make_model("llama-gqa", **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 7e4, "factor": 2.0}),
        widths,
        (),
    )
    out = lorap.export_deci(model, tmp_path / "deci", tokenizer=tokenizer)
    config = AutoConfig.from_pretrained(out, trust_remote_code=True)
    assert (config.model_type, config.architectures) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads) == (128, 32, 2)
    assert config.rope_parameters["factor"] == 2.0
    assert fields(out)["rope_theta"] == 7e4
    for read in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(DeciConfig(**fields(out))))):
        for block, width in zip(read.block_configs, widths, strict=True):
            assert not block.attention.no_op
            assert not block.ffn.no_op
            assert block.attention.n_heads_in_group == 2
            assert hasattr(block.ffn, "ffn_mult") == whole
            found = int(2 * block.ffn.ffn_mult * 128 / 3) if whole else block.ffn.intermediate_size
            assert -(-found // 256) * 256 == width if whole else found == width
    shapes = {name: info.shape for name, info in read_tensors(out).items()}
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (128, widths[1])
    assert "lm_head.weight" not in shapes
    assert transformers.AutoTokenizer.from_pretrained(out)("A word")["input_ids"] == tokenizer("A word")["input_ids"]


@pytest.mark.parametrize(
    ("family", "biases", "expected"),
    [
        ("llama-gqa", (), (False, False, False)),
        ("llama-gqa", ("down_proj",), (False, False, True)),
        ("llama-gqa", ("o_proj",), (True, True, False)),
        ("llama-biases", (), (True, True, True)),
        ("qwen2", ("down_proj",), (False, True, True)),
    ],
)
def test_biases_are_those_of_the_class(family, biases, expected, make_model, tmp_path) -> None:
    """vLLM drops a bias that the config does not announce, without a word: each tensor has a place, and each place a tensor."""
    model = cut(make_model(family, **SIZES), (37, 64), biases)
    out = lorap.export_deci(model, tmp_path / "deci")
    config = fields(out)
    attention, qkv, mlp = (config[name] for name in ("attention_bias", "qkv_bias", "mlp_bias"))
    assert (attention, qkv, mlp) == expected
    wanted = {"q_proj": qkv, "k_proj": qkv, "v_proj": qkv, "o_proj": attention}
    wanted |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), mlp)
    found = {name.split(".")[-2] for name in read_tensors(out) if name.endswith(".bias")}
    assert found == {role for role, there in wanted.items() if there}


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("qwen3", {}, "DeciLM's graph is not that of qwen3 models; possible: llama, mistral, qwen2"),
        ("smollm3", {}, "DeciLM's graph is not that of smollm3 models"),
        ("mistral", {}, "the attention window of 8 tokens has no place"),
        ("llama-gqa", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_what_the_class_does_not_compute_is_refused(family, options, message, make_model, tmp_path) -> None:
    with pytest.raises(lorap.ArchitectureError, match=message):
        lorap.export_deci(make_model(family, **options), tmp_path / "deci")
    assert not (tmp_path / "deci").exists()


def test_the_command(make_model, compress_small, tokenizer, tokens, tmp_path) -> None:
    """From a compressed folder: the same tensors, dense, and nothing of lorap's in the config. lorap runs no code of it."""
    model, report = compress_small(make_model("llama-gqa"), recipe="best", sparsity=0.4)
    lorap.save(model, tmp_path / "small", report=report, tokenizer=tokenizer)
    told = json.loads(run("export", tmp_path / "small", tmp_path / "deci", "--format", "deci", "--quiet", "--json"))
    out = tmp_path / "deci"
    blocks = [block["ffn"]["intermediate_size"] for block in fields(out)["block_configs"]]
    assert blocks == told["intermediate_sizes"] == [layer.mlp.down_proj.in_features for layer in model.model.layers]
    assert not {"quantization_config", "layer_types"} & fields(out).keys()
    assert fields(out)["hidden_act"] == "silu"
    expected = lorap.reconstruct(model).state_dict()
    with safe_open(out / "model.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(name), expected[name]) for name in file.keys())  # noqa: SIM118
    card = (out / "README.md").read_text("utf-8")
    assert "--trust-remote-code" in card
    assert "import lorap" not in card
    (out / "configuration_deci.py").write_text("raise SystemExit('code of a folder was run')")
    for words in (["info", out], ["export", out, tmp_path / "again"]):
        refused = command(*words)
        assert refused.exit_code == 2
        assert "nemotron-nas" in refused.stderr
        assert "Traceback" not in refused.output
