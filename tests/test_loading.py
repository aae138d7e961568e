"""A folder is opened only where config.json and the files describe one model, and nothing in it runs or leads elsewhere.

Proved here: absurd sizes are refused before anything is built; shapes are compared before anything is allocated; adapters, code,
hub kernels and other files that config.json names are refused; and no valid folder is, whatever its family. More of the same, by
chance: tests/fuzz.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import lorap
from lorap.architectures import find_architecture
from lorap.checkpoint import validate
from lorap.checkpoint.folders import WEIGHTS
from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.load import find_model, load_model
from lorap.errors import ArchitectureError, CheckpointError, LoRAPError
from lorap.evaluation.info import describe_model

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def dense(make_model: Callable[..., Any], tmp_path: Path) -> Path:
    """A saved llama with tied embeddings."""
    make_model("llama-gqa").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def small(make_model: Callable[..., Any], compress_small: Callable[..., Any], tmp_path: Path) -> Path:
    """A compressed llama."""
    model, report = compress_small(make_model("llama-gqa"))
    return lorap.save(model, tmp_path / "small", report=report)


def edit(folder: Path, **change: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


def edit_marks(folder: Path, **change: Any) -> Path:
    return edit(
        folder, quantization_config=json.loads((folder / "config.json").read_text())["quantization_config"] | change
    )


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_model(find_model(folder))
    return str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# What is valid stays valid


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_opens_dense_and_compressed(family, make_model, compress_small, tmp_path):
    make_model(family).save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    model, report = compress_small(make_model(family))
    lorap.save(model, tmp_path / "small", report=report, max_shard_size="60KB")
    for folder in (tmp_path / "dense", tmp_path / "small"):
        assert (folder / "model.safetensors.index.json").exists()
        ours, theirs = load_model(find_model(folder)), AutoModelForCausalLM.from_pretrained(folder)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(
            torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        )


SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SIZES |= {
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GPT = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048}
MAMBA = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
DEEPSEEK = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK |= {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 8}
# What only `lorap eval` opens: fused and converted weights, experts, learned positions, states, masks that are computed.
OTHERS = {
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 8},
    "gpt_neox": SIZES,
    "opt": SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "bloom": {"vocab_size": 300, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "falcon": SIZES,
    "gemma2": SIZES | {"head_dim": 16},
    "gemma3_text": SIZES | {"head_dim": 16},
    "mixtral": SIZES | {"num_local_experts": 4},
    "qwen3_moe": SIZES | {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    "deepseek_v3": SIZES | DEEPSEEK,
    "gpt_oss": SIZES | {"num_local_experts": 4, "head_dim": 16},
    "mamba": MAMBA,
    "mamba2": MAMBA | {"head_dim": 16, "num_heads": 8, "n_groups": 2},
    "ministral": SIZES | {"head_dim": 16},
}


def test_a_family_without_a_row_is_refused_by_its_class_whatever_its_config_says():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **GPT))
    model.config.architectures = [-1]
    with pytest.raises(ArchitectureError, match=r"'gpt2' \(GPT2LMHeadModel\)"):
        find_architecture(model)


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_families_open_as_well(model_type, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **OTHERS[model_type]))
    model.save_pretrained(tmp_path)
    assert describe_model(find_model(tmp_path))["model_type"] == model_type
    found = load_model(find_model(tmp_path)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_infinity_in_a_config_of_mamba_2_is_no_damage(tmp_path):
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba2", **OTHERS["mamba2"])).save_pretrained(tmp_path)
    edit(tmp_path, time_step_limit=[0.0, float("inf")])
    assert "Infinity" in (tmp_path / "config.json").read_text()
    assert load_model(find_model(tmp_path)).config.time_step_limit[1] == float("inf")


def test_a_model_saved_without_its_tied_head_opens(make_model, tmp_path):
    model = make_model("llama-gqa")
    model.model.save_pretrained(tmp_path)
    edit(tmp_path, architectures=["LlamaForCausalLM"])
    assert torch.equal(load_model(find_model(tmp_path)).lm_head.weight, model.lm_head.weight)


# ----------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, but the files hold"),
        ("num_hidden_layers", 10**30, "num_hidden_layers is 1000000000000000000000000000000, but"),
        ("num_hidden_layers", 3, "num_hidden_layers is 3, but the files hold 2 layers"),
        ("num_hidden_layers", True, "num_hidden_layers is True, but the files hold 2 layers"),
        ("num_hidden_layers", 2.0, "num_hidden_layers is 2.0, but the files hold 2 layers"),
        ("num_labels", 10**9, "num_labels is 1000000000, but"),
        (
            "vocab_size",
            10**12,
            "embed_tokens.weight has the shape (500, 64), but config.json makes it (1000000000000, 64)",
        ),
        ("vocab_size", 499, "embed_tokens.weight has the shape (500, 64), but config.json makes it (499, 64)"),
        ("vocab_size", 10**30, "cannot open "),
        ("hidden_act", "nope", "transformers makes no model of its config.json: KeyError 'nope'"),
        ("num_attention_heads", 0, "transformers makes no model of its config.json: ZeroDivisionError"),
        ("hidden_size", 10**9, "has the shape (500, 64), but config.json makes it (500, 1000000000)"),
        ("hidden_size", 0, "has the shape (500, 64), but config.json makes it (500, 0)"),
        ("hidden_size", -64, "cannot open "),
        (
            "intermediate_size",
            10**12,
            "gate_proj.weight has the shape (100, 64), but config.json makes it (1000000000000, 64)",
        ),
        ("head_dim", 10**9, "q_proj.weight has the shape (64, 64), but config.json makes it (4000000000, 64)"),
        ("num_key_value_heads", 4, "k_proj.weight has the shape (32, 64), but config.json makes it (64, 64)"),
        ("attention_bias", True, "incomplete: 8 tensors are missing, first model.layers.0.self_attn.q_proj.bias"),
        ("tie_word_embeddings", False, "incomplete: 1 tensors are missing, first lm_head.weight"),
        (
            "rope_parameters",
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 1e9},
            "computed numbers",
        ),
        ("rms_norm_eps", float("nan"), "is not valid JSON: it contains NaN"),
        ("dtype", "load", "cannot open "),
        ("model_type", ["llama"], "model_type is ['llama'], not a string"),
        ("quantization_config", [1], "quantization_config is [1], not an object"),
        ("quantization_config", {"quant_method": ["lorap"]}, "quant_method is ['lorap'], not a string"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_at_once(field, value, message, dense):
    edit(dense, **{field: value})
    start = time.monotonic()
    assert message in refusal(dense)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("nested", [False, True])
def test_absurd_numbers_are_refused_in_other_families_before_anything_is_built(nested, monkeypatch, tmp_path):
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **GPT)).save_pretrained(tmp_path)
    monkeypatch.setattr(validate, "empty_model", lambda _folder: pytest.fail("it was built"))
    edit(tmp_path, **({"text_config": {"depth": 10**9}} if nested else {"n_layer": 10**9}))
    assert "is 1000000000, but the files hold" in refusal(tmp_path)


@pytest.mark.parametrize("field", ["vocab_size", "n_embd", "n_positions", "n_inner"])
def test_absurd_sizes_of_other_families_are_refused_before_they_are_allocated(field, monkeypatch, tmp_path):
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **GPT)).save_pretrained(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    edit(tmp_path, **{field: 10**8})
    assert "parameters and" in refusal(tmp_path)


def test_more_layers_in_the_files_than_in_the_config_are_refused(dense):
    edit_weights(dense, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(100, 64)}))
    assert "num_hidden_layers is 2, but the files hold 3 layers" in refusal(dense)


# ----------------------------------------------------------------------------------------------------------------------
# Low-rank layers


@pytest.mark.parametrize(
    "bad",
    [True, 3.0, "3", -3, 0, None, [3], {"a": 3}, 2**31, 10**30, float("nan")],
    ids=repr,
)
def test_a_rank_or_width_that_is_no_size_is_refused(bad):
    for fields in ({"ranks": {"q": bad}}, {"intermediate_sizes": {"q": bad}}):
        with pytest.raises(
            CheckpointError, match=r"quantization_config\.(ranks|intermediate_sizes)\.q should be .* and is "
        ):
            LoRAPConfig(**fields)
    if bad is not None:
        with pytest.raises(CheckpointError, match=r"dense_intermediate_size should be .* and is "):
            LoRAPConfig(dense_intermediate_size=bad)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": True}, "format version True and this lorap reads 1 to 8"),
        ({"format_version": 1.0}, "format version 1.0 and"),
        ({"format_version": "1"}, "format version '1' and"),
        ({"format_version": [1]}, r"format version \[1\] and"),
        ({"format_version": 10**30}, "format version 1000000000000000000000000000000 and"),
        ({"storage": ["factors"]}, r"storage should be 'factors' or 'pivoted' and is \['factors'\]"),
        (
            {"weights": None},
            "weights should be 'float', 'int8', 'int4', 'tcq2', 'tcq3', 'tcq4', 'tcq5' or 'tcq6' and is None",
        ),
        ({"quant_method": "other"}, "quant_method should be 'lorap' and is 'other'"),
        ({"ranks": [["q", 3]]}, r"ranks should be .* and is \[\['q', 3\]\]"),
        ({"biases": ["q", "q"]}, r"biases has a name twice: \['q', 'q'\]"),
        ({"biases": [3]}, r"biases\[0\] should be a valid string and is 3"),
        ({"sparsity": float("nan")}, "sparsity should be a finite number and is nan"),
        ({"sparsity": True}, "sparsity should be a valid number and is True"),
        ({"recipe": 3}, "recipe should be a valid string and is 3"),
        ({"self": 1}, "quantization_config.self is an unknown entry"),
        ({"x\n\x1b": 1}, r"quantization_config.'x\\n\\x1b' is an unknown entry"),
        ({"ranks": {"q": 10**5000}}, "quantization_config is no JSON: Exceeds the limit"),
        ({"ranks": {"q": {1, 2}}}, "quantization_config is no JSON: .* set"),
    ],
)
def test_a_field_of_the_wrong_type_is_refused(fields, message):
    with pytest.raises(CheckpointError, match=message):
        LoRAPConfig(**fields)


def _move(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{Q}.weight": torch.zeros(64, 64)}), rf"{Q}.weight has the shape (64, 64), but"),
        (lambda t: t.update({f"{Q}.right.weight": torch.zeros(3, 64)}), f"{Q}.right.weight has the shape (3, 64), but"),
        (
            lambda t: t.update({f"{Q}.left.weight": t[f"{Q}.left.weight"][1:].clone()}),
            f"{Q}.left.weight has the shape (63,",
        ),
        (lambda t: t.update({"model.layers.1.mlp.up_proj.right.weight": torch.zeros(3, 64)}), "names no such layer"),
        (
            lambda t: t.update({f"{Q}.pivot_rows": torch.arange(3)}),
            f"{Q}.pivot_rows, but its quantization_config names no",
        ),
        (lambda t: t.pop(f"{Q}.weight"), f"missing, first {Q}.weight"),
        (lambda t: _move(t, f"{Q}.right.weight", f"{Q}.right.right.weight"), f"missing, first {Q}.right.weight"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(7, 64)}),
            "up_proj.weight has the shape (7, 64)",
        ),
    ],
    ids=[
        "dense-twin",
        "other-rank",
        "other-rows",
        "unnamed-factor",
        "unnamed-pivots",
        "no-guard",
        "renamed",
        "other-width",
    ],
)
def test_tensors_that_do_not_fit_the_marks_are_refused_by_lorap_and_by_the_plug_in(change, message, small):
    edit_weights(small, change)
    assert message in refusal(small)
    with pytest.raises((LoRAPError, RuntimeError)) as error:
        AutoModelForCausalLM.from_pretrained(small)
    assert message in str(error.value) or "mismatched" in str(error.value)


def test_a_factor_is_no_layer_of_the_dense_model(small):
    ranks = json.loads((small / "config.json").read_text())["quantization_config"]["ranks"]
    edit_marks(small, ranks=ranks | {f"{Q}.right": 2})
    assert f"quantization_config names {Q}.right, but the model has no such layer" in refusal(small)


@pytest.mark.parametrize(
    "name", ["", "base_model.layers.0.self_attn.k_proj", "model.config", "model.layers.-1.mlp", "lm_head.weight"]
)
def test_a_name_is_a_name_of_the_model_itself(name, small):
    for field in ("ranks", "intermediate_sizes"):
        edit_marks(small, ranks={}, intermediate_sizes={}) if field == "ranks" else edit_marks(small, ranks={})
        edit_marks(small, **{field: {name: 4}})
        assert "quantization_config names" in refusal(small)


def test_the_marks_may_not_be_taken_away(small):
    config = json.loads((small / "config.json").read_text())
    del config["quantization_config"]
    (small / "config.json").write_text(json.dumps(config))
    assert "weight has the shape (1,), but config.json makes it (64, 64)" in refusal(small)


def test_int8_of_a_family_that_lorap_does_not_know_is_refused(tmp_path):
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **GPT)).save_pretrained(tmp_path)
    edit(tmp_path, quantization_config={"quant_method": "lorap", "weights": "int8", "format_version": 3})
    assert "int8 weights in a model of type gpt2, which lorap does not know" in refusal(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Code and files from elsewhere


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize(
    "value", ["some/kernel", {"": "some/kernel@main:name"}, "flash_attention_2", "paged|some/kernel", ["x"]]
)
@pytest.mark.parametrize("nested", [False, True])
def test_kernels_from_the_hub_are_refused(field, value, nested, dense):
    edit(dense, **({"text_config": {field: value}} if nested else {field: value}))
    assert f"{field} is" in refusal(dense)


def test_attention_that_transformers_has_itself_is_no_code(dense):
    edit(dense, attn_implementation="eager", experts_implementation="batched_mm")
    assert load_model(find_model(dense)).config._attn_implementation == "eager"


@pytest.mark.parametrize("field", ["transformers_weights", "configuration_files"])
def test_other_files_are_refused(field, dense):
    edit(dense, **{field: ["config.4.0.0.json"]})
    assert f"{field} names other files than lorap checks" in refusal(dense)


@pytest.mark.parametrize("values", [{"1": {"skip": ["mlp"]}}, {"0": {"intermediate_size": 37}}, 3])
def test_values_by_layer_are_refused(values, dense):
    """transformers 5.24 takes the first and computes the FFN all the same."""
    edit(dense, per_layer_config=values)
    assert "per_layer_config is " in refusal(dense)
    assert "start from the dense model" in refusal(dense)


def test_a_distributed_checkpoint_beside_the_weights_is_refused(dense):
    """transformers would read it instead of what was checked."""
    save_file({"a": torch.zeros(1)}, dense / "shard-00001-model-00001-of-00001.safetensors")
    assert "holds a distributed checkpoint beside its weights" in refusal(dense)


def test_code_of_a_hub_model_is_refused_before_its_weights_are_read(dense, monkeypatch):
    edit(dense, model_type="evil", auto_map={"AutoModelForCausalLM": "evil.Model"})
    monkeypatch.setattr("lorap.checkpoint.load.snapshot_download", lambda _name, **_: str(dense))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("fetched"))
    with pytest.raises(CheckpointError, match="needs code from its own folder"):
        load_model(find_model("some/model"))


@pytest.mark.parametrize(
    "model", ["~no-such-user/model", "x" * 5000, "a\0b", "/\ud800", "a\nb"], ids=["user", "long", "nul", "half", "line"]
)
def test_a_name_that_no_file_can_have_is_refused(model):
    with pytest.raises(CheckpointError) as error:
        find_model(model)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


def test_whatever_transformers_raises_is_a_checkpoint_error_with_its_cause(dense, monkeypatch):
    def stumble(*_: Any, **__: Any) -> None:
        raise AssertionError("line one\n\x1b[2Jline two" + "x" * 1000)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", stumble)
    with pytest.raises(CheckpointError, match=r"^cannot load dense: line one \?\[2Jline two") as error:
        load_model(find_model(dense))
    assert isinstance(error.value.__cause__, AssertionError)
    assert len(str(error.value)) < 400
