"""One layer at a time: what each part has seen when it is compressed, what comes out, and that it opens again."""

import copy
import weakref
from typing import Any

import pytest
import torch
from conftest import FAMILIES, SMALL
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lorap
from lorap.algorithms.refit import keep_best, output_scores, repair_down
from lorap.architectures import ATTENTION, MLP
from lorap.calibration import CalibrationStream, TokenWindows
from lorap.calibration.context import DecoderContext
from lorap.calibration.stream import Probe
from lorap.compression.allocation import LayerPlan
from lorap.compression.layer import LayerCompressor
from lorap.compression.shrinkage import choose_ridge, choose_shrinkage, shrunk
from lorap.config import RECIPES, CompressionConfig
from lorap.nn.linear import LowRankLinear
from lorap.requirements import needs_folds

CPU = torch.device("cpu")
PLAN = LayerPlan({"q_proj": 20, "k_proj": 10, "v_proj": 10, "o_proj": 20}, 60)
HALVES = torch.tensor([False, True, True, False, False, True, False, True])


def stream_of(model: Any, tokens: Tensor, fold_of: Tensor | None = None) -> CalibrationStream:
    windows = TokenWindows(tokens, "tokens", "")
    return CalibrationStream.from_windows(DecoderContext.of(model, device=CPU), windows, fold_of=fold_of)


def compressor(model: Any, tokens: Tensor, fold_of: Tensor | None = None, **options: Any) -> LayerCompressor:
    config = CompressionConfig(**options)
    return LayerCompressor(DecoderContext.of(model, device=CPU), config, stream_of(model, tokens, fold_of))


def inputs_of(layer: nn.Module, stream: CalibrationStream, linear: nn.Module) -> list[Tensor]:
    """(tokens, features) float64 that reach ``linear``, one entry per batch, by a hook of our own."""
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        for batch in stream.batches:
            layer(batch.hidden, **batch.layer_kwargs[0])
    handle.remove()
    return seen


def whitened_svd(weight: Tensor, x: Tensor, rank: int) -> Tensor:
    """SVD-LLM: W S = U Sigma V^T with S S^T = X X^T, and W' = U_r Sigma_r V_r^T S^-1."""
    s = torch.linalg.cholesky(x.T @ x)
    u, sigma, vh = torch.linalg.svd(weight.double() @ s, full_matrices=False)
    return u[:, :rank] * sigma[:rank] @ vh[:rank] @ torch.linalg.inv(s)


def truncated_output(weight: Tensor, x: Tensor, rank: int) -> Tensor:
    """W' X^T of the same W', also where X X^T is singular."""
    u, sigma, vh = torch.linalg.svd(weight.double() @ x.T, full_matrices=False)
    return u[:, :rank] * sigma[:rank] @ vh[:rank]


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).norm() / expected.norm())


# ----------------------------------------------------------------------------------------------------------------------
# What is seen


def test_sums_of_the_ffn_are_gone_when_attention_is_factorized(make_model, tokens, monkeypatch) -> None:
    """They are the largest: a layer of LLaMA-7B's shapes would hold another gigabyte."""
    model = make_model("llama-gqa")
    sums: list[weakref.ref[Any]] = []
    observe, factorize = LayerCompressor._observe, lorap.compression.layer._Layer.factorize

    def observed(self: Any, *args: Any) -> Any:
        found = observe(self, *args)
        sums.extend(weakref.ref(fold) for fold in found["mlp_inner"])
        return found

    def factorized(self: Any, *args: Any) -> None:
        assert [fold() for fold in sums] == [None] * len(sums)
        factorize(self, *args)

    monkeypatch.setattr(LayerCompressor, "_observe", observed)
    monkeypatch.setattr(lorap.compression.layer._Layer, "factorize", factorized)
    compressor(model, tokens, recipe="best").compress(0, model.model.layers[0], PLAN, {})
    assert sums


@pytest.mark.parametrize("sequential", ["layer", "sublayer"])
def test_each_part_sees_what_sequential_says(make_model, tokens, sequential: str) -> None:
    model = make_model("llama-gqa").double()
    layer, dense = model.model.layers[0], copy.deepcopy(model.model.layers[0])
    stream = stream_of(model, tokens)
    work = compressor(
        model, tokens, recipe="flap", attention_method="second_moment", channel_score="output", sequential=sequential
    )
    work.compress(0, layer, PLAN, {})
    # By hand: q, k and v from the dense layer; o from a layer whose q, k and v are compressed, or from the dense one.
    x = torch.cat(inputs_of(dense, stream, dense.self_attn.q_proj))
    for role in ("q_proj", "k_proj", "v_proj"):
        found = getattr(layer.self_attn, role).reconstruct()
        assert relative(found, whitened_svd(getattr(dense.self_attn, role).weight, x, PLAN.ranks[role])) < 1e-5
    half = copy.deepcopy(dense)
    if sequential == "sublayer":
        for role in ("q_proj", "k_proj", "v_proj"):
            setattr(half.self_attn, role, getattr(layer.self_attn, role))
    x = torch.cat(inputs_of(half, stream, half.self_attn.o_proj))
    o = layer.self_attn.o_proj.reconstruct()
    assert relative(o @ x.T, truncated_output(dense.self_attn.o_proj.weight, x, 20)) < 1e-5
    if sequential == "sublayer":
        blind = torch.cat(inputs_of(dense, stream, dense.self_attn.o_proj))
        assert relative(o @ blind.T, truncated_output(dense.self_attn.o_proj.weight, blind, 20)) > 1e-2
        half.self_attn.o_proj = layer.self_attn.o_proj
    # The FFN is pruned by what it sees behind that.
    inner = torch.cat(inputs_of(half, stream, half.mlp.down_proj))
    kept = keep_best(output_scores(dense.mlp.down_proj.weight.data, inner.square().sum(0)), 60)
    assert torch.equal(layer.mlp.down_proj.weight, dense.mlp.down_proj.weight[:, kept])
    assert torch.equal(layer.mlp.gate_proj.weight, dense.mlp.gate_proj.weight[kept])
    # The stream waits before the layer until it is sent through what came out.
    for before, after in zip(stream.batches, work.stream.batches, strict=True):
        assert torch.equal(before.hidden, after.hidden)
    work.stream.advance(0, layer)
    with torch.no_grad():
        for before, after in zip(stream.batches, work.stream.batches, strict=True):
            out = layer(before.hidden, **before.layer_kwargs[0])
            torch.testing.assert_close(after.hidden, out[0] if isinstance(out, tuple) else out)


@pytest.mark.parametrize("order", [ATTENTION, tuple(reversed(ATTENTION))], ids=["forward", "reversed"])
def test_order_of_the_plan_does_not_matter(make_model, tokens, order) -> None:
    model = make_model("llama-gqa")
    plan = LayerPlan({role: PLAN.ranks[role] for role in order}, 60)
    reports = compressor(model, tokens).compress(0, model.model.layers[0], plan, {})
    assert [report.role for report in reports] == [*ATTENTION, *MLP]
    expected = make_model("llama-gqa")
    compressor(expected, tokens).compress(0, expected.model.layers[0], PLAN, {})
    for name, value in model.model.layers[0].state_dict().items():
        assert torch.equal(value, expected.model.layers[0].state_dict()[name])


def test_folds_are_kept_apart(make_model, tokens) -> None:
    model = make_model("llama-gqa")
    layer = model.model.layers[0]
    probes = {"x": Probe(layer.self_attn.q_proj, moments=True), "inner": Probe(layer.mlp.down_proj, mean=True)}
    found = stream_of(model, tokens, HALVES).observe(0, layer, probes)
    for fold, rows in enumerate((tokens[~HALVES], tokens[HALVES])):
        alone = stream_of(model, rows).observe(0, layer, probes)
        assert found["x"][fold].tokens == 4 * 32
        torch.testing.assert_close(found["x"][fold].outer, alone["x"][0].outer, rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(found["inner"][fold].total, alone["inner"][0].total, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found["x"][0].outer, found["x"][1].outer, rtol=1e-2)
    (whole,) = stream_of(model, tokens).observe(0, layer, probes)["x"]
    torch.testing.assert_close(found["x"][0].outer + found["x"][1].outer, whole.outer, rtol=1e-6, atol=1e-4)


def test_an_empty_second_fold_is_no_fold(make_model, tokens) -> None:
    for rows in (torch.zeros(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)):
        model = make_model("llama-gqa")
        layer = model.model.layers[0]
        found = stream_of(model, tokens, rows).observe(0, layer, {"x": Probe(layer.self_attn.q_proj)})
        assert len(found["x"]) == 1
        assert found["x"][0].tokens == tokens.numel()


def test_residual_weights_are_the_inverse_mean_square_of_what_enters(make_model, tokens) -> None:
    model = make_model("llama-gqa")
    layer, stream = model.model.layers[0], stream_of(model, tokens)
    (stats,) = stream.observe(0, layer, {"x": Probe(layer.mlp.down_proj, moments=True, weighted=True)})["x"]
    x = torch.cat(inputs_of(layer, stream, layer.mlp.down_proj))
    weights = 1 / torch.cat([b.hidden.flatten(0, 1) for b in stream.batches]).double().square().mean(-1)
    assert stats.weight == pytest.approx(float(weights.sum()), rel=1e-5)
    torch.testing.assert_close(stats.sq_sum, weights @ x.square(), rtol=1e-4, atol=0)
    expected = (x.T * weights) @ x / weights.sum()
    torch.testing.assert_close(stats.second_moment, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_a_layer_runs_no_further_than_the_last_probe(make_model, tokens) -> None:
    model = make_model("llama-gqa")
    layer, ran = model.model.layers[0], []
    layer.mlp.gate_proj.register_forward_pre_hook(lambda *_: ran.append("gate"))
    layer.self_attn.o_proj.register_forward_hook(lambda *_: ran.append("o"))
    stream = stream_of(model, tokens)
    stream.observe(0, layer, {"x": Probe(layer.self_attn.o_proj), "q": Probe(layer.self_attn.q_proj)})
    assert ran == []
    stream.observe(0, layer, {"x": Probe(layer.mlp.down_proj)})
    assert set(ran) == {"o", "gate"}


def test_auto_is_judged_on_the_folds(make_model, tokens) -> None:
    """`best` repairs with the shrinkage and the ridge that its two halves choose, on the statistics of both."""
    model = make_model("llama-gqa")
    layer, dense = model.model.layers[0], copy.deepcopy(model.model.layers[0])
    plan = LayerPlan({}, 60)
    probe = {"x": Probe(layer.mlp.down_proj, moments=True)}
    folds = stream_of(model, tokens, HALVES).observe(0, layer, probe)["x"]
    (whole,) = stream_of(model, tokens).observe(0, layer, probe)["x"]
    work = compressor(model, tokens, HALVES, channel_score="output")
    work.compress(0, layer, plan, {})
    down = dense.mlp.down_proj.weight.data
    kept = keep_best(output_scores(down, whole.sq_sum), 60)
    shrinkage = choose_shrinkage(folds)
    assert 0 < shrinkage < 1
    ridge = choose_ridge(down, folds, kept, shrinkage=shrinkage)
    expected = repair_down(down, shrunk(whole.second_moment, shrinkage), kept, ridge=ridge)
    torch.testing.assert_close(layer.mlp.down_proj.weight.double(), expected, rtol=1e-4, atol=1e-5)
    assert relative(layer.mlp.down_proj.weight, down[:, kept].double()) > 0.01


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"recipe": "lorap"}, False),
        ({"recipe": "svd-llm"}, False),
        ({"recipe": "flap"}, False),
        ({"metric_shrinkage": 0.2}, True),
        ({"metric_shrinkage": 0.2, "repair_ridge": 0.1}, False),
        ({"repair": False, "metric_shrinkage": "auto", "attention_method": "awsvd"}, False),
    ],
    ids=str,
)
def test_folds_are_needed_where_something_is_judged(options: dict, expected: bool) -> None:
    assert needs_folds(CompressionConfig(**options)) == expected


# ----------------------------------------------------------------------------------------------------------------------
# What comes out


@pytest.mark.parametrize("recipe", ["best", "svd-llm", "flap"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recipes_run_save_and_open_again(
    make_model, tokens, compress_small, tmp_path, family: str, recipe: str
) -> None:
    model, report = compress_small(make_model(family), recipe=recipe)
    # Budgets count matrices. Biases come on top: those that the model has, and those that flap adds.
    extra = 0.01 if recipe == "flap" or family in ("llama-biases", "qwen2") else 0.0
    assert report.param_ratio <= 0.5 + extra
    assert report.param_ratio >= {"best": 0.49, "svd-llm": 0.46, "flap": 0.49}[recipe]
    out = lorap.save(model, tmp_path / "out", report=report)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.isfinite(logits).all()
        assert torch.equal(loaded(tokens).logits, logits)
    settings = loaded.config.quantization_config
    assert settings.storage == ("pivoted" if recipe == "best" else "factors")
    low_rank = [module for module in loaded.modules() if isinstance(module, LowRankLinear)]
    assert bool(low_rank) == (recipe != "flap")
    assert all((module.pivot_rows is not None) == (recipe == "best") for module in low_rank)
    biased = family == "llama-biases"
    gained = [layer.mlp.down_proj.bias is not None and not biased for layer in loaded.model.layers]
    assert any(gained) == (recipe == "flap" and not biased)
    assert len(settings.biases) == sum(gained)
    assert report.params_saved == sum(parameter.numel() for parameter in loaded.parameters())


@pytest.mark.parametrize("recipe", ["best", "svd-llm", "flap"])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3"])
def test_recipes_in_bfloat16(make_model, tokens, compress_small, tmp_path, family: str, recipe: str) -> None:
    model = make_model(family)
    for parameter in model.parameters():  # rotary frequencies stay float32, as when such a model is loaded
        parameter.data = parameter.data.bfloat16()
    model, report = compress_small(model, recipe=recipe)
    assert {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()} == {torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(lorap.save(model, tmp_path / "out", report=report))
    assert loaded.dtype == torch.bfloat16
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.isfinite(logits).all()
        assert torch.equal(loaded(tokens).logits, logits)
    assert all((projection.storage_error > 0) == (projection.rank is not None) for projection in report.projections)


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "qwen2"])
def test_svd_llm_is_the_whitened_svd(make_model, tokens, family: str) -> None:
    """W' = U_r Sigma_r V_r^T S^-1 with S S^T = X X^T (SVD-LLM, section 3.1), in all seven projections of the first layer."""
    dense = make_model(family).double()
    stream = stream_of(dense, tokens)
    config = CompressionConfig(recipe="svd-llm", sparsity=0.5, **SMALL)
    small, report = lorap.compress(copy.deepcopy(dense), calibration=tokens, config=config, progress=False)
    first, layer = dense.model.layers[0], small.model.layers[0]
    for role in (*ATTENTION, *MLP):
        path = f"self_attn.{role}" if role in ATTENTION else f"mlp.{role}"
        linear, found = first.get_submodule(path), layer.get_submodule(path)
        out_features, in_features = linear.weight.shape
        rank = int(0.5 * out_features * in_features / (out_features + in_features))
        assert found.rank == rank
        x = torch.cat(inputs_of(first, stream, linear))
        assert relative(found.reconstruct(), whitened_svd(linear.weight.data, x, rank)) < 1e-6
        error = relative(x @ found.reconstruct().T, x @ linear.weight.T)
        assert report.by_role(role)[0].error == pytest.approx(error, rel=1e-5)


def test_flap_bias_is_the_mean_output_of_what_left(make_model, tokens) -> None:
    for family in ("llama-gqa", "llama-biases"):
        model = make_model(family)
        layer, dense = model.model.layers[0], copy.deepcopy(model.model.layers[0])
        x = torch.cat(inputs_of(dense, stream_of(model, tokens), dense.mlp.down_proj))
        compressor(model, tokens, recipe="flap").compress(0, layer, LayerPlan({}, 60), {})
        down = dense.mlp.down_proj.weight.data.double()
        variance = x.var(0, correction=0)
        kept = (variance * down.square().sum(0)).argsort()[-60:].sort().values
        gone = torch.ones(100, dtype=torch.bool)
        gone[kept] = False
        assert torch.equal(layer.mlp.down_proj.weight, dense.mlp.down_proj.weight[:, kept])
        expected = down[:, gone] @ x.mean(0)[gone]
        if dense.mlp.down_proj.bias is not None:
            expected = expected + dense.mlp.down_proj.bias.data.double()
        torch.testing.assert_close(layer.mlp.down_proj.bias.double(), expected, rtol=1e-4, atol=1e-5)
        # So the mean output of the FFN on the calibration text is what it was.
        mean = x[:, kept].mean(0) @ layer.mlp.down_proj.weight.double().T + layer.mlp.down_proj.bias.double()
        old = x.mean(0) @ down.T + (0 if dense.mlp.down_proj.bias is None else dense.mlp.down_proj.bias.double())
        torch.testing.assert_close(mean, old, rtol=1e-4, atol=1e-4)


def test_bias_compensation_of_a_repair_is_for_what_the_repair_left(make_model, tokens) -> None:
    model = make_model("llama-gqa")
    layer, dense = model.model.layers[0], copy.deepcopy(model.model.layers[0])
    x = torch.cat(inputs_of(dense, stream_of(model, tokens), dense.mlp.down_proj))
    compressor(model, tokens, channel_score="output", bias_compensation=True).compress(0, layer, LayerPlan({}, 60), {})
    kept = keep_best(output_scores(dense.mlp.down_proj.weight.data, x.square().sum(0)), 60)
    down = layer.mlp.down_proj
    mean = x[:, kept].mean(0) @ down.weight.double().T + down.bias.double()
    torch.testing.assert_close(mean, x.mean(0) @ dense.mlp.down_proj.weight.double().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1e-2, 1e2])
def test_the_papers_score_does_not_mind_how_much_all_tokens_weigh(make_model, tokens, size: float) -> None:
    """It adds norms of two inputs, of which only one is weighted; tokens of one size all weigh the same, however much that is."""
    kept = []
    for weighting in ("none", "residual"):
        model = make_model("llama-gqa")
        layer = model.model.layers[0]
        work = compressor(model, tokens, channel_score="lorap", token_weighting=weighting)
        for batch in work.stream.batches:
            batch.hidden = size * batch.hidden / batch.hidden.square().mean(-1, keepdim=True).sqrt()
        work.compress(0, layer, LayerPlan({}, 60), {})
        kept.append(layer.mlp.gate_proj.weight)
    assert torch.equal(*kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_rounded_once_and_said(make_model, tokens, dtype: torch.dtype) -> None:
    model = make_model("llama-gqa").to(dtype)
    exact = make_model("llama-gqa").to(dtype).float()
    reports = compressor(model, tokens).compress(0, model.model.layers[0], PLAN, {})
    compressor(exact, tokens).compress(0, exact.model.layers[0], PLAN, {})
    for report in reports[:4]:
        assert 1e-5 < report.storage_error < 0.05
        found = model.model.layers[0].self_attn.get_submodule(report.role)
        assert found.left.weight.dtype == dtype
    q, precise = (one.model.layers[0].self_attn.q_proj.reconstruct(dtype=torch.float64) for one in (model, exact))
    assert relative(q, precise) < 0.1


# ----------------------------------------------------------------------------------------------------------------------
# Hostile input


def dead_channel(model: Any) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[3] = 0
        layer.post_attention_layernorm.weight.data[5] = 0
        layer.mlp.gate_proj.weight.data[7] = 0
        layer.self_attn.v_proj.weight.data[2] = 0


def dead_ffn(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data.zero_()


def dead_attention(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.weight.data.zero_()


def outlier(model: Any) -> None:
    model.model.layers[0].input_layernorm.weight.data[3] = 1e4
    model.model.layers[1].mlp.up_proj.weight.data[9] *= 1e4


ODD_TOKEN = 35


def with_odd_token(tokens: Tensor) -> Tensor:
    """The tokens, with ODD_TOKEN in the middle of the first window, whatever the text has."""
    tokens = tokens.clone()
    tokens[0, tokens.shape[1] // 2] = ODD_TOKEN
    return tokens


def outlier_token(model: Any) -> None:
    """Whenever it is read, the hidden state is 1e4 times as large as that of others, in all layers."""
    model.model.embed_tokens.weight.data[ODD_TOKEN] *= 1e4


def silent_token(model: Any) -> None:
    """A hidden state of 0, as of a padding token that stands in the text."""
    model.model.embed_tokens.weight.data[ODD_TOKEN] = 0


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize(
    "damage",
    [dead_channel, dead_ffn, dead_attention, outlier, outlier_token, silent_token],
    ids=lambda one: one.__name__,
)
def test_odd_weights_never_crash(make_model, tokens, compress_small, damage, recipe: str) -> None:
    model = make_model("llama-gqa")
    damage(model)
    tokens = with_odd_token(tokens)
    model, report = compress_small(model, tokens, recipe=recipe, sparsity=0.3)
    assert torch.isfinite(model(tokens).logits).all()
    assert all(0 <= projection.error < 10 for projection in report.projections)


@pytest.mark.parametrize("damage", [outlier_token, silent_token], ids=lambda one: one.__name__)
def test_no_token_decides_alone(make_model, tokens, damage) -> None:
    """Under residual weights, one token of huge or of no norm leaves the second moment nearly what the others make it."""
    moments = {}
    tokens = with_odd_token(tokens)
    others = tokens[~(tokens == ODD_TOKEN).any(1)]
    for name, text in (("all", tokens), ("others", others)):
        model = make_model("llama-gqa")
        damage(model)
        layer = model.model.layers[0]
        probe = {"x": Probe(layer.self_attn.o_proj, moments=True, weighted=True)}
        moments[name] = stream_of(model, text).observe(0, layer, probe)["x"][0]
    assert len(others) < len(tokens)
    per_token = [stats.weight / stats.tokens for stats in moments.values()]
    assert 0.5 < per_token[0] / per_token[1] < 2
    assert relative(moments["all"].second_moment, moments["others"].second_moment) < 1


def one_window(tokens: Tensor) -> Tensor:
    return tokens[:1]


def short_windows(tokens: Tensor) -> Tensor:
    return tokens[:, :2]


def constant(tokens: Tensor) -> Tensor:
    return torch.full_like(tokens, 7)


def padded(tokens: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(tokens)
    mask[:4, :20] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("text", [one_window, short_windows, constant, padded], ids=lambda one: one.__name__)
def test_odd_texts_never_crash(make_model, tokens, compress_small, text, recipe: str, layers: int) -> None:
    model, report = compress_small(
        make_model("llama-gqa", num_hidden_layers=layers), text(tokens), recipe=recipe, sparsity=0.3
    )
    assert torch.isfinite(model(tokens).logits).all()
    assert 0.65 <= report.param_ratio <= 0.71


@pytest.mark.parametrize("sequential", ["layer", "sublayer"])
@pytest.mark.parametrize("method", ["awsvd", "svd", "afm", "second_moment"])
@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_methods_storages_and_orders_go_together(
    make_model, tokens, compress_small, method: str, storage: str, sequential: str
) -> None:
    for mlp in ("prune", "factorize"):
        allocation = "even" if mlp == "factorize" else "loss"
        model, report = compress_small(
            make_model("llama-biases"),
            recipe="best",
            attention_method=method,
            storage=storage,
            sequential=sequential,
            mlp_method=mlp,
            allocation=allocation,
        )
        assert torch.isfinite(model(tokens).logits).all()
        assert 0.45 <= report.param_ratio <= 0.51


def test_best_is_better_than_the_paper_on_what_it_has_seen(make_model, tokens, compress_small) -> None:
    """Random weights are hard to compress, but a norm that knows the loss should show."""
    windows = TokenWindows(tokens, "tokens", "")
    dense = make_model("llama-mha")
    with torch.no_grad():
        logits = dense(tokens).logits
    losses = {}
    for recipe in ("best", "lorap"):
        model, _ = compress_small(copy.deepcopy(dense), recipe=recipe, sparsity=0.2)
        with torch.no_grad():
            losses[recipe] = float((model(tokens).logits - logits).square().mean())
        assert lorap.evaluate(model, windows).nats > 0
    assert losses["best"] < losses["lorap"]


def test_two_runs_give_the_same_tensors(make_model, compress_small) -> None:
    for recipe in RECIPES:
        states = [compress_small(make_model("llama-gqa"), recipe=recipe)[0].state_dict() for _ in range(2)]
        assert list(states[0]) == list(states[1])
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
