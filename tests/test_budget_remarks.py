"""Whether a budget of bytes says what it removes and why, and names another choice where there is one."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from commands import last_json, run
from test_byte_budget import SMALL, dense_model
from transformers import LlamaConfig, LlamaForCausalLM

import lorap
from lorap.compression.budget_remarks import budget_remarks
from lorap.compression.byte_budget import resolve_budget
from lorap.compression.planning import plan_by_shape
from lorap.config import CompressionConfig

# Tiles of 64 rows and groups of 256 columns are whole, so that codes are as small as in a real model.
LARGER = {"hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 4, "num_key_value_heads": 2}
TCQ, LORAP, FACTORS = "--weights tcq", "--target lorap", "--storage factors"


def remark(**options: Any) -> str:
    dense, asked = dense_model(**LARGER, attention_bias=False, mlp_bias=False), CompressionConfig(**options)
    return " ".join(budget_remarks(dense, asked, resolve_budget(dense, asked)))


@pytest.mark.parametrize(
    ("options", "kind", "other"),
    [
        ({"bits_per_weight": 3.0}, "tcq3", TCQ),
        ({"bits_per_weight": 3.0, "recipe": "lorap"}, "tcq3", TCQ),
        ({"bits_per_weight": 2.0}, "tcq3", None),  # 2 bits are too many as well
        ({"bits_per_weight": 3.5, "target": "stock"}, "int4", LORAP),
        ({"bits_per_weight": 2.0, "target": "stock"}, "int4", None),
        ({"bits_per_weight": 7.0, "storage": "pivoted"}, "int8", FACTORS),
        ({"bits_per_weight": 3.5, "weights": "int4"}, "int4", None),
        ({"bits_per_weight": 2.0, "weights": "tcq"}, "tcq2", None),
    ],
    ids=str,
)
def test_what_is_removed_and_why(options: dict[str, Any], kind: str, other: str | None) -> None:
    dense = dense_model(**LARGER, attention_bias=False, mlp_bias=False)
    found = resolve_budget(dense, CompressionConfig(**options))
    said = remark(**options)
    whole = dense.planned(dense.unchanged(), CompressionConfig(**options | {"weights": kind, "bits_per_weight": 16}))
    # A width of whole groups of 64 channels is all that stock hosts take.
    total, channel = 2 * 256 * 256 + 2 * 256 * 128 + 640 * 3 * 256, 3 * 256
    width = (640 - math.ceil(found.sparsity * total / channel)) // 64 * 64
    share = (640 - width) * channel / total if found.target == "stock" else found.sparsity
    assert said.startswith(f"{share:.2%} of the compressed sub-layers is removed")
    assert f"{kind} weights" in said
    assert f"take {8 * whole / dense.weights:.4g} bits" in said
    assert f"budget has {options['bits_per_weight']:.4g}" in said
    assert [each for each in (TCQ, LORAP, FACTORS) if each in said] == ([other] if other else [])


@pytest.mark.parametrize(
    ("bits", "weights", "whole"), [(9, "int8", "int8"), (8, "int8", "int4"), (5, "int4", "int4"), (4.25, "int4", None)]
)
def test_rows_of_broken_groups_are_cut_and_keep_their_bits(bits: float, weights: str, whole: str | None) -> None:
    dense = dense_model(**LARGER | {"intermediate_size": 672}, attention_bias=False, mlp_bias=False)
    asked = CompressionConfig(bits_per_weight=bits, target="stock")
    found = resolve_budget(dense, asked)
    assert found.weights == weights
    (plan, *_) = plan_by_shape(dense, found)
    assert plan.intermediate_size == 640
    (said,) = budget_remarks(dense, asked, found)
    assert said.startswith(f"{32 * 3 / (2 * 256 + 2 * 128 + 672 * 3):.2%} of the compressed sub-layers is removed")
    assert f"the 672 inputs of down_proj are no whole groups of 64 {weights} weights" in said
    if whole is None:  # nor would they fit
        assert "--group-size" not in said
    else:
        assert f"--group-size 32 removes nothing, with more scales and {whole} weights" in said


def test_nothing_is_said_of_what_was_asked_for() -> None:
    for options in (
        {"bits_per_weight": 3.5},
        {"bits_per_weight": 3.0, "weights": "tcq"},
        {"bits_per_weight": 17, "sparsity": 0.3},
        {"sparsity": 0.3},
        {"bits_per_weight": 4.5, "target": "stock", "weights": "int4"},
        {"bits_per_weight": 9, "target": "stock"},
    ):
        assert remark(**options) == ""


def test_hosts_without_lorap_get_no_codes() -> None:
    assert "codes (tcq), which --target lorap would choose from" in remark(bits_per_weight=6, target="stock")


def test_plan_and_summary_say_it(tokenizer, small_text, tmp_path) -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=500, num_hidden_layers=1, **LARGER)).bfloat16()
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    options = ["--bits-per-weight", 3, "--recipe", "lorap", "--calibration", small_text, *SMALL]
    planned = run("plan", tmp_path / "dense", *options, "--no-time")
    assert planned.exit_code == 0, planned.output
    assert f"{TCQ} removes nothing" in planned.stdout
    assert TCQ in last_json(run("plan", tmp_path / "dense", *options, "--no-time", "--json"))["remarks"][0]
    done = run("compress", tmp_path / "dense", tmp_path / "out", *options, "--eval-text", "none", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert f"{TCQ} removes nothing" in done.stdout
    written = json.loads((tmp_path / "out" / "lorap_report.json").read_text())
    (said,) = lorap.CompressionReport.from_dict(written).decisions
    assert said in done.stdout
    config = CompressionConfig(
        recipe="lorap", bits_per_weight=3, num_calibration_samples=8, calibration_seq_len=32, weights="auto"
    )
    _, report = lorap.compress(
        str(tmp_path / "dense"), calibration=small_text, evaluation=[], progress=False, config=config
    )
    assert report.decisions == [said]
