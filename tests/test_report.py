"""What a run tells: rounding errors worth a line, stages, and a method text that follows the choices, not the recipe's name."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html import unescape

import pytest
import torch
from made_reports import made_report

import lorap
from lorap.algorithms.factorization import factorize
from lorap.config import CHOICES, RECIPES
from lorap.errors import CheckpointError
from lorap.reports.html.page import compression_page
from lorap.reports.model_card import method_text, model_card, stock_card
from lorap.reports.records import Evaluation
from lorap.reports.run import (
    CompressionReport,
    CorrectionReport,
    ProjectionReport,
    correction_lines,
    evaluation_lines,
    storage_lines,
)
from lorap.reports.spectra import Spectrum, sampled_spectrum, spectrum_indices
from lorap.requirements import compressed_roles

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
        f"FFN channels were pruned: those of largest activation-weighted norms stayed ({link('2404.09695')}). "
        "The down projections were refitted by least squares to the output of all channels. "
        "Ranks and widths of all layers shared one budget, priced by the gradients of the loss. "
        "Errors of outputs were weighted by the gradients of the loss. "
        "These weights then took 8 small steps towards what the original model predicts on the calibration text; "
        "nothing else was trained."
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
    "aa-svd": (
        f"Attention and FFN projections became low-rank factor pairs, weighted by the second moment of their inputs "
        f"({link('2403.07378')}). "
        f"They were fitted to the outputs that the original model has in their place ({link('2604.02119')}). "
        "Every matrix kept the same share. Nothing was trained."
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


def test_weights_that_stayed_are_told():
    text = method_text(lorap.CompressionConfig(correction_steps=0))
    assert text == TEXTS["best"].split(" These weights")[0] + " Nothing was trained."


@pytest.mark.parametrize(
    ("windows", "told"), [(8, "1 small step of 8"), (23, "1 small step of 8"), (63, "5 small steps of 8")]
)
def test_fewer_steps_on_little_text_are_told(windows, told):
    config = lorap.CompressionConfig(num_calibration_samples=windows)
    assert method_text(config) == TEXTS["best"].replace("8 small steps", told)
    assert method_text(config, CorrectionReport(8, 5, 5)) == TEXTS["best"].replace(
        "8 small steps", "5 small steps of 8"
    )
    none = method_text(config, CorrectionReport(8, 5, 0))
    assert none.endswith(" None of the 8 correction steps was taken, and nothing was trained.")


# Steps, taken or undone, with windows enough or not; what the output has to say.
CORRECTIONS = {
    "all": (
        CorrectionReport(8, 8, 8, 128, 108, 1536, (0.5, 0.75), (0.25, 0.5)),
        ["8 of 8", "1,536", "0.2500 and 0.5000"],
    ),
    "few": (CorrectionReport(8, 2, 2, 36, 108, 1536, (0.5,), (0.25,)), ["2 of 8", "36 calibration windows", "108"]),
    "undone": (
        CorrectionReport(8, 1, 0, 16, 108, 1024, (0.5, 0.75), (0.6, 0.5)),
        ["0 of 8", "undone", "16 calibration windows", "for 1 of 8", "108"],
    ),
    "one": (CorrectionReport(8, 0, 0, 1, 108), ["0 of 8", "1 calibration window ", "108"]),
    "overflow": (CorrectionReport(8, 8, 0, 128, 108, 1536, (0.5,), ()), ["0 of 8", "not finite"]),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections_are_told_everywhere(name):
    correction, said = CORRECTIONS[name]
    found = replace(made_report(3), correction=correction)
    read = CompressionReport.from_dict(json.loads(json.dumps(found.to_dict())))
    assert read.correction == correction
    lines = correction_lines(correction)
    assert all(part in " ".join(lines) for part in said)
    assert len(lines) == 1 + (correction.tried < 8)
    for output in (found.table(), model_card(found), unescape(compression_page(found))):
        for line in lines:
            assert line[1:] in output


def test_method_follows_the_choices_and_not_the_name():
    for recipe, choices in RECIPES.items():
        for name in RECIPES:
            assert method_text(lorap.CompressionConfig(recipe=name, **choices)) == TEXTS[recipe]


def test_every_choice_can_be_told():
    """No placeholder is left, and each way of doing it reads differently."""
    told = {"allocation": ["paper", "even", "loss"], "attention_method": CHOICES["attention_method"]}
    told |= {"channel_score": CHOICES["channel_score"], "storage": CHOICES["storage"]}
    told |= {"output_weighting": CHOICES["output_weighting"], "repair": [True, False]}
    told |= {"target": CHOICES["target"], "correction_steps": [0, 1, 8]}
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


def test_model_card_tells_parameters_by_kind_and_leads_to_the_page():
    found = report(0.0, 0.0, recipe="lorap")
    found.projections.append(projection(0, "up_proj", rank=None))
    rows = [
        line
        for line in model_card(found).splitlines()
        if re.match(r"\| (q_proj|up_proj|compressed|whole model) \|", line)
    ]
    kept = 2 * 7 * 163
    assert rows == [
        f"| q_proj | 12,600 | {kept:,} | {kept / 12600:.4f} | 7 |  | 0.2500 / 0.2500 / 0.2500 |",
        "| up_proj | 6,300 | 6,300 | 1.0000 | dense | 63 | 0.2500 / 0.2500 / 0.2500 |",
        f"| compressed | 18,900 | {kept + 6300:,} | {(kept + 6300) / 18900:.4f} |  |  |  |",
        "| whole model | 10,000 | 5,000 | 0.5000 |  |  |  |",
    ]
    assert model_card(found).count("[report.html](report.html)") == 1


def test_model_card_is_the_same_after_a_slower_run():
    first, second = report(0.0), report(0.0)
    first.seconds, first.peak_memory_bytes, first.peak_device_memory_bytes = {"load": 1.0}, 10**9, 0
    second.seconds, second.peak_memory_bytes, second.peak_device_memory_bytes = {"load": 2.5}, 3 * 10**9, 7
    assert model_card(first) == model_card(second)


def test_card_of_an_exported_folder_leads_to_no_page():
    """Only a folder that lorap compress has written has one."""
    exported = stock_card(model_card(report(0.0)), "name", "LlamaForCausalLM", 10_000, 5_000)
    assert "## Exported" in exported
    assert "report.html" not in exported
    assert "\n\n## Calibration\n" in exported


# ----------------------------------------------------------------------------------------------------------------------
# Spectra


@pytest.mark.parametrize(
    ("count", "indices"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (5, (1, 2, 3, 4, 5)),
        (6, (1, 2, 3, 4, 6)),
        (100, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100)),
    ],
)
def test_sampled_singular_values_are_spread_evenly(count, indices):
    assert spectrum_indices(count) == indices


def test_a_sample_is_small_at_any_size():
    assert max(len(spectrum_indices(count)) for count in (8192, 16_384, 28_672, 49_151)) <= 32


def test_spectrum_is_that_of_the_factorization():
    """Against torch's own singular values of the weighted matrix; the rank does not matter."""
    torch.manual_seed(0)
    weight, metric = torch.randn(13, 37), torch.rand(37) + 0.1
    exact = torch.linalg.svdvals(weight.double() * metric.double().sqrt())
    found = sampled_spectrum(factorize(weight, 3, metric, spectrum=True).singular_values)
    assert found.count == 13
    assert found.indices == (1, 2, 3, 4, 6, 8, 12, 13)
    wanted = [float(exact[index - 1] / exact[0]) for index in found.indices]
    assert found.values == pytest.approx(wanted, rel=6e-4)
    assert all(len(f"{value:.9g}".lstrip("0.")) <= 4 for value in found.values)


def test_spectrum_of_nothing():
    assert sampled_spectrum(torch.zeros(3)) == Spectrum(3, (0.0, 0.0, 0.0))
    assert sampled_spectrum(torch.tensor([4.0, 1.0, 0.0])).values == (1.0, 0.25, 0.0)


@pytest.mark.parametrize("count", [-1, 0, 3, 100])
def test_spectrum_of_the_wrong_length_is_refused(count):
    with pytest.raises(ValueError, match=f"a sample of {count} singular values has .* but 2 were given"):
        Spectrum(count, (1.0, 0.5))


def test_every_solved_projection_of_a_run_has_a_spectrum(make_model, compress_small):
    _, found = compress_small(make_model("llama-gqa"))
    for entry in found.projections:
        assert (entry.spectrum is not None) == (entry.rank is not None)
        if entry.spectrum:
            assert entry.rank <= entry.spectrum.count <= min(entry.shape_before)
            assert entry.spectrum.values[0] == 1.0
            assert list(entry.spectrum.values) == sorted(entry.spectrum.values, reverse=True)


# ----------------------------------------------------------------------------------------------------------------------
# Reading back


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_report_reads_back_as_it_was(recipe):
    made = made_report(3, recipe=recipe)
    text = json.dumps(made.to_dict())
    found = CompressionReport.from_dict(json.loads(text))
    assert found.projections == made.projections
    assert found.config == made.config
    assert found.table() == made.table()
    assert json.dumps(found.to_dict()) == text


def test_a_real_report_reads_back_as_it_was(make_model, compress_small):
    _, made = compress_small(make_model("qwen2").bfloat16(), recipe="best")
    made.projections[0] = projection(0, "q_proj", math.nan)
    text = json.dumps(made.to_dict())
    assert json.dumps(CompressionReport.from_dict(json.loads(text)).to_dict()) == text


def test_an_older_report_reads_back():
    """Without what was added later: the command, spectra, sources, the memory of a device."""
    values = json.loads(json.dumps(made_report(2).to_dict()))
    del values["command"], values["calibration"]["sources"], values["peak_device_memory_bytes"]
    for entry in values["projections"]:
        del entry["spectrum"]
    found = CompressionReport.from_dict(values)
    assert (found.command, found.calibration["sources"], found.peak_device_memory_bytes) == ("", [], 0)
    assert found.param_ratio == made_report(2).param_ratio


def change(*path: object, to: object) -> dict:
    """A report with one entry changed."""
    values = json.loads(json.dumps(made_report(2).to_dict()))
    parent = values
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = to
    return values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (change("model", to=None), "report.model should be a valid string and is None"),
        (change("novelty", to=1), "report.novelty is an unknown entry; another version of lorap may have written it"),
        (change("config", "recipe", to="worst"), "report.config: unknown recipe 'worst'; known: best, lorap"),
        (change("config", "sublayers", to="mlp"), "report.config.sublayers should be .* and is 'mlp'"),
        (change("config", "rank_multiple", to=0), "rank_multiple should be .* equal to 1 or 'auto' and is 0"),
        (change("seconds", "load", to="1"), "report.seconds.load should be a valid number and is '1'"),
        (change("params_saved", to=True), "report.params_saved should be a valid integer and is True"),
        (change("projections", 3, "layer", to=1.0), r"report.projections\[3\].layer should be .* and is 1.0"),
        (change("projections", 3, "layer", to=14), "report.projections has a layer 14, but 14 entries"),
        (change("projections", 0, "shape_after", to=[1]), r"report.projections\[0\].shape_after has no entry 1"),
        (change("projections", 0, "params_before", to=0), r"params_before should be .* equal to 1 and is 0"),
        (change("projections", 0, "params_after", to=1), "report.params_after is .* but the projections make it"),
        (change("projections", to=[]), "report.projections has none of q_proj, k_proj"),
        (change("projections", 0, "spectrum", "count", to=9), r"report.projections\[0\].spectrum: a sample of 9"),
        (change("evaluations", 0, "after", to={}), r"report.evaluations\[0\].after has no entry text"),
        (change("calibration", "tokens", to=10**30), "report.calibration.tokens should be less than .* and is 1000"),
        (change("command", to="\ud800"), "report: Invalid JSON"),
        (change("command", to=object()), "report is no JSON"),
    ],
)
def test_a_report_that_is_none_is_refused_by_name(values, message):
    with pytest.raises(CheckpointError, match=message):
        CompressionReport.from_dict(values)


# ----------------------------------------------------------------------------------------------------------------------
# Sums


def test_parameters_of_compressed_sublayers_only():
    found = report(sublayers=("self_attn",))
    found.projections = [projection(0, "q_proj"), projection(0, "up_proj", rank=None), projection(1, "o_proj", rank=3)]
    assert compressed_roles(found.config) == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (found.params_before, found.params_after) == (12600, 10 * 163)
    assert found.param_ratio == pytest.approx(1630 / 12600)
    assert [entry.layer for entry in found.by_role("o_proj")] == [1]


def test_a_loss_that_fell_is_told_with_one_sign():
    before, after = (Evaluation("text", nats, 1.0, 64, 32, 0.1) for nats in (3.0, 2.875))
    report = made_report(2, texts=())
    report.add_evaluation(before, after)
    (line,) = evaluation_lines(report.evaluations)
    assert "(-0.125 nats per token)" in line
