"""What a run tells: rounding errors worth a line, stages, and a method text that follows the choices, not the recipe's name."""

from __future__ import annotations

import math
import re

import pytest
import torch

import lorap
from lorap.card import method_text, model_card
from lorap.config import CHOICES, RECIPES
from lorap.report import CompressionReport, ProjectionReport, compressed_roles, storage_lines

CALIBRATION = {"name": "a text", "windows": 3, "seq_len": 100, "tokens": 300, "sha256": "ab" * 32}


def projection(layer: int, role: str, storage_error: float = 0.0, *, rank: int | None = 7) -> ProjectionReport:
    return ProjectionReport(
        layer=layer,
        role=role,
        shape_before=(63, 100),
        shape_after=(63, 100),
        rank=rank,
        params_before=6300,
        params_after=6300 if rank is None else rank * 163,
        error=0.25,
        storage_error=storage_error,
    )


def report(*errors: float, dtype: str = "bfloat16", **options: object) -> CompressionReport:
    """A run in which layer i had a q_proj with the i-th storage error."""
    return CompressionReport(
        model="some/model",
        config=lorap.CompressionConfig(**options),
        calibration=CALIBRATION,
        projections=[projection(layer, "q_proj", error) for layer, error in enumerate(errors)],
        params_total_before=10_000,
        params_saved=5_000,
        environment={"dtype": dtype},
    )


# ----------------------------------------------------------------------------------------------------------------------
# The table


@pytest.mark.parametrize(
    ("errors", "line"),
    [
        (
            (0.001, 0.00234, 0.002),
            "storing the factors in bfloat16 adds at most 0.0023 relative error (layer 1, q_proj)",
        ),
        ((1.2e-6,), "storing the factors in bfloat16 adds at most 1.2e-06 relative error (layer 0, q_proj)"),
        ((0.0, math.inf), "storing the factors in bfloat16 adds at most inf relative error (layer 1, q_proj)"),
        ((0.1, math.nan, 0.2), "storing the factors in bfloat16 adds at most nan relative error (layer 1, q_proj)"),
    ],
    ids=["largest", "just-above", "overflow", "not-a-number"],
)
def test_storage_error_has_one_line_that_names_the_worst(errors, line):
    found = report(*errors)
    assert storage_lines(found) == [line]
    assert found.table().splitlines().count(line) == 1


def test_storage_error_names_role_and_dtype():
    found = report(1e-5, dtype="float16")
    found.projections.append(projection(0, "o_proj", 2e-5))
    assert storage_lines(found) == [
        "storing the factors in float16 adds at most 2e-05 relative error (layer 0, o_proj)"
    ]


@pytest.mark.parametrize("errors", [(), (0.0,), (1e-6, 3e-8)], ids=["nothing", "dense", "float32"])
def test_storage_error_next_to_nothing_has_no_line(errors):
    assert storage_lines(report(*errors)) == []
    if errors:
        assert "storing" not in report(*errors).table()


@pytest.mark.parametrize(("dtype", "told"), [("float32", False), ("bfloat16", True)])
def test_storage_error_of_a_real_run(dtype, told, make_model, compress_small):
    _, found = compress_small(make_model("llama-gqa").to(getattr(torch, dtype)), storage="pivoted")
    worst = max(entry.storage_error for entry in found.projections)
    # bfloat16 keeps 8 bits: 2^-9 per number at most, and a sum over a rank is no worse in this norm than a few of them.
    assert (1e-4 < worst < 2e-2) if told else (0 < worst < 1e-6)
    (line,) = [line for line in found.table().splitlines() if line.startswith("storing the factors")] or [None]
    assert (line is not None) == told
    if told:
        number = float(re.search(r"at most (\S+) relative", line)[1])
        assert number == pytest.approx(worst, rel=0.06)


def test_table_tells_the_seconds_of_every_stage(make_model, compress_small):
    _, found = compress_small(make_model("llama-gqa"))
    (line,) = [line for line in found.table().splitlines() if line.startswith("seconds: ")]
    stages = dict(part.rsplit(" ", 1) for part in line.removeprefix("seconds: ").split(", "))
    assert list(stages) == list(found.seconds)
    assert {"plan", "calibrate", "factorize", "prune"} <= set(stages)
    assert {stage: float(seconds) for stage, seconds in stages.items()} == {
        stage: pytest.approx(seconds, abs=0.051) for stage, seconds in found.seconds.items()
    }
    assert found.seconds["plan"] > 0


# ----------------------------------------------------------------------------------------------------------------------
# The method of the model card


def link(paper: str) -> str:
    return f"[arXiv {paper}](https://arxiv.org/abs/{paper})"


TEXTS = {
    "best": (
        f"Attention projections became low-rank factor pairs, weighted by the second moment of their inputs "
        f"({link('2403.07378')}), stored as rows and coefficients ({link('2501.19090')}). "
        "FFN channels were pruned: those that add most to the output stayed. "
        "The down projections were refitted by least squares to the output of all channels. "
        "Ranks and widths of all layers shared one budget, priced by the gradients of the loss. "
        "Errors of outputs were weighted by the gradients of the loss. Nothing was trained."
    ),
    "lorap": (
        f"Attention projections became low-rank factor pairs, weighted by the norms of their input channels "
        f"({link('2404.09695')}). "
        f"FFN channels were pruned: those of largest activation-weighted norms stayed ({link('2404.09695')}). "
        f"Every layer kept the same share, v and o counting 3 times as much as q and k ({link('2404.09695')}). "
        "Nothing was trained."
    ),
    "svd-llm": (
        f"Attention and FFN projections became low-rank factor pairs, weighted by the second moment of their inputs "
        f"({link('2403.07378')}). Every matrix kept the same share. Nothing was trained."
    ),
    "flap": (
        f"FFN channels were pruned: those whose output varies most stayed ({link('2312.11983')}). "
        f"The mean output of the channels that went is now a bias ({link('2312.11983')}). "
        f"Attention stayed dense, and one threshold cut the FFNs of all layers ({link('2312.11983')}). Nothing was trained."
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_method_of_each_recipe(recipe):
    assert method_text(lorap.CompressionConfig(recipe=recipe)) == TEXTS[recipe]


def test_method_follows_the_choices_and_not_the_name():
    for recipe, choices in RECIPES.items():
        for name in RECIPES:
            assert method_text(lorap.CompressionConfig(recipe=name, **choices)) == TEXTS[recipe]


def test_every_choice_can_be_told():
    """No placeholder is left, and each way of doing it reads differently."""
    told = {"allocation": ["paper", "even", "loss"], "attention_method": CHOICES["attention_method"]}
    told |= {"channel_score": CHOICES["channel_score"], "storage": CHOICES["storage"]}
    told |= {"output_weighting": CHOICES["output_weighting"], "repair": [True, False]}
    told |= {"target": CHOICES["target"]}
    told |= {"bias_compensation": [True, False], "sublayers": [("mlp",), ("self_attn",), ("self_attn", "mlp")]}
    for name, ways in told.items():
        texts = [method_text(lorap.CompressionConfig(**{name: way})) for way in ways]
        assert len(set(texts)) == len(ways), name
        assert not any(re.search(r"[{}]", text) for text in texts)


@pytest.mark.parametrize(
    ("options", "start", "absent"),
    [
        ({"sublayers": ("self_attn",)}, "Attention projections became", "FFN"),
        ({"sublayers": ("mlp",)}, "FFN channels were pruned", "ttention"),
        (
            {"sublayers": ("mlp",), "mlp_method": "factorize", "allocation": "even"},
            "FFN projections became low-rank",
            "pruned",
        ),
        ({"repair": False}, "Attention projections became", "refitted"),
        ({"sparsity": 0.0}, "Nothing was to be removed, and nothing was changed.", "trained"),
    ],
    ids=["attention", "ffn", "ffn-low-rank", "no-repair", "sparsity-0"],
)
def test_method_leaves_out_what_was_not_done(options, start, absent):
    text = method_text(lorap.CompressionConfig(**options))
    assert text.startswith(start)
    assert absent not in text


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ({"recipe": "flap", "output_weighting": "loss"}, "gradients"),
        ({"recipe": "lorap", "output_weighting": "loss", "sublayers": ("mlp",)}, "gradients"),
        ({"recipe": "lorap", "sublayers": ("mlp",)}, "v and o"),
        ({"recipe": "lorap", "target": "stock"}, "v and o"),
        ({"target": "stock"}, "factor pairs"),
        ({"target": "stock"}, "shared one budget"),
    ],
    ids=[
        "flap-has-no-backward-pass",
        "score-without-outputs",
        "no-ratio-without-attention",
        "no-ratio-with-dense-attention",
        "stock-has-no-factors",
        "stock-has-no-prices",
    ],
)
def test_method_does_not_tell_what_had_no_effect(options, absent):
    assert absent not in method_text(lorap.CompressionConfig(**options))


def test_ratio_is_the_one_that_was_used():
    assert "v and o counting 1.5 times as much" in method_text(
        lorap.CompressionConfig(recipe="lorap", vo_to_qk_ratio=1.5)
    )


def test_only_a_card_for_the_plug_in_imports_it():
    assert "```python\nimport lorap  # teaches" in model_card(report(0.0, 0.0))
    stock = model_card(report(0.0, 0.0, target="stock"))
    assert "```python\nfrom transformers import AutoModel" in stock
    assert "import lorap" not in stock


def test_model_card_tells_method_numbers_and_options():
    found = report(0.0, 0.0, recipe="svd-llm", sparsity=0.3)
    card = model_card(found)
    assert f"\n\n{TEXTS['svd-llm']}\n\n## Use" in card
    kept = 2 * 7 * 163
    assert f"kept share of these parameters: **{kept / 12600:.4f}**\n(12,600 -> {kept:,}; " in card
    for name, value in found.config.to_dict().items():
        assert f"| {name} | {value} |\n" in card
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model: some/model\n" in card


# ----------------------------------------------------------------------------------------------------------------------
# Sums


def test_parameters_of_compressed_sublayers_only():
    found = report(sublayers=("self_attn",))
    found.projections = [projection(0, "q_proj"), projection(0, "up_proj", rank=None), projection(1, "o_proj", rank=3)]
    assert compressed_roles(found.config) == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (found.params_before, found.params_after) == (12600, 10 * 163)
    assert found.param_ratio == pytest.approx(1630 / 12600)
    assert [entry.layer for entry in found.by_role("o_proj")] == [1]
