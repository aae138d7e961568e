"""A budget of bytes: which weights and which sparsity follow, and that what is saved takes no more and hardly less."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import assert_refused, last_json, run
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import lorap
from lorap.architectures import find_architecture
from lorap.checkpoint.folders import read_tensors
from lorap.checkpoint.load import find_model
from lorap.compression.byte_budget import resolve_budget
from lorap.compression.planning import plan_by_shape
from lorap.compression.stored_bytes import DenseModel
from lorap.config import CompressionConfig
from lorap.errors import ConfigError
from lorap.evaluation.info import describe_model, format_info

SMALL = ["--num-calibration-samples", "8", "--calibration-seq-len", "32"]
# Sizes that no group, word or multiple divides.
ODD = {"hidden_size": 60, "intermediate_size": 101, "num_attention_heads": 3, "num_key_value_heads": 1}
BY_SHAPE = [
    {"recipe": "lorap"},
    {"recipe": "svd-llm", "weights": "int8"},
    {"recipe": "lorap", "target": "stock", "width_multiple": 1},
    {"recipe": "lorap", "weights": "float", "storage": "pivoted"},
    {"recipe": "lorap", "weights": "int4", "sublayers": ("mlp",), "bias_compensation": True},
]


def stored_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in read_tensors(folder).values())


def dense_model(dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> DenseModel:
    options = {"vocab_size": 500, "num_hidden_layers": 3, "attention_bias": True, "mlp_bias": True} | ODD | sizes
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**options)).to(dtype)
    model.tie_weights()
    return DenseModel.of(model, find_architecture(model))


@pytest.mark.parametrize("options", BY_SHAPE, ids=str)
def test_where_shapes_decide_one_step_less_of_sparsity_would_be_too_large(options: dict[str, Any]) -> None:
    dense = dense_model()
    for bits in (2.9, 3.3, 7.2, 14.0):
        try:
            found = resolve_budget(dense, CompressionConfig(bits_per_weight=bits, **options))
        except ConfigError:
            assert bits < 8
            assert "weights" in options or "target" in options
            continue
        budget = dense.projection_budget(found)
        assert budget == int(bits * dense.weights / 8)
        plans = [plan_by_shape(dense, replace(found, sparsity=s)) if s else None for s in (found.sparsity, 0.0)]
        sizes = [dense.planned(plan or dense.unchanged(), found) for plan in plans]
        assert sizes[0] <= budget
        if found.sparsity:
            more = replace(found, sparsity=found.sparsity - 2**-20)
            assert dense.planned(plan_by_shape(dense, more), found) > budget
            assert sizes[1] > budget


def test_bits_go_before_sparsity() -> None:
    """The most bits that fit without any; below the fewest the rest is sparsity, counted in bytes."""
    dense = dense_model()
    whole = {}
    for weights in ("float", "int8", "int4"):
        plain = CompressionConfig(weights=weights, sparsity=0.0)
        whole[weights] = dense.planned(dense.unchanged(), plain) + dense.other_bytes
    assert whole["float"] > whole["int8"] > whole["int4"]
    for weights, size in whole.items():
        asked = "mixed" if weights == "int4" else "auto"  # which takes codes of more bits
        found = resolve_budget(dense, CompressionConfig(size=size, weights=asked))
        assert (found.weights, found.sparsity) == (weights, 0.0)
    for size, weights in ((whole["int8"] - 1, "mixed"), (whole["int4"] + 1, "int4")):
        for asked in ("auto", "mixed")[weights == "int4" :]:
            found = resolve_budget(dense, CompressionConfig(size=size, weights=asked))
            assert (found.weights, found.sparsity) == (weights, 0.0)
            assert resolve_budget(dense, found) == found
        for other in ({"storage": "pivoted"}, {"sparsity": 0.3}):
            assert resolve_budget(dense, CompressionConfig(size=whole["int8"] - 1, **other)).weights == "int8"
    for recipe, weights in (("lorap", "int4"), ("best", "mixed")):  # there ranks follow from shapes, here from the loss
        sized = CompressionConfig(recipe=recipe, size=whole["int4"] - 1, weights="int4")
        assert resolve_budget(dense, sized).weights == "int4"
        found = resolve_budget(dense, CompressionConfig(recipe=recipe, size=whole["int4"] - 1, weights="mixed"))
        assert found.weights == weights
    assert 0 < found.sparsity < 1e-4
    half = dense.compressible(found, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")) // 2
    found = resolve_budget(dense, CompressionConfig(size=whole["int4"] - half, weights="mixed"))
    assert found.sparsity == pytest.approx(0.5, abs=1e-4)
    assert resolve_budget(dense, found) == found
    assert resolve_budget(dense, CompressionConfig(size=whole["float"], sparsity=0.3)).sparsity == 0.3
    assert resolve_budget(dense, CompressionConfig(sparsity=0.3)) == CompressionConfig(sparsity=0.3)


@pytest.mark.parametrize("family", ["llama-gqa", "llama-biases"])
def test_all_else_is_what_the_files_hold(family, make_model, tmp_path) -> None:
    """Tied heads once, buffers that are saved, and what has a dtype of its own."""
    model = make_model(family, **ODD | {"head_dim": 20}).bfloat16()
    model.model.norm.float()
    model.register_buffer("kept", torch.ones(7, dtype=torch.int64))
    found = DenseModel.of(model, find_architecture(model))
    model.save_pretrained(tmp_path)
    stored = read_tensors(tmp_path)
    assert found.other_bytes == sum(info.nbytes for name, info in stored.items() if "_proj." not in name)
    everything = found.other_bytes + found.planned(found.unchanged(), CompressionConfig(weights="float"))
    assert everything == stored_bytes(tmp_path)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama-biases", {"recipe": "best", "bits_per_weight": 3.7, "weights": "int4"}),
        ("qwen2", {"recipe": "best", "bits_per_weight": 17.5, "weights": "float", "bias_compensation": True}),
        ("llama-gqa", {"recipe": "best", "bits_per_weight": 7.0, "weights": "int8", "shapes": "uniform"}),
        ("llama-wide-heads", {"recipe": "lorap", "bits_per_weight": 3.7, "sparsity": 0.1, "weights": "int4"}),
        ("llama-biases", {"recipe": "best", "target": "stock", "bits_per_weight": 20.0, "width_multiple": 1}),
    ],
    ids=str,
)
def test_what_is_saved_meets_the_budget_and_uses_it(family, options, make_model, compress_small, tmp_path) -> None:
    head = {"head_dim": 24} if family == "llama-wide-heads" else {"head_dim": 20}
    options = {"sparsity": None, "correction_steps": 0, "rank_multiple": 1, "width_multiple": 1} | options
    model, report = compress_small(make_model(family, **ODD | head), **options)
    lorap.save(model, tmp_path, report=report)
    found = describe_model(find_model(tmp_path))
    assert found["bits_per_dense_weight"] <= options["bits_per_weight"]
    assert found["bits_per_dense_weight"] > 0.985 * options["bits_per_weight"]
    assert f"{found['bits_per_dense_weight']:.2f} bits on disk for each weight" in format_info(found)
    config = report.config
    assert config.sparsity > 0
    assert config.weights == options.get("weights", "float")
    size = stored_bytes(tmp_path)
    assert found["bytes"] == size
    assert lorap.CompressionReport.from_dict(report.to_dict()).config == config

    # As many bytes asked for as a size: what is saved again is the same.
    if family == "llama-biases":
        options |= {"bits_per_weight": None, "size": size}
        again, report = compress_small(make_model(family, **ODD | head), **options)
        lorap.save(again, tmp_path / "again", report=report)
        assert stored_bytes(tmp_path / "again") <= size
        report.config = replace(report.config, size=size - 1000)
        with pytest.raises(lorap.CheckpointError, match=f"more than the {size - 1000:,} that were asked for"):
            lorap.save(again, tmp_path / "refused", report=report)


def test_at_the_size_of_plain_quantization_it_is_plain_quantization(make_model, compress_small, tmp_path) -> None:
    """So at no such size it is worse, and all of the text serves the rounding."""
    model, report = compress_small(make_model("qwen2", **ODD), sparsity=0.0, weights="int4", recipe="best")
    lorap.save(model, tmp_path / "plain", report=report)
    size = stored_bytes(tmp_path / "plain")
    budget = {"sparsity": None, "size": size, "weights": "mixed"}
    model, report = compress_small(make_model("qwen2", **ODD), recipe="best", **budget)
    lorap.save(model, tmp_path / "sized", report=report)
    plain, sized = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "sized"))
    assert plain.keys() == sized.keys()
    assert all(torch.equal(plain[name], sized[name]) for name in plain)


def test_both_commands_tell_the_same_and_refuse_the_same(model_folder, small_text, tmp_path) -> None:
    options = ["--recipe", "lorap", *SMALL, "--calibration", small_text, "--eval-text", "none", "--dtype", "bfloat16"]
    dense = last_json(run("plan", model_folder, *options, "--sparsity", 0, "--no-time", "--json"))["bytes"]
    size = dense // 2 // 1000 * 1000
    sized = [*options, "--size", f"{size / 1000:g}kB", "--weights", "int4"]
    planned = last_json(run("plan", model_folder, *sized, "--no-time", "--json"))
    done = last_json(run("compress", model_folder, tmp_path / "out", *sized, "--quiet", "--json"))
    assert planned["config"] == done["config"]
    assert (done["config"]["size"], done["config"]["weights"]) == (size, "int4")
    assert planned["bytes"] == stored_bytes(tmp_path / "out") <= size
    shown = run("plan", model_folder, *sized, "--no-time").stdout
    assert f"a size of {size:,} bytes" in shown
    assert f"that follows from a size of {size:,} bytes" in (tmp_path / "out" / "README.md").read_text()
    for command in (["plan", model_folder], ["compress", model_folder, tmp_path / "no"]):
        for asked, words in (
            (["--size", "1kB"], "1,000 cannot be reached: with tcq3 weights and the smallest ranks and widths"),
            (["--bits-per-weight", 0.01, "--weights", "int8"], "0.01 cannot be reached: with int8"),
        ):
            refused = run(*command, *options, *asked)
            assert_refused(refused, words)
    least = float(refused.stderr.split("model takes ")[1].split(",")[0])
    options += ["--weights", "int8"]
    assert run("plan", model_folder, *options, "--no-time", "--bits-per-weight", 1.002 * least).exit_code == 0
    assert_refused(run("plan", model_folder, *options, "--bits-per-weight", 0.998 * least), "cannot be reached")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "1GB", "bits_per_weight": 3}, "two budgets of bytes; give one"),
        ({"weights": "auto"}, "weights auto follow from a budget of bytes; give size or bits_per_weight"),
        ({"recipe": "flap", "size": "1GB"}, "use allocation loss, even or paper"),
        ({"size": 0}, "size should be greater than or equal to 1 and is 0"),
        ({"size": "much"}, "'much' is no size"),
        ({"bits_per_weight": float("nan")}, "bits_per_weight"),
        ({"bits_per_weight": 0}, "bits_per_weight should be greater than 0 and is 0"),
        ({"size": 10**9, "weights": "int4", "storage": "pivoted"}, "too coarse for pivoted storage"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompressionConfig(**options)
