"""Plans spend the budget and no more, are the same every time, and do what each option says."""

import itertools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lorap.algorithms.factorization import factorize
from lorap.algorithms.refit import fluctuation_scores
from lorap.architectures import ATTENTION, PROJECTIONS, find_architecture
from lorap.calibration import TokenWindows
from lorap.calibration.context import DecoderContext
from lorap.calibration.sensitivity import Sensitivity
from lorap.calibration.stream import CalibrationStream, Probe
from lorap.compression.allocation import plan_layer
from lorap.compression.planning import Plan, make_plan, spread_sample, threshold_widths
from lorap.compression.prices import PRICE_SHRINKAGE, Prices
from lorap.compression.shrinkage import output_metric, shrunk
from lorap.compression.stored_bytes import DenseModel
from lorap.config import CompressionConfig
from lorap.errors import CalibrationError, ConfigError

CPU = torch.device("cpu")


def shapes_of(model: Any) -> list[dict[str, tuple[int, int]]]:
    architecture = find_architecture(model)
    return [
        {role: tuple(linear.weight.shape) for role, linear in architecture.linears(layer).items()}
        for layer in architecture.decoder_layers(model)
    ]


def plan_of(model: Any, tokens: Tensor, mask: Tensor | None = None, **options: Any) -> Plan:
    config = CompressionConfig(**({"sparsity": 0.3} | options))
    return make_plan(DecoderContext.of(model, device=CPU), TokenWindows(tokens, "tokens", "", mask), config)


def kept(model: Any, plan: Plan, *, roles: tuple = PROJECTIONS, pivoted: bool = True) -> tuple[int, int]:
    """Parameters of the given roles before and after."""
    before = after = 0
    for shapes, layer in zip(shapes_of(model), plan.layers, strict=True):
        for role in roles:
            out_features, in_features = shapes[role]
            before += out_features * in_features
            if role in layer.ranks:
                rank = layer.ranks[role]
                after += rank * (out_features + in_features - (rank if pivoted else 0))
            elif role in ATTENTION:
                after += out_features * in_features
            else:
                after += layer.intermediate_size * (in_features if role != "down_proj" else out_features)
    return before, after


@pytest.fixture(scope="module")
def smollm2(tokenizer) -> Any:
    """Six layers of SmolLM2-135M's shapes with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("storage", ["pivoted", "factors"])
@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "llama-wide-heads", "smollm3"])
def test_tiny_budgets_are_met_to_one_step(make_model, tokens, family: str, sparsity: float, storage: str) -> None:
    model = make_model(family)
    plan = plan_of(model, tokens, sparsity=sparsity, storage=storage)
    before, after = kept(model, plan, pivoted=storage == "pivoted")
    budget = (1 - sparsity) * before
    # One channel of an FFN is 192 parameters, more than 0.2 % of a model this small.
    assert budget - max(192, 0.002 * before) <= after <= budget


@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_budgets_of_a_real_shape_are_met_to_a_fifth_of_a_percent(smollm2, tokens, sparsity: float) -> None:
    plan = plan_of(smollm2, tokens, sparsity=sparsity)
    before, after = kept(smollm2, plan)
    assert 1 - sparsity - 0.002 <= after / before <= 1 - sparsity
    for shapes, layer in zip(shapes_of(smollm2), plan.layers, strict=True):
        assert all(rank % 8 == 0 and 8 <= rank < min(shapes[role]) for role, rank in layer.ranks.items())
        assert layer.intermediate_size % 8 == 0
    uniform = plan_of(smollm2, tokens, sparsity=sparsity, shapes="uniform")
    assert len({(tuple(layer.ranks.items()), layer.intermediate_size) for layer in uniform.layers}) == 1
    _, after = kept(smollm2, uniform)
    assert 1 - sparsity - 0.005 <= after / before <= 1 - sparsity


def test_uniform_is_the_same_in_all_layers_and_free_is_not(make_model, tokens) -> None:
    model = make_model("smollm3")
    uniform = plan_of(model, tokens, shapes="uniform", rank_multiple=1, width_multiple=1)
    assert len({(tuple(layer.ranks.items()), layer.intermediate_size) for layer in uniform.layers}) == 1
    before, after = kept(model, uniform)
    assert 0.7 - 0.015 <= after / before <= 0.7
    free = plan_of(model, tokens, rank_multiple=1, width_multiple=1)
    assert len({(tuple(layer.ranks.items()), layer.intermediate_size) for layer in free.layers}) > 1


@pytest.mark.parametrize("recipe", ["best", "lorap", "svd-llm", "flap"])
def test_sparsity_zero_changes_nothing(make_model, tokens, recipe: str) -> None:
    plan = plan_of(make_model("llama-gqa"), tokens, recipe=recipe, sparsity=0.0)
    assert [(layer.ranks, layer.intermediate_size) for layer in plan.layers] == [({}, 100)] * 2
    assert plan.output_metrics == {}


@pytest.mark.parametrize("recipe", ["lorap", "svd-llm"])
def test_plans_by_shape_read_no_model(make_model, tokens, recipe: str, monkeypatch) -> None:
    model = make_model("llama-gqa")
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    plan = plan_of(model, tokens, recipe=recipe, sparsity=0.5)
    config = CompressionConfig(recipe=recipe, sparsity=0.5)
    assert list(plan.layers) == [plan_layer(shapes, config) for shapes in shapes_of(model)]
    assert plan.output_metrics == {}


def test_best_for_stock_hosts_needs_no_backward_pass(make_model, tokens, monkeypatch) -> None:
    model = make_model("llama-gqa")
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    plan = plan_of(model, tokens, recipe="best", target="stock", sparsity=0.2)
    assert [layer.ranks for layer in plan.layers] == [{}, {}]


@pytest.mark.parametrize("sublayers", [("self_attn", "mlp"), ("mlp",)], ids=["both", "mlp"])
@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.35])
@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "smollm3"])
def test_stock_takes_all_from_one_ffn_width(make_model, tokens, family: str, sparsity: float, sublayers: tuple) -> None:
    """One channel more would be over the budget; attention stays dense, and only the output score needs a metric."""
    model = make_model(family)
    options = {"target": "stock", "sparsity": sparsity, "sublayers": sublayers, "width_multiple": 1}
    plan = plan_of(model, tokens, **options)
    assert not any(layer.ranks for layer in plan.layers)
    (width,) = {layer.intermediate_size for layer in plan.layers}
    roles = PROJECTIONS if len(sublayers) == 2 else PROJECTIONS[4:]
    before, after = kept(model, plan, roles=roles)
    assert 1 - sparsity - len(plan.layers) * 3 * 64 / before < after / before <= 1 - sparsity
    assert plan.output_metrics == {}
    scored = plan_of(model, tokens, channel_score="output", **options)
    assert set(scored.output_metrics) == {(index, "down_proj") for index in range(len(plan.layers))}
    assert scored.layers == plan.layers
    assert plan_of(model, tokens, recipe="lorap", **options).layers == plan.layers
    assert {
        layer.intermediate_size for layer in plan_of(model, tokens, **(options | {"width_multiple": 8})).layers
    } == {width // 8 * 8}


def test_stock_widths_of_a_real_shape_are_multiples(smollm2, tokens) -> None:
    """3 x 576 x 1536 of 3,538,944 parameters a layer: a fifth of them is 409.6 of 1,536 channels."""
    for recipe in ("best", "lorap"):
        (layer, *_) = plan_of(smollm2, tokens, recipe=recipe, target="stock", sparsity=0.2).layers
        assert layer.intermediate_size == 1120  # of 1126, in blocks of 32
    exact = plan_of(smollm2, tokens, target="stock", sparsity=0.2, width_multiple=1, output_weighting="none").layers[0]
    assert exact.intermediate_size == 1126


@pytest.mark.parametrize("recipe", ["best", "lorap"])
def test_stock_at_sparsity_zero_changes_nothing(make_model, tokens, recipe: str) -> None:
    plan = plan_of(make_model("llama-mha"), tokens, target="stock", sparsity=0, recipe=recipe, width_multiple=64)
    assert [(dict(layer.ranks), layer.intermediate_size) for layer in plan.layers] == [({}, 100)] * 2


def test_stock_beyond_the_ffns_is_refused_with_what_they_can_give(make_model, tokens) -> None:
    """The FFN holds 3 x 64 x 100 = 19,200 of 35,584 parameters of a layer (multi-head), one channel 192 of them."""
    model = make_model("llama-mha")
    with pytest.raises(ConfigError) as error:
        plan_of(model, tokens, target="stock", sparsity=0.6)
    assert "sparsity 0.6 cannot come from the FFNs alone, which hold 54.0% of the parameters" in str(error.value)
    assert "target stock reaches 0.534 at most; lower the sparsity" in str(error.value)
    assert plan_of(model, tokens, target="stock", sparsity=0.534).layers[0].intermediate_size == 1
    with pytest.raises(ConfigError, match=r"reaches 0\.366 at most; lower the sparsity or width_multiple \(32\)"):
        plan_of(model, tokens, target="stock", sparsity=0.5, width_multiple=32)


def test_stock_adds_no_bias_that_the_class_does_not_have(make_model, tokens) -> None:
    options = {"target": "stock", "recipe": "lorap", "bias_compensation": True}
    with pytest.raises(
        ConfigError, match="a stock qwen2 has biases in all three FFN projections or in none; leave it out"
    ):
        plan_of(make_model("qwen2"), tokens, **options)
    assert plan_of(make_model("llama-biases"), tokens, **options).layers[0].intermediate_size < 100


def test_mlp_only(make_model, tokens) -> None:
    model = make_model("llama-gqa")
    plan = plan_of(model, tokens, sublayers="mlp")
    assert all(layer.ranks == {} for layer in plan.layers)
    widths = [layer.intermediate_size for layer in plan.layers]
    assert sum(widths) == 140
    assert plan.output_metrics == {}
    scored = plan_of(model, tokens, sublayers="mlp", channel_score="output")
    assert set(scored.output_metrics) == {(0, "down_proj"), (1, "down_proj")}


def test_attention_only(make_model, tokens) -> None:
    model = make_model("llama-gqa")
    plan = plan_of(model, tokens, sublayers="self_attn", rank_multiple=1)
    assert [layer.intermediate_size for layer in plan.layers] == [100, 100]
    before, after = kept(model, plan, roles=ATTENTION)
    assert 0.7 - 0.01 <= after / before <= 0.7
    assert set(plan.output_metrics) == {(index, role) for index in (0, 1) for role in ATTENTION}


@pytest.mark.parametrize(("rank_multiple", "width_multiple"), [(1, 1), (5, 7), (16, 32)])
def test_multiples_are_obeyed(make_model, tokens, rank_multiple: int, width_multiple: int) -> None:
    model = make_model("llama-gqa")
    plan = plan_of(model, tokens, rank_multiple=rank_multiple, width_multiple=width_multiple)
    for layer in plan.layers:
        assert all(rank % rank_multiple == 0 for rank in layer.ranks.values())
        assert layer.intermediate_size == 100 or layer.intermediate_size % width_multiple == 0
    before, after = kept(model, plan)
    assert after <= 0.7 * before


def test_multiples_that_cannot_be_met_are_refused(make_model, tokens) -> None:
    with pytest.raises(ConfigError, match="lower the sparsity"):
        plan_of(make_model("llama-gqa"), tokens, sparsity=0.9, rank_multiple=16, width_multiple=50)


def test_metrics_weigh_outputs_and_may_be_left_out(make_model, tokens) -> None:
    model = make_model("llama-gqa")
    plan = plan_of(model, tokens, channel_score="output")
    assert set(plan.output_metrics) == {(i, role) for i in (0, 1) for role in (*ATTENTION, "down_proj")}
    unread = plan_of(model, tokens)  # the paper's score does not look at the outputs
    assert set(unread.output_metrics) == {(i, role) for i in (0, 1) for role in ATTENTION}
    assert unread.layers == plan.layers
    factorized = plan_of(model, tokens, recipe="svd-llm", output_weighting="loss")
    assert set(factorized.output_metrics) == set(plan.output_metrics)
    for (index, role), metric in plan.output_metrics.items():
        out_features = shapes_of(model)[index][role][0]
        assert metric.shape == (out_features, out_features)
        assert float(torch.linalg.eigvalsh(metric.double()).min()) > 0
    plain = plan_of(model, tokens, output_weighting="none")
    assert plain.output_metrics == {}
    assert plain.layers == plan.layers
    even = plan_of(model, tokens, channel_score="output", allocation="even")
    assert set(even.output_metrics) == set(plan.output_metrics)
    assert all(torch.equal(even.output_metrics[key], metric) for key, metric in plan.output_metrics.items())


def test_what_the_loss_does_not_mind_gives_more(make_model, tokens) -> None:
    model = make_model("llama-gqa")
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):  # layer 1 says next to nothing
            model.model.layers[1].get_submodule(name).weight.mul_(1e-3)
    first, second = plan_of(model, tokens, rank_multiple=1, sparsity=0.5).layers
    assert second.intermediate_size < 0.5 * first.intermediate_size
    assert second.ranks["v_proj"] <= 4


def test_a_price_is_half_the_mean_square_of_what_moves_along_the_gradient(make_model, tokens) -> None:
    """The cost of each rank, as it is offered, is that of the truncated product, with A and C of the sensitivities."""
    model = make_model("llama-gqa")
    prices = Prices(CompressionConfig(rank_multiple=5), DenseModel.of(model, find_architecture(model)))
    g, x = torch.randn(200, 64), torch.randn(200, 64)
    sensitivity = Sensitivity(output=g.T @ g / 200, input=x.double().T @ x.double() / 200)
    weight = model.model.layers[0].self_attn.q_proj.weight.data
    metric = output_metric(sensitivity.output)
    prices.add(0, "q_proj", weight, sensitivity, metric)
    candidates = prices.curves[0, "q_proj"]
    assert [candidate.size for candidate in candidates] == [*range(5, 64, 5), 64]
    a, c = metric.double(), shrunk(sensitivity.input, PRICE_SHRINKAGE)
    for candidate in candidates:
        factors = factorize(weight.double(), candidate.size, c, output_metric=a)
        change = weight.double() - factors.left @ factors.right
        expected = float((a @ change @ c * change).sum()) / 2
        assert candidate.cost == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_same_plan_twice(make_model, tokens) -> None:
    model = make_model("llama-gqa")
    first, second = (plan_of(model, tokens) for _ in range(2))
    assert first.layers == second.layers
    assert all(torch.equal(first.output_metrics[key], second.output_metrics[key]) for key in first.output_metrics)


def test_nothing_is_changed(make_model, tokens) -> None:
    model = make_model("llama-biases")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for recipe in ("best", "flap"):
        plan_of(model, tokens, recipe=recipe)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore")
def test_gradients_that_overflow_are_named(make_model, tokens) -> None:
    model = make_model("llama-gqa")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = 1e38
    with pytest.raises(CalibrationError, match=r"gradients at model\.layers\.0\.self_attn\.q_proj are not finite"):
        plan_of(model, tokens)


# ----------------------------------------------------------------------------------------------------------------------
# FLAP


def test_threshold_by_hand() -> None:
    scores = [torch.tensor([0.1, 5.0, 3.0]), torch.tensor([0.2, 0.3, 9.0, 4.0]), torch.tensor([-1.0, -2.0])]
    assert threshold_widths(scores, 0) == [3, 4, 2]
    assert threshold_widths(scores, 1) == [3, 4, 1]
    assert threshold_widths(scores, 3) == [2, 3, 1]
    # The best of each layer stays, however low: -1 in the last one.
    assert threshold_widths(scores, 5) == [1, 2, 1]
    assert threshold_widths(scores, 6) == [1, 1, 1]
    with pytest.raises(ConfigError, match="7 of 9 FFN channels"):
        threshold_widths(scores, 7)


def test_flap_widths_are_the_standardised_threshold(make_model, tokens) -> None:
    model = make_model("llama-gqa")
    layers = list(model.model.layers)
    stream = CalibrationStream.from_windows(DecoderContext.of(model, device=CPU), TokenWindows(tokens, "tokens", ""))
    standardised = []
    for index, layer in enumerate(layers):
        down = layer.mlp.down_proj
        (stats,) = stream.observe(index, layer, {"x": Probe(down, mean=True)})["x"]
        scores = fluctuation_scores(down.weight.data, stats.variance)
        standardised.append((scores - scores.mean()) / scores.std())
        stream.advance(index, layer)
    # Attention has 12,288 parameters a layer and stays dense; an FFN channel has 192.
    drop = int(0.3 * 2 * (12_288 + 19_200) / 192)
    lowest = torch.cat(standardised).sort().values[drop - 1]
    plan = plan_of(model, tokens, recipe="flap")
    assert [layer.intermediate_size for layer in plan.layers] == [int((each > lowest).sum()) for each in standardised]
    assert sum(layer.intermediate_size for layer in plan.layers) == 200 - drop
    assert all(layer.ranks == {} for layer in plan.layers)


def test_flap_of_ffns_alone_takes_less(make_model, tokens) -> None:
    plan = plan_of(make_model("llama-gqa"), tokens, recipe="flap", sublayers="mlp")
    assert sum(layer.intermediate_size for layer in plan.layers) == 140


def test_flap_cannot_take_more_than_the_ffns_have(make_model, tokens) -> None:
    with pytest.raises(ConfigError, match="lower the sparsity"):
        plan_of(make_model("llama-gqa"), tokens, recipe="flap", sparsity=0.7)


# ----------------------------------------------------------------------------------------------------------------------
# The part of the text that is used for gradients


@pytest.mark.parametrize(
    ("windows", "seq_len", "tokens", "rows"),
    [
        (8, 32, 10_000, range(8)),
        (8, 32, 64, [0, 7]),
        (9, 32, 96, [0, 4, 8]),
        (8, 32, 1, [0]),
        (1, 32, 4096, [0]),
        (128, 128, 4096, None),
    ],
)
def test_spread_sample(windows: int, seq_len: int, tokens: int, rows) -> None:
    ids = torch.arange(windows * seq_len).view(windows, seq_len)
    mask = (ids % 5 != 0).long()
    sample = spread_sample(TokenWindows(ids, "text", "digest", mask), tokens)
    found = (sample.input_ids[:, 0] // seq_len).tolist()
    if rows is None:
        assert len(found) == len(set(found)) == 32
        assert all(3 <= b - a <= 5 for a, b in itertools.pairwise(found))
    else:
        assert found == list(rows)
    assert torch.equal(sample.attention_mask, mask[found])
    assert spread_sample(TokenWindows(ids, "text", "digest"), tokens).attention_mask is None
