"""What older hosts look for in config.json and tokenizer_config.json is there, and changes nothing in newer ones.

Whether they read it right is asked of themselves in tests/hosts.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from commands import run
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorap

THETA = 123456.0
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"short_factor": [1.0, 1.5] * 4, "long_factor": [3.0, 5.0] * 4, "original_max_position_embeddings": 64}
ROPES = {
    "default": {},
    "linear": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": LLAMA3,
    "longrope": LONGROPE,
}


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text("utf-8"))


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_positions_are_told_in_old_and_new_keys(kind, make_model, tokens, tmp_path) -> None:
    model = make_model("llama-mha", rope_parameters={"rope_type": kind, "rope_theta": THETA} | ROPES[kind])
    rope = copy.deepcopy(model.config.rope_parameters)
    with torch.no_grad():
        expected = model(tokens).logits
    out = lorap.export_stock(model, tmp_path / "plain")
    config = config_of(out)
    assert config["rope_theta"] == THETA
    if kind == "default":
        assert "rope_scaling" not in config
    else:
        assert config["rope_scaling"] == ROPES[kind] | {"rope_type": kind, "type": kind}
    # There, longrope's scale of attention is max_position_embeddings over this.
    assert config.get("original_max_position_embeddings") == (64 if kind == "longrope" else None)
    opened = AutoModelForCausalLM.from_pretrained(out)
    assert {key: value for key, value in opened.config.rope_parameters.items() if key != "type"} == rope
    with torch.no_grad():
        assert torch.equal(opened(tokens).logits, expected)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "smollm3"])
def test_every_family_and_the_folders_of_lorap_too(family, make_model, compress_small, tokens, tmp_path) -> None:
    model, report = compress_small(make_model(family, rope_parameters={"rope_type": "default", "rope_theta": THETA}))
    out = lorap.save(model, tmp_path / "small", report=report)
    assert config_of(out)["rope_theta"] == THETA
    assert config_of(out)["torch_dtype"] == config_of(out)["dtype"] == "float32"
    opened = AutoModelForCausalLM.from_pretrained(out)
    assert opened.config.rope_parameters == {"rope_type": "default", "rope_theta": THETA}
    with torch.no_grad():
        assert torch.equal(opened(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2", "mistral"])
def test_the_tokenizer_has_a_name_that_both_versions_know(family, make_model, tokenizer, tmp_path) -> None:
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": [AddedToken("<|turn|>", special=True)]})
    own.chat_template = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}"
    model = make_model(family, vocab_size=len(own))
    own.save_pretrained(tmp_path / "before")
    model.config.save_pretrained(tmp_path / "before")
    out = lorap.export_stock(model, tmp_path / "plain", tokenizer=own)
    written = json.loads((out / "tokenizer_config.json").read_text("utf-8"))
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|turn|>"]
    assert "extra_special_tokens" not in written  # a list there is an error in transformers 4
    before, after = AutoTokenizer.from_pretrained(tmp_path / "before"), AutoTokenizer.from_pretrained(out)
    text = "<|turn|>Naïve 1234 tokens<eos>\n\n  and  spaces"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.all_special_ids == before.all_special_ids
    assert after.chat_template == own.chat_template


def test_a_run_from_files_to_files_writes_them(make_model, tokenizer, small_text, tmp_path) -> None:
    make_model("llama-gqa", rope_parameters={"rope_type": "llama3", "rope_theta": THETA} | LLAMA3).save_pretrained(
        tmp_path / "model"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    options = ["--target", "stock", "--calibration", small_text, "--recipe", "lorap", "--sparsity", "0.2"]
    options += ["--num-calibration-samples", "4", "--calibration-seq-len", "32", "--quiet"]
    result = run("compress", tmp_path / "model", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert config_of(tmp_path / "out")["rope_theta"] == THETA
    assert config_of(tmp_path / "out")["rope_scaling"] == LLAMA3 | {"rope_type": "llama3", "type": "llama3"}
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text("utf-8"))
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
