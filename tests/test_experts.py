"""Mixtures of experts: each expert is pruned and refitted with its own tokens, and what is saved is what was counted."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import assert_goes_on, config, logits, tiny, windows
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorap
import lorap.architectures
from lorap.architectures import ARCHITECTURES, MLP
from lorap.calibration.context import DecoderContext
from lorap.calibration.contract import verify_contract
from lorap.calibration.sensitivity import layer_sensitivities
from lorap.calibration.windows import TokenWindows
from lorap.checkpoint.folders import CONFIG, WEIGHTS, read_tensors
from lorap.checkpoint.load import find_model, load_model
from lorap.compression.prices import PRICE_RIDGE, PRICE_SHRINKAGE, Prices
from lorap.compression.runs.run import RunOptions
from lorap.compression.shrinkage import output_metric, shrunk
from lorap.compression.stored_bytes import DenseModel
from lorap.errors import ArchitectureError, CheckpointError, ConfigError
from lorap.evaluation.info import describe_model
from lorap.requirements import FEW_TOKENS

FAMILY = "qwen3_moe"
# All that the recipe `best` does within a layer.
FITTED: dict[str, Any] = {
    "recipe": "best",
    "allocation": "even",
    "output_weighting": "none",
    "correction_steps": 0,
    "metric_shrinkage": 0.0,
    "repair_ridge": 0.1,
    "channel_score": "output",
    "sparsity": 0.3,
}


def odd(**options: Any) -> Any:
    """Seven experts of 37 channels; two of them tie for every token, one is chosen by hardly any and one by none at all."""
    model = tiny(FAMILY, num_experts=7, moe_intermediate_size=37, num_hidden_layers=1, **options)
    model.set_experts_implementation("eager")  # grouped_mm wants rows of 16 bytes
    router = model.model.layers[0].mlp.gate
    router.weight.data[4] = router.weight.data[3]

    def reroute(_module: nn.Module, _args: Any, output: Any) -> Any:
        scores, weights, chosen = output
        chosen = chosen.masked_fill(chosen == 6, 0)
        rare = (chosen == 5) & (torch.arange(len(chosen)) % 16 > 0)[:, None]
        return scores, weights, chosen.masked_fill(rare, 1)

    router.register_forward_hook(reroute)
    return model


def routed(model: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of the first layer's experts: which tokens each reads, (tokens, hidden_size) of these and their weights in float64; of one
    that few reach all tokens of the layer, with weight 1."""
    found: list[Any] = []
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _module, args: found.append(args))
    with torch.no_grad():
        model(windows())
    handle.remove()
    ((x, chosen, weights),) = found
    for expert in range(len(experts.down_proj)):
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        if len(rows) < FEW_TOKENS:
            yield rows, x.double(), torch.ones(len(x), dtype=torch.float64)
        else:
            yield rows, x[rows].double(), weights[rows, places].double()


def of_experts(model: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Gate, up and down of each, in float64."""
    experts = model.model.layers[0].mlp.experts
    return [
        (*gate_up.data.double().chunk(2), down.data.double())
        for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True)
    ]


def kept_channels(before: Tensor, after: Tensor) -> Tensor:
    """Which rows of ``before`` those of ``after`` are."""
    same = (after[:, None] == before[None]).all(-1)
    assert same.sum(1).eq(1).all()
    return same.nonzero()[:, 1]


def inner_of(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(x @ gate.T) * (x @ up.T)


def lowest_and_best(scores: Tensor, width: int, lowest: int = 0) -> Tensor:
    order = scores.argsort()
    return torch.cat((order[:lowest], order[len(order) - width + lowest :])).sort().values


def test_each_expert_is_pruned_by_its_own_tokens() -> None:
    model = odd()
    dense, tokens = of_experts(model), list(routed(model))
    counts = [len(rows) for rows, _, _ in tokens]
    assert counts[6] == 0 < counts[5] < FEW_TOKENS < min(counts[:5])
    model, report = lorap.compress(
        model,
        calibration=windows(),
        config=config(recipe="lorap", sparsity=0.3, sublayers="mlp", least_important_kept=0.03),
        progress=False,
    )
    width, total = 37 - int(0.33 * 37) + 1, sum(counts)
    told = {role: report.by_role(role)[0] for role in MLP}
    errors = dict.fromkeys(MLP, 0.0)
    for expert, ((gate, up, down), (rows, x, weights)) in enumerate(zip(dense, tokens, strict=True)):
        squares = weights.square()
        inputs = x.square().sum(0)
        inner = inner_of(x, gate, up).square().T @ squares * (len(x) / squares.sum())
        parts = {"gate_proj": gate.T, "up_proj": up.T, "down_proj": down}
        reads = {"gate_proj": inputs[:, None], "up_proj": inputs[:, None], "down_proj": inner}
        norms = {role: (part.square() * reads[role]).sum(0).sqrt() for role, part in parts.items()}
        expected = lowest_and_best(sum(norms.values()), width, lowest=1)
        after = of_experts(model)[expert]
        assert torch.equal(kept_channels(gate, after[0]), expected), expert
        assert torch.equal(after[1], up[expected]), expert
        assert torch.equal(after[2], down[:, expected]), expert
        gone = torch.ones(37, dtype=torch.bool).index_fill(0, expected, False)
        for role in MLP:
            found, share = told[role].experts[expert], float(norms[role][gone].norm() / norms[role].norm())
            assert (found.tokens, found.by_all_tokens) == (len(rows), len(rows) < FEW_TOKENS)
            assert found.error == pytest.approx(share, rel=1e-5)
            errors[role] += len(rows) * share**2 / total
    assert {role: one.error**2 for role, one in told.items()} == pytest.approx(errors, rel=1e-5)
    (line,) = (line for line in report.table().splitlines() if line.startswith("experts:") and " saw " in line)
    assert re.search(rf"2 of 7 saw fewer than {FEW_TOKENS} tokens .*layer 0: 2 of 7", line)


@pytest.mark.parametrize("weighting", ["none", "residual"])
def test_each_expert_is_refitted_to_its_own_tokens(weighting) -> None:
    model = odd()
    dense, tokens = of_experts(model), list(routed(model))
    hidden = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _module, args: hidden.append(args[0]))
    with torch.no_grad():
        model(windows())
    handle.remove()
    sizes = hidden[0].double().square().mean(-1).flatten()
    sizes = sizes.clamp(min=float(sizes.median()) / 100)
    options = FITTED | {"token_weighting": weighting, "sublayers": "mlp"}
    model, report = lorap.compress(model, calibration=windows(), config=config(**options), progress=False)
    for expert, ((gate, up, down), (rows, x, weights)) in enumerate(zip(dense, tokens, strict=True)):
        after, told = of_experts(model)[expert], report.by_role("down_proj")[0].experts[expert]
        kept = kept_channels(gate, after[0])
        assert len(kept) == 37 - int(0.3 * 37)
        assert torch.equal(after[1], up[kept])
        few = len(rows) < FEW_TOKENS
        assert (told.tokens, told.by_all_tokens) == (len(rows), few)
        counted = weights.square()
        if weighting == "residual":
            counted = counted / (sizes if few else sizes[rows])
        inner = inner_of(x, gate, up) * counted.sqrt()[:, None] / counted.sum().sqrt()
        scores = inner.square().sum(0).sqrt() * down.norm(dim=0)
        assert torch.equal(kept, lowest_and_best(scores, len(kept))), expert
        pull = math.sqrt(0.1 * float(inner.square().sum(0).mean()))
        read = torch.cat((inner[:, kept], pull * torch.eye(len(kept), dtype=torch.float64)))
        gave = torch.cat((inner @ down.T, pull * down[:, kept].T))
        expected = torch.linalg.lstsq(read, gave).solution.T
        torch.testing.assert_close(after[2], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        lost = (inner @ down.T - inner[:, kept] @ expected.T).norm() / (inner @ down.T).norm()
        assert told.error == pytest.approx(float(lost), rel=1e-3)


def test_prices_are_of_the_tokens_of_each_expert() -> None:
    model = odd()
    (ids, experts), found = (windows(), model.model.layers[0].mlp.experts), []

    def note(_module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        found.append((*args, output))

    handle = experts.register_forward_hook(note)
    loss = nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    loss.backward()
    handle.remove()
    x, chosen, weights, output = (one.detach() if one is not found[0][3] else one for one in found[0])
    assert output.grad is not None
    x, g = x.double(), output.grad.double()
    ratio = g.norm(dim=1) / x.norm(dim=1)
    expected = (g / ratio.clamp(min=1e-30)[:, None]).T @ g / len(g)  # nobody predicts from the last token of a window
    context = DecoderContext.of(model, device=torch.device("cpu"))
    walk = layer_sensitivities(context, TokenWindows(ids, "", ""), lambda layer: {"down_proj": layer.mlp.experts})
    prices = Prices(config(sparsity=0.3, width_multiple=1), DenseModel.of(model, context.architecture))
    metric = output_metric(expected)
    for index, sensitivities in walk:
        sensitivity = sensitivities["down_proj"]
        torch.testing.assert_close(sensitivity.output.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
        prices.add_experts(index, sensitivity, metric)
    costs = dict.fromkeys((1, 20, 36), 0.0)
    for expert, (gate, up, down) in enumerate(of_experts(model)):
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        inner = inner_of(x[rows], gate, up) * (weights[rows, places].double() * ratio[rows].sqrt())[:, None]
        moment = shrunk(inner.T @ inner / len(x), PRICE_SHRINKAGE)
        if not len(rows):
            continue
        order = ((down * (metric.double() @ down)).sum(0) * moment.diagonal()).argsort(descending=True)
        moment = moment + PRICE_RIDGE * moment.diagonal().mean() * torch.eye(37)
        for width in costs:
            kept, gone = order[:width], order[width:]
            left = moment[gone][:, gone] - moment[gone][:, kept] @ torch.linalg.solve(
                moment[kept][:, kept], moment[kept][:, gone]
            )
            costs[width] += float((metric.double() @ down[:, gone] @ left @ down[:, gone].T).trace()) / 2
    told = {candidate.size: candidate for candidate in prices.curves[0, "down_proj"]}
    assert {width: told[width].cost for width in costs} == pytest.approx(costs, rel=1e-3)
    assert {told[width].params for width in costs} == {7 * 3 * 64 * width for width in costs}


@pytest.mark.parametrize("options", [{"recipe": "lorap", "sparsity": 0.3}, FITTED], ids=["lorap", "fitted"])
def test_what_was_counted_is_what_was_saved(options, tmp_path) -> None:
    model = tiny(FAMILY, moe_intermediate_size=80)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "dense")
    run = RunOptions(calibration=windows(), progress=False)
    report = lorap.compress_to_folder(tmp_path / "dense", tmp_path / "small", config(**options), run)
    stored, ours = read_tensors(tmp_path / "small"), re.compile(r"mlp\.experts\.|[qkvo]_proj\.")

    def params(tensors: Any) -> int:
        return sum(
            math.prod(tensor.shape)
            for name, tensor in tensors.items()
            if ours.search(name) and tuple(tensor.shape) != (1,) and tensor.dtype != "I64"
        )

    kept = params(stored) / params(before)
    assert report.param_ratio == pytest.approx(kept)
    assert describe_model(find_model(tmp_path / "small"))["param_ratio"] == pytest.approx(kept)
    assert kept == pytest.approx(1 - options["sparsity"], abs=0.02)
    assert {one.shape_after[1] % 8 for one in report.by_role("down_proj")} == {0}
    after = load_model(find_model(tmp_path / "small")).state_dict()
    others = [name for name in before if not ours.search(name)]
    assert sum("mlp.gate.weight" in name for name in others) == 2
    assert all(torch.equal(before[name], after[name]) for name in others)
    settings = json.loads((tmp_path / "small" / CONFIG).read_text())
    assert settings["hidden_act"] == "silu_needs_import_lorap"
    assert settings["quantization_config"]["dense_intermediate_size"] == 80
    again = lorap.CompressionReport.from_dict(json.loads((tmp_path / "small" / "lorap_report.json").read_text()))
    assert again.by_role("up_proj") == report.by_role("up_proj")


def test_a_run_goes_on_behind_finished_experts(tmp_path, monkeypatch) -> None:
    assert_goes_on(tiny(FAMILY), tmp_path, monkeypatch, before=1)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_read_from_files_that_hold_each_by_itself(family, tmp_path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path / "dense")
    up = {"mixtral": "block_sparse_moe.experts.3.w3", "qwen3_moe": "mlp.experts.3.up_proj"}[family]
    stored = load_file(tmp_path / "dense" / WEIGHTS)
    name = f"model.layers.1.{up}.weight"
    assert name in stored
    paged = load_model(find_model(tmp_path / "dense"), paged=True)
    layer = paged.model.layers[1]
    layer.offloaded.load(layer, torch.device("cpu"))
    assert torch.equal(layer.mlp.experts.gate_up_proj, model.model.layers[1].mlp.experts.gate_up_proj)
    assert torch.equal(layer.mlp.experts.down_proj, model.model.layers[1].mlp.experts.down_proj)
    own = stored.pop(name)
    save_file(stored, tmp_path / "dense" / WEIGHTS)
    with pytest.raises(
        CheckpointError, match=rf"5 experts in .*model\.layers\.1.*no {up.rpartition('.')[2]} of expert 3"
    ):
        find_model(tmp_path / "dense")
    save_file(stored | {name: own[:-1]}, tmp_path / "dense" / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}.* of shape \(47, 64\).*\(48, 64\)"):
        find_model(tmp_path / "dense")


def test_one_width_for_all_layers_needs_no_lorap(tmp_path) -> None:
    options = config(recipe="lorap", sparsity=0.3, sublayers="mlp")
    model, report = lorap.compress(tiny(FAMILY), calibration=windows(), config=options, progress=False)
    lorap.save(model, tmp_path / "small", report=report)
    settings = json.loads((tmp_path / "small" / CONFIG).read_text())
    assert settings["moe_intermediate_size"] == 32
    assert "sparsity 0.3 was asked for and 0.3333 removed" in report.table()
    assert settings["hidden_act"] == "silu"
    del settings["quantization_config"]
    (tmp_path / "small" / CONFIG).write_text(json.dumps(settings))
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "small")), logits(model))


def test_one_budget_for_attention_and_experts() -> None:
    """Padding and the choice of the output metric for channels included; attention alone is corrected."""
    ids = windows()
    mask = torch.ones_like(ids)
    mask[::2, 20:] = 0
    model = tiny(FAMILY, moe_intermediate_size=80)
    options = config(recipe="best", sparsity=0.4, channel_score="output", correction_steps=0)
    model, report = lorap.compress(
        model, calibration={"input_ids": ids, "attention_mask": mask}, config=options, progress=False
    )
    assert report.param_ratio == pytest.approx(0.6, abs=0.005)
    told = report.by_role("down_proj")
    assert {one.shape_after[1] % 8 for one in told} == {0}
    assert {sum(expert.tokens for expert in one.experts) for one in told} == {2 * int(mask.sum())}
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_right_rows_pass(dtype, implementation) -> None:
    for family in ("mixtral", "olmoe", "qwen3_moe"):
        model = tiny(family).to(dtype)
        model.set_experts_implementation(implementation)
        verify_contract(DecoderContext.of(model, device=torch.device("cpu")))


def _with_gelu(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.gelu(gate) * up


def _swapped(self: Any, gate_up: Tensor) -> Tensor:
    up, gate = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * up


@pytest.mark.parametrize("mistake", ["activation", "swapped", "path", "passed by", "bias"])
def test_a_wrong_row_is_refused(mistake, monkeypatch) -> None:
    model, row = tiny(FAMILY), ARCHITECTURES[FAMILY]
    said = r"model\.layers\.0\.mlp\.experts gives is not the sum of .*relative difference is 0\.\d+"
    experts = model.model.layers[0].mlp.experts
    if mistake == "activation":
        monkeypatch.setattr(type(experts), "_apply_gate", _with_gelu)
    elif mistake == "swapped":
        monkeypatch.setattr(type(experts), "_apply_gate", _swapped)
    elif mistake == "path":
        row, said = replace(row, packed=replace(row.packed, path="mlp.gate")), r"mlp\.gate is a Qwen3MoeTopKRouter"
    elif mistake == "passed by":
        model.model.layers[0].mlp.forward = lambda x: (
            model.model.layers[0]
            .mlp.experts.forward(x.flatten(0, 1), *reversed(model.model.layers[0].mlp.gate(x.flatten(0, 1))[1:]))
            .view_as(x)
        )
        said = r"model\.layers\.0\.mlp\.experts is called 0 times"
    else:
        experts.down_proj_bias = nn.Parameter(torch.zeros(5, 64))
        said = r"mlp\.experts is a Qwen3MoeExperts with .*down_proj_bias"
    monkeypatch.setattr(lorap.architectures, "ARCHITECTURES", {FAMILY: row})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ArchitectureError, match=said):
        lorap.compress(model, calibration=windows(), config=config(recipe="lorap"), progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recipe": "flap"}, "bias_compensation .*qwen3_moe"),
        ({"size": "1MB"}, "size"),
        ({"bits_per_weight": 4.0}, "bits_per_weight"),
        ({"weights": "int8"}, "weights int8 .*qwen3_moe.*weights float"),
        ({"target": "stock"}, "target stock.*target lorap"),
        ({"mlp_method": "factorize"}, "mlp_method factorize.*mlp_method prune"),
    ],
)
def test_what_cannot_be_done_to_experts_is_said(options, said) -> None:
    with pytest.raises(ConfigError, match=said):
        lorap.compress(
            tiny(FAMILY), calibration=windows(), config=config(**({"recipe": "lorap"} | options)), progress=False
        )


def test_a_mixture_of_one_expert_is_a_mixture() -> None:
    """Widths of whole blocks, without which transformers cannot run it, and the same refusals."""
    model = tiny("mixtral", num_local_experts=1, num_experts_per_tok=1)
    chosen = config(recipe="lorap", sparsity=0.35)
    model, report = lorap.compress(model, calibration=windows(), config=chosen, progress=False)
    assert model.model.layers[0].mlp.experts.down_proj.shape == (1, 64, 24)
    assert report.by_role("down_proj")[0].shape_after == (64, 24)
    assert logits(model).isfinite().all()
    for options, said in (({"weights": "int4"}, "weights int4"), ({"mlp_method": "factorize"}, "mlp_method")):
        model = tiny("mixtral", num_local_experts=1, num_experts_per_tok=1)
        with pytest.raises(ConfigError, match=said):
            lorap.compress(model, calibration=windows(), config=replace(chosen, **options), progress=False)


def test_commands_that_do_not_know_experts_say_so(tmp_path) -> None:
    with pytest.raises(ArchitectureError, match="cannot quantize a model of type qwen3_moe"):
        lorap.quantize(tiny(FAMILY), "int4")
    with pytest.raises(ArchitectureError, match="cannot export a model of type qwen3_moe"):
        lorap.export_stock(tiny(FAMILY), tmp_path / "stock")


def test_widths_of_other_modules_are_refused(tmp_path) -> None:
    model, report = lorap.compress(
        tiny(FAMILY), calibration=windows(), config=config(recipe="lorap", sparsity=0.3), progress=False
    )
    lorap.save(model, tmp_path / "small", report=report)
    path = tmp_path / "small" / CONFIG
    for name, said in (("model.layers.0.mlp.gate", "no such layer"), ("model.layers.9.mlp.experts", "no such layer")):
        settings = json.loads(path.read_text())
        settings["quantization_config"]["intermediate_sizes"] = {name: 32}
        path.write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)}.*{said}"):
            find_model(tmp_path / "small")
