"""Weights on a trellis: how much they lose, what ``compress`` makes of them, and which of them a budget of bytes chooses."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import assert_refused, last_json, run
from safetensors.torch import load_file
from test_byte_budget import dense_model, stored_bytes
from test_mixed_budget import LARGER, priced, statistics
from transformers import AutoModelForCausalLM

import lorap
from lorap.algorithms.rounding import column_energies
from lorap.algorithms.trellis import DISTORTION, expected_errors
from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.load import find_model
from lorap.compression import byte_budget
from lorap.compression.byte_budget import resolve_budget
from lorap.compression.quantization import Rounding
from lorap.config import CompressionConfig
from lorap.distributed import SINGLE_PROCESS
from lorap.evaluation.info import describe_model
from lorap.nn.linear import LowRankLinear, weight_of
from lorap.nn.quantized import QuantizedLinear
from lorap.nn.trellis import TrellisLinear
from lorap.weights import TRELLIS

DOWN = "model.layers.1.mlp.down_proj"
SMALL = {"num_calibration_samples": 8, "calibration_seq_len": 32}


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


def bits_of(model: Any) -> dict[str, int]:
    return {name: part.bits for name, part in model.named_modules() if isinstance(part, TrellisLinear)}


def error(dense: Any, model: Any) -> float:
    """Of one weight, relative to its energy."""
    weight = dense.get_submodule(DOWN).weight
    return float((weight_of(model.get_submodule(DOWN)) - weight).square().sum() / weight.square().sum())


def test_more_bits_lose_less_and_whole_numbers_more(make_model) -> None:
    dense = make_model("llama-gqa", num_hidden_layers=2)
    kinds = (*(f"tcq{bits}" for bits in DISTORTION), "int4", "int8")
    models = {kind: lorap.quantize(copy.deepcopy(dense), kind) for kind in kinds}
    errors = {kind: error(dense, model) for kind, model in models.items()}
    for bits, share in DISTORTION.items():
        assert 0.9 < errors[f"tcq{bits}"] / share < 1.35, errors
    assert errors["int4"] > 1.3 * errors["tcq4"]
    assert errors["tcq6"] > 5 * errors["int8"]
    groups = {kind: model.get_submodule(DOWN).group_size for kind, model in models.items()}
    assert groups == {kind: 256 if kind.startswith("tcq") else 64 for kind in kinds}


def test_calibrated_codes_change_outputs_less(make_model, tokens) -> None:
    dense = make_model("llama-gqa", num_hidden_layers=1)
    exact, losses = logits(dense, tokens), {}
    for calibration in (None, tokens):
        model = lorap.quantize(copy.deepcopy(dense), "tcq3", group_size=32, calibration=calibration)
        losses[calibration is None] = float((logits(model, tokens) - exact).norm())
    assert losses[False] < 0.9 * losses[True]


def test_pivoted_pairs_become_factors_or_dense(make_model, compress_small, tokens) -> None:
    model, _ = compress_small(make_model("llama-gqa"), storage="pivoted", sparsity=0.6)
    pairs = [name for name, part in model.named_modules() if isinstance(part, LowRankLinear)]
    before = logits(model, tokens)
    lorap.quantize(model, "tcq4", group_size=32)
    assert not any(getattr(part, "pivot_rows", None) is not None for part in model.modules())
    assert {name.rpartition(".")[0] for name in bits_of(model)} >= {*pairs}
    assert 0 < float((logits(model, tokens) - before).norm() / before.norm()) < 0.3
    for weights in ("tcq4", "tcq2"):
        with pytest.raises(lorap.ConfigError, match=f"{weights} weights are too coarse for pivoted storage"):
            CompressionConfig(weights=weights, storage="pivoted")


def test_a_group_is_what_the_kind_wants_or_what_was_asked_for() -> None:
    def group(**options: Any) -> Any:
        return CompressionConfig(**options).group_size

    assert (group(), group(weights="int4"), group(weights="int8", sparsity=0)) == (64, 64, 64)
    assert [group(weights=f"tcq{bits}") for bits in TRELLIS.bits] == [256] * 5
    assert group(weights="tcq", bits_per_weight=3) == 256
    assert group(weights="mixed", bits_per_weight=3) == 64
    assert group(weights="tcq3", group_size=96) == 96
    auto = CompressionConfig(bits_per_weight=3)
    assert auto.group_size == "auto"
    assert (replace(auto, weights="tcq4").group_size, replace(auto, weights="int8").group_size) == (256, 64)
    asked = CompressionConfig(bits_per_weight=3, group_size=128)
    assert (replace(asked, weights="tcq4").group_size, replace(asked, weights="int8").group_size) == (128, 128)
    assert CompressionConfig(**json.loads(json.dumps(auto.to_dict()))) == auto


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "tcq"}, "weights tcq follow from a budget of bytes; give size or bits_per_weight, or weights"),
        (
            {"weights": "tcq3", "target": "stock"},
            "codes on a trellis, which compressed-tensors does not have.*choose int4",
        ),
        ({"weights": "tcq", "size": 10**9, "target": "stock"}, "codes on a trellis"),
        ({"weights": "tcq", "size": 10**9, "storage": "pivoted"}, "tcq weights are too coarse for pivoted storage"),
        ({"weights": "tcq7"}, "weights should be"),
        ({"weights": ["tcq3"]}, "weights should be"),
        ({"weights": "tcq3", "group_size": 48}, "group_size should be"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(lorap.ConfigError, match=message):
        CompressionConfig(**options)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_compress_rounds_what_it_makes(sparsity, make_model, compress_small, tokens, tmp_path) -> None:
    options = {"weights": "tcq3", "sparsity": sparsity, "recipe": "best", "correction_steps": 0}
    model, report = compress_small(make_model("llama-biases"), **options)
    assert (report.config.storage, report.config.group_size) == ("factors", 256)
    assert {*bits_of(model).values()} == {3}
    assert not [part for part in model.model.layers.modules() if isinstance(part, torch.nn.Linear)]
    out = lorap.save(model, tmp_path / "out", report=report)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out), tokens), logits(model, tokens))
    assert "tcq3 with a scale for each 256, codes on a trellis" in (out / "README.md").read_text()
    info = describe_model(find_model(out))
    assert (info["weights"], info["params"]) == ("tcq3", report.params_saved)
    assert lorap.CompressionReport.from_dict(report.to_dict()).config == report.config


def test_an_interrupted_run_goes_on_with_the_same_codes(model_folder, small_text, tmp_path, monkeypatch) -> None:
    from lorap.compression import pipeline

    config = CompressionConfig(recipe="lorap", sparsity=0.4, weights="tcq2", **SMALL)
    options = lorap.RunOptions(calibration=str(small_text), progress=False, device="cpu")
    round_layer, rounded = pipeline.round_layer, []

    def interrupted(context: Any, index: int, *args: Any, **kwargs: Any) -> None:
        rounded.append(index)
        if rounded == [0, 1]:
            raise KeyboardInterrupt
        round_layer(context, index, *args, **kwargs)

    monkeypatch.setattr(pipeline, "round_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lorap.compress_to_folder(model_folder, tmp_path / "out", config, options)
    lorap.compress_to_folder(model_folder, tmp_path / "out", config, options)
    lorap.compress_to_folder(model_folder, tmp_path / "whole", config, options)
    assert rounded == [0, 1, 1, 0, 1]
    whole, out = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert whole.keys() == out.keys()
    assert all(torch.equal(whole[name], out[name]) for name in whole)


def test_errors_are_as_large_as_expected() -> None:
    """The mean error of a path, times the energy that later columns do not make up for."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(192, 130, generator=generator)
    shared = torch.randn(130, 40, generator=generator)
    moment = (shared @ shared.T + 3 * torch.eye(130)).double()
    for bits in TRELLIS.bits:
        errors = expected_errors(weight, bits=bits, group=64)
        torch.testing.assert_close(errors[:, 129], DISTORTION[bits] * weight[:, 128:].square().mean(1))
        torch.testing.assert_close(errors[:, 3], DISTORTION[bits] * weight[:, :64].square().mean(1))
        expected = (errors.double() @ column_energies(moment)).sum()
        found = Rounding(TRELLIS, bits, 64).weight(weight, moment, torch.float32).weight(torch.float32)
        change = (weight - found).double()
        assert 0.7 < float((change @ moment * change).sum() / expected) < 1.3


def whole_sizes(dense: Any) -> dict[str, int]:
    kinds = ("float", "int8", "tcq6", "tcq5", "int4", "tcq4", "tcq3", "tcq2")
    configs = {kind: CompressionConfig(weights=kind, sparsity=0.0) for kind in kinds}
    return {kind: dense.planned(dense.unchanged(), config) + dense.other_bytes for kind, config in configs.items()}


def test_below_int8_whole_codes_come_before_sparsity(monkeypatch) -> None:
    dense = dense_model(**LARGER)
    whole = whole_sizes(dense)
    assert [*whole.values()] == sorted(whole.values(), reverse=True)

    def chosen(size: int, **options: Any) -> tuple[str, Any, bool]:
        config = resolve_budget(dense, CompressionConfig(size=size, **options))
        assert resolve_budget(dense, config) == config
        return config.weights, config.group_size, config.sparsity > 0

    assert chosen(whole["int8"]) == ("int8", 64, False)
    assert chosen(whole["int8"] - 1) == ("mixed", 64, False)
    between = dense.other_bytes + int(byte_budget.MIXED_FROM * dense.weights / 8)
    assert chosen(between + 1) == ("mixed", 64, False)
    assert chosen(between - 1) == ("tcq6", 256, False)
    assert chosen(whole["tcq6"]) == ("tcq6", 256, False)
    assert chosen(whole["tcq6"] - 1) == ("tcq", 256, False)
    assert chosen(whole["tcq5"] + 5000) == ("tcq", 256, False)
    assert chosen(whole["tcq5"]) == ("tcq5", 256, False)
    assert chosen(whole["int4"]) == ("tcq", 256, False)
    assert chosen(whole["int4"], weights="mixed") == ("int4", 64, False)
    assert chosen(whole["tcq4"]) == ("tcq4", 256, False)
    assert chosen(whole["tcq4"] - 1) == ("tcq", 256, False)
    assert chosen(whole["tcq3"]) == ("tcq3", 256, False)
    assert chosen(whole["tcq3"] - 1) == ("tcq3", 256, True)
    assert (
        chosen(whole["tcq3"] - 1, weights="tcq") == chosen(whole["tcq3"] + 5000, weights="tcq") == ("tcq", 256, False)
    )
    assert chosen(whole["tcq2"]) == ("tcq3", 256, True)
    assert chosen(whole["tcq2"], weights="tcq") == ("tcq2", 256, False)
    assert chosen(whole["tcq2"] - 1, weights="tcq") == ("tcq", 256, True)
    assert chosen(whole["tcq2"] - 1, weights="tcq", recipe="lorap") == ("tcq2", 256, True)
    # Whole numbers as before, where codes are not for the host or the storage, or too large in tiles.
    assert chosen(whole["int4"] - 2000, target="stock", group_size=64) == ("int4", 64, True)
    assert chosen(whole["int4"] - 1, storage="pivoted")[0] == "int8"
    monkeypatch.setattr(byte_budget, "ON_TRELLIS", ("tcq4", "tcq3", "tcq2"))
    assert chosen(whole["tcq3"] - 1) == ("tcq", 256, False)
    assert chosen(whole["tcq2"] - 1) == ("tcq2", 256, True)


def test_a_toy_that_no_tile_fits_has_whole_numbers() -> None:
    dense = dense_model()
    assert resolve_budget(dense, CompressionConfig(recipe="lorap", bits_per_weight=2.2)).weights == "int4"


def test_from_2_to_6_bits_a_budget_is_met_and_used() -> None:
    """And what is chosen costs no more than any one kind that fits."""
    dense = dense_model(num_hidden_layers=2, **LARGER)
    known, costs = statistics(dense), []
    for bits in (2.3, 2.8, 3.3, 3.8, 4.5, 5, 5.9):
        config = resolve_budget(dense, CompressionConfig(bits_per_weight=bits, weights="tcq"))
        assert (config.weights, config.sparsity) == ("tcq", 0.0)
        prices = priced(config, dense, known)
        plans = prices.allocate(SINGLE_PROCESS)
        assert {bits for plan in plans for bits in plan.bits.values()} <= {3, 4, 5, 6}  # the others have 2
        size = dense.planned(plans, config)
        assert 0.97 * dense.projection_budget(config) < size <= dense.projection_budget(config)
        costs.append(sum(_cost(prices, plans, key) for key in prices.curves))
        for kind in TRELLIS.bits:
            alone = [replace(plan, bits=dict.fromkeys(dense.shapes[0], kind)) for plan in plans]
            if dense.planned(alone, config) <= dense.projection_budget(config):
                assert costs[-1] <= sum(_cost(prices, alone, key) for key in prices.curves)
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] > 0


def _cost(prices: Any, plans: Any, key: tuple[int, str]) -> float:
    index, role = key
    roles = ("gate_proj", "down_proj") if role == "down_proj" else (role,)
    bits = tuple(plans[index].bits.get(each, 2) for each in roles)
    return next(candidate.cost for candidate in prices.curves[key] if candidate.bits == bits)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("best", {"bits_per_weight": 3.9}),
        ("lorap", {"bits_per_weight": 3.6}),
        ("best", {"bits_per_weight": 2.9, "weights": "tcq"}),
        ("best", {"bits_per_weight": 4.6, "weights": "tcq"}),
        ("lorap", {"bits_per_weight": 5.6, "weights": "tcq"}),
        ("lorap", {"bits_per_weight": 2.9}),
    ],
    ids=str,
)
def test_what_is_saved_meets_the_budget_and_opens_again(recipe, options, make_model, compress_small, tmp_path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = make_model("llama-gqa", head_dim=32, **sizes).bfloat16()
    model, report = compress_small(model, recipe=recipe, sparsity=None, correction_steps=0, **options)
    config = report.config
    mixed = "weights" in options or options["bits_per_weight"] > 3.5
    assert (config.weights, config.sparsity > 0) == (("tcq", False) if mixed else ("tcq3", True))
    lorap.save(model, tmp_path, report=report)
    info = describe_model(find_model(tmp_path))
    assert 0.93 * options["bits_per_weight"] < info["bits_per_dense_weight"] <= options["bits_per_weight"]
    fields = LoRAPConfig(**json.loads((tmp_path / "config.json").read_text())["quantization_config"])
    assert fields.format_version == (8 if max(fields.bits, 0, *fields.other_bits.values()) > 4 else 7)
    assert bool(fields.other_bits) == mixed
    for name, bits in bits_of(model).items():
        assert bits == fields.bits_of(name)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    before, after = model.state_dict(), opened.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    said = "tcq2 to tcq6, more where that helps most for its bytes," if mixed else "tcq3 with a scale"
    assert said in (tmp_path / "README.md").read_text()


def test_commands_tell_and_do_the_same(model_folder, small_text, tmp_path) -> None:
    options = ["--recipe", "lorap", "--calibration", small_text, "--eval-text", "none", "--dtype", "bfloat16"]
    options += ["--num-calibration-samples", 8, "--calibration-seq-len", 32]
    for asked in (["--weights", "tcq3", "--sparsity", 0.3], ["--weights", "tcq4", "--sparsity", 0, "--group-size", 32]):
        planned = last_json(run("plan", model_folder, *options, *asked, "--no-time", "--json"))
        out = tmp_path / asked[1]
        done = last_json(run("compress", model_folder, out, *options, *asked, "--quiet", "--json"))
        assert planned["config"] == done["config"]
        assert planned["exact"]
        assert planned["bytes"] == stored_bytes(out)
    asked = ["--weights", "tcq", "--bits-per-weight", 3.6]
    planned = last_json(run("plan", model_folder, *options, *asked, "--no-time", "--json"))
    last_json(run("compress", model_folder, tmp_path / "out", *options, *asked, "--quiet", "--json"))
    assert 0.95 < stored_bytes(tmp_path / "out") / planned["bytes"] <= 1
    shown = run("plan", model_folder, *options, *asked, "--no-time").stdout
    assert "Weights are tcq2, tcq3, tcq4, tcq5 or tcq6, matrix by matrix, and the sparsity 0.0000" in shown
    assert_refused(run("compress", model_folder, tmp_path / "no", "--weights", "tcq3", "--target", "stock"), "trellis")
    assert not Path(tmp_path / "no").exists()


def test_a_layer_of_whole_numbers_is_none_of_codes(make_model) -> None:
    model = lorap.quantize(make_model("llama-gqa"), "int4")
    assert not bits_of(model)
    assert type(model.get_submodule(DOWN)) is QuantizedLinear


@pytest.mark.parametrize("weights", ["int4", "tcq3"])
def test_a_group_far_longer_than_a_row_is_the_row(weights: str, make_model: Any, tokens: Any) -> None:
    """No room is made for the columns that are not there."""
    found = []
    for group_size in (1024, 2**30):
        model = lorap.quantize(make_model("llama-gqa"), weights, group_size=group_size)
        with torch.no_grad():
            found.append(model(tokens).logits)
    assert torch.equal(*found)
