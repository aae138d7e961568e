"""Every option out of range is refused by name and number, and a recipe is only a set of defaults."""

import dataclasses
import json

import pytest

from lorap.config import RECIPES, CompressionConfig
from lorap.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": -0.1}, ["sparsity should be greater than or equal to 0 and is -0.1"]),
        ({"sparsity": 20}, ["sparsity should be less than 1 and is 20"]),
        ({"sparsity": float("nan")}, ["sparsity should be less than 1 and is nan"]),
        ({"sparsity": "0.2"}, ["sparsity", "number", "'0.2'"]),
        ({"sparsity": True}, ["sparsity", "number", "True"]),
        ({"recipe": "nope"}, ["recipe 'nope'", "lorap"]),
        ({"recipe": ["best"]}, ["recipe ['best']"]),
        ({"sublayers": ("self_attn", "ffn")}, ["sublayers[1] should be 'self_attn' or 'mlp' and is 'ffn'"]),
        ({"sublayers": ()}, ["sublayers", "at least 1"]),
        ({"sublayers": 3}, ["sublayers", "3"]),
        ({"allocation": "fair"}, ["allocation", "'paper', 'even', 'loss' or 'flap' and is 'fair'"]),
        ({"token_weighting": True}, ["token_weighting", "'none' or 'residual'", "True"]),
        ({"rank_multiple": 0}, ["rank_multiple", "greater than or equal to 1 or 'auto' and is 0"]),
        ({"rank_multiple": 8.0}, ["rank_multiple", "integer", "8.0"]),
        ({"width_multiple": True}, ["width_multiple", "True"]),
        ({"metric_shrinkage": 1.1}, ["metric_shrinkage", "1 or 'auto' and is 1.1"]),
        ({"metric_shrinkage": "half"}, ["metric_shrinkage", "'auto'", "'half'"]),
        ({"repair_ridge": float("inf")}, ["repair_ridge", "less than inf", "is inf"]),
        ({"repair": 1}, ["repair", "boolean", "1"]),
        ({"mlp_method": "factorize"}, ["allocation loss", "mlp_method is factorize", "paper or even"]),
        ({"allocation": "flap", "mlp_method": "factorize"}, ["allocation flap", "paper or even"]),
        ({"allocation": "flap", "shapes": "uniform"}, ["allocation flap", "shapes free"]),
        ({"allocation": "flap", "sublayers": "self_attn"}, ["allocation flap", "mlp"]),
        ({"target": "stock", "sublayers": "self_attn"}, ["target stock", "compress mlp too"]),
        ({"target": "stock", "recipe": "svd-llm"}, ["mlp_method factorize", "use mlp_method prune"]),
        ({"target": "stock", "recipe": "flap"}, ["allocation flap", "paper, even or loss"]),
        ({"target": "stock", "shapes": "free"}, ["one FFN width", "use shapes uniform"]),
        ({"vo_to_qk_ratio": 0}, ["vo_to_qk_ratio should be greater than 0 and is 0"]),
        ({"least_important_kept": 1.0}, ["least_important_kept", "less than 1"]),
        ({"num_calibration_samples": 0}, ["num_calibration_samples", "greater than or equal to 1"]),
        ({"num_calibration_samples": 1.5}, ["num_calibration_samples", "integer", "1.5"]),
        ({"calibration_seq_len": 1}, ["calibration_seq_len", "greater than or equal to 2"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"seed": 2**63}, ["seed", "9223372036854775808"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_refuses_out_of_range(options: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        CompressionConfig(**options)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0},
        {"sparsity": 0.999},
        {"least_important_kept": 0.0},
        {"num_calibration_samples": 1, "calibration_seq_len": 2},
        {"metric_shrinkage": 0, "repair_ridge": 0},
        {"metric_shrinkage": 1.0, "repair_ridge": 1e6},
        {"rank_multiple": 1, "width_multiple": 1},
        {"allocation": "even", "mlp_method": "factorize"},
    ],
    ids=str,
)
def test_accepts_limits(options: dict) -> None:
    config = CompressionConfig(**options)
    assert {name: getattr(config, name) for name in options} == options


def test_lorap_is_the_paper() -> None:
    config = CompressionConfig(recipe="lorap")
    assert config == CompressionConfig.from_recipe("lorap")
    assert config.to_dict() == {
        "recipe": "lorap",
        "sparsity": 0.2,
        "sublayers": ["self_attn", "mlp"],
        "allocation": "paper",
        "vo_to_qk_ratio": 3.0,
        "shapes": "free",
        "rank_multiple": 1,
        "width_multiple": 1,
        "attention_method": "awsvd",
        "metric_shrinkage": 0.0,
        "output_weighting": "none",
        "token_weighting": "none",
        "anchor": "none",
        "mlp_method": "prune",
        "channel_score": "lorap",
        "least_important_kept": 0.01,
        "repair": False,
        "repair_ridge": 0.0,
        "bias_compensation": False,
        "sequential": "layer",
        "storage": "factors",
        "correction_steps": 0,
        "scale_steps": 0,
        "weights": "float",
        "group_size": 64,
        "target": "lorap",
        "num_calibration_samples": 128,
        "calibration_seq_len": 128,
        "seed": 0,
    }
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


def test_best_is_the_default() -> None:
    config = CompressionConfig()
    assert config == CompressionConfig(recipe="best")
    assert {name: getattr(config, name) for name in RECIPES["best"]} == dict(RECIPES["best"])
    chosen = (config.allocation, config.attention_method, config.storage, config.correction_steps, config.repair)
    assert chosen == ("loss", "second_moment", "pivoted", 8, True)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_recipe_says_every_choice(recipe: str) -> None:
    given = {"recipe", "sparsity", "size", "bits_per_weight", "num_calibration_samples", "calibration_seq_len", "seed"}
    assert set(RECIPES[recipe]) == {field.name for field in dataclasses.fields(CompressionConfig)} - given
    config = CompressionConfig(recipe=recipe)
    assert None not in config.to_dict().values()
    assert CompressionConfig(**config.to_dict()) == config


def test_target_stock_needs_no_second_option() -> None:
    config = CompressionConfig(target="stock")
    assert (config.shapes, CompressionConfig().shapes) == ("uniform", "free")
    assert CompressionConfig.from_recipe("lorap", target="stock", shapes=None).shapes == "uniform"
    assert CompressionConfig(**config.to_dict()) == config


def test_falsy_values_are_given_values() -> None:
    config = CompressionConfig(repair=False, least_important_kept=0.0, repair_ridge=0.0)
    assert (config.repair, config.repair_ridge) == (False, 0.0)
    config = CompressionConfig(recipe="lorap", least_important_kept=0)
    assert config.least_important_kept == 0


def test_frozen_and_keyword_only() -> None:
    config = CompressionConfig(sublayers=["mlp"])
    assert config.sublayers == ("mlp",)
    assert hash(config) == hash(CompressionConfig(sublayers=("mlp",)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sparsity = 0.5
    with pytest.raises(TypeError):
        CompressionConfig("lorap")
    with pytest.raises(TypeError):
        RECIPES["lorap"]["vo_to_qk_ratio"] = 1.0


def test_from_recipe_overrides() -> None:
    config = CompressionConfig.from_recipe("lorap", sparsity=0.5, vo_to_qk_ratio=1, sublayers=["self_attn"], seed=0)
    assert (config.sparsity, config.vo_to_qk_ratio, config.sublayers, config.seed) == (0.5, 1, ("self_attn",), 0)
    assert config.least_important_kept == 0.01


def test_none_keeps_the_value_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {**RECIPES["lorap"], "vo_to_qk_ratio": 2.0, "mlp_method": "factorize"}
    monkeypatch.setattr("lorap.config.RECIPES", {**RECIPES, "other": other})
    config = CompressionConfig.from_recipe("other", vo_to_qk_ratio=None, mlp_method=None, sparsity=None, seed=None)
    assert config.recipe == "other"
    assert (config.vo_to_qk_ratio, config.mlp_method, config.sparsity, config.seed) == (2.0, "factorize", 0.2, 0)


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        ("nope", {}, ["'nope'", "lorap"]),
        ("lorap", {"sparsty": 0.2}, ["sparsty", "sparsity"]),
        ("lorap", {"sparsity": 1.5}, ["1.5"]),
    ],
    ids=["recipe", "option", "value"],
)
def test_from_recipe_refuses(recipe: str, overrides: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        CompressionConfig.from_recipe(recipe, **overrides)
    for word in words:
        assert word in str(error.value)
