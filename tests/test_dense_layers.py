"""Mixtures of experts some of whose layers have one FFN: each layer is treated as what it is."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
import torch
from commands import last_json, run
from families import assert_goes_on, config, logits, tiny, tiny_config, windows
from torch import nn

import lorap
from lorap.architectures import ARCHITECTURES, ATTENTION, MLP
from lorap.checkpoint.folders import CONFIG, read_tensors
from lorap.checkpoint.load import find_model, load_model
from lorap.checkpoint.validate import empty_model
from lorap.compression.estimate import ModelShape
from lorap.compression.estimate.sizes import planned_sizes
from lorap.compression.runs.run import RunOptions
from lorap.errors import ArchitectureError
from lorap.evaluation.info import counted_name, describe_model, format_info, kinds_of
from lorap.reports.run import REPORT

# What says which layers are dense, and how many of four are.
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"mlp_only_layers": [0, 2]},
    "qwen2_moe": {"decoder_sparse_step": 2},
    "glm4_moe": {"first_k_dense_replace": 2},
}


def model_of(family: str, **options: Any) -> Any:
    """Four layers; FFNs of 100 channels, experts of 48."""
    return tiny(family, num_hidden_layers=4, intermediate_size=100, **KINDS[family] | options)


@pytest.mark.parametrize("recipe", ["lorap", "best"])
@pytest.mark.parametrize("family", KINDS)
def test_what_was_counted_is_what_was_saved(family, recipe, tmp_path) -> None:
    model = model_of(family)
    row, before = ARCHITECTURES[family], {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = config(recipe=recipe, sparsity=0.3, correction_steps=0)
    model, report = lorap.compress(model, calibration=windows(), config=options, progress=False)
    layers = list(enumerate(row.decoder_layers(model)))
    packed = [row.experts(layer) is not None for _, layer in layers]
    assert sorted(packed) == [False, False, True, True]
    assert {(one.layer, one.role) for one in report.projections} == {(i, r) for i in range(4) for r in ATTENTION + MLP}
    assert [one.shape_before for one in report.by_role("up_proj")] == [
        (48, 64) if each else (100, 64) for each in packed
    ]
    lorap.save(model, tmp_path / "small", report=report)
    names = [row.module_name(index, role) for index, _ in layers for role in ATTENTION]
    names += [f"{row.ffn_name(index, layer)}.{role}" for index, layer in layers for role in (*MLP, "gate_up_proj")]

    def params(tensors: Any) -> int:
        return sum(
            math.prod(tensor.shape)
            for name, tensor in tensors.items()
            if any(name == own or name.startswith(f"{own}.") for own in names)
            if tuple(tensor.shape) != (1,) and tensor.dtype != "I64"
        )

    kept = params(read_tensors(tmp_path / "small")) / params(before)
    assert kept == pytest.approx(0.7, abs=0.03)
    assert report.param_ratio == pytest.approx(kept)
    for _ in range(2):  # with the report, and without it
        found = describe_model(find_model(tmp_path / "small"))
        assert found["param_ratio"] == pytest.approx(kept)
        assert "attention and FFN parameters kept, FFN width" in format_info(found)
        (tmp_path / "small" / REPORT).unlink(missing_ok=True)
    after = load_model(find_model(tmp_path / "small"))
    assert torch.equal(logits(after), logits(model))
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "small")), logits(model))
    others = [name for name in before if not any(name == own or name.startswith(f"{own}.") for own in names)]
    assert all(torch.equal(before[name], after.state_dict()[name]) for name in others)
    settings = json.loads((tmp_path / "small" / CONFIG).read_text())
    assert (settings["moe_intermediate_size"], settings["intermediate_size"]) == (48, 100)
    marks = settings["quantization_config"]
    assert marks["dense_intermediate_size"] is None
    assert marks["intermediate_sizes"] == {
        f"model.layers.{index}.mlp{'.experts' if each else ''}": one.shape_after[1]
        for index, (each, one) in enumerate(zip(packed, report.by_role("down_proj"), strict=True))
    }


@pytest.mark.parametrize("recipe", ["lorap", "best"])
@pytest.mark.parametrize("family", ["glm4_moe", "gemma4_text", "qwen3_5_text", "deepseek_v3"])
def test_planned_sizes_are_those_of_the_checkpoint(family, recipe, tmp_path) -> None:
    model = model_of(family) if family in KINDS else tiny(family)
    model.save_pretrained(tmp_path / "dense")
    chosen = config(
        recipe=recipe, sparsity=0.4, allocation="paper" if recipe == "lorap" else "even", correction_steps=0
    )
    shape = ModelShape.read(find_model(tmp_path / "dense"))
    assert sum(kind.num_layers for kind in shape.kinds) == shape.num_layers
    sizes = planned_sizes(shape, chosen)
    small, report = lorap.compress(model, calibration=windows(), config=chosen, progress=False)
    lorap.save(small, tmp_path / "small", report=report)
    found = describe_model(find_model(tmp_path / "small"))
    assert {kind: counts["params"] for kind, counts in found["kinds"].items()} == dict(sizes.params)
    assert {kind: counts["params_before"] for kind, counts in found["kinds"].items()} == dict(shape.params)
    assert found["bytes"] == sum(sizes.nbytes.values())
    assert found["intermediate_size"] == sorted({layer.intermediate_size for layer in sizes.layers})
    assert found["ranks"] == {
        role: sorted({layer.ranks[role] for layer in sizes.layers if role in layer.ranks}) for role in found["ranks"]
    }
    options = ["--recipe", recipe, "--allocation", chosen.allocation, "--sparsity", 0.4, "--json"]
    told = last_json(run("plan", tmp_path / "dense", *options))
    assert (told["params"], told["bytes"], told["seconds"]) == (sizes.total, found["bytes"], None)
    assert [one["intermediate_size"] for one in told["layers"]] == [one.intermediate_size for one in sizes.layers]
    assert told["remarks"] == [
        f"The layers are of {len(shape.kinds)} kinds, so no time is told: none of them stands for all."
    ]


def test_the_channels_of_a_dense_layer_are_judged_on_all_tokens() -> None:
    model = model_of("glm4_moe")
    read, mlp = [], model.model.layers[0].mlp
    handle = mlp.register_forward_pre_hook(lambda _module, args: read.append(args[0].double().flatten(0, 1)))
    with torch.no_grad():
        model(windows())
    handle.remove()
    gate, up, down = (getattr(mlp, role).weight.data.double() for role in MLP)
    inner = nn.functional.silu(read[0] @ gate.T) * (read[0] @ up.T)
    inputs = read[0].square().sum(0)
    norms = (gate.square() @ inputs).sqrt() + (up.square() @ inputs).sqrt()
    norms += (down.square().sum(0) * inner.square().sum(0)).sqrt()
    options = config(recipe="lorap", sparsity=0.3, sublayers=("mlp",), least_important_kept=0.0)
    model, _ = lorap.compress(model, calibration=windows(), config=options, progress=False)
    kept = norms.argsort(descending=True)[:70].sort().values
    after = model.model.layers[0].mlp
    assert torch.equal(after.gate_proj.weight.data.double(), gate[kept])
    assert torch.equal(after.down_proj.weight.data.double(), down[:, kept])


def test_layers_that_were_alike_stay_alike() -> None:
    options = config(recipe="best", sparsity=0.4, shapes="uniform", correction_steps=0)
    _, report = lorap.compress(model_of("qwen3_moe"), calibration=windows(), config=options, progress=False)
    widths = [one.shape_after[1] for one in report.by_role("down_proj")]
    assert (widths[0], widths[1]) == (widths[2], widths[3])
    assert widths[0] != widths[1] < 48
    assert report.param_ratio == pytest.approx(0.6, abs=0.02)


def test_a_run_goes_on_behind_a_finished_layer_of_either_kind(tmp_path, monkeypatch) -> None:
    assert_goes_on(model_of("qwen2_moe"), tmp_path, monkeypatch, before=2)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_of_either_kind_is_verified(layer) -> None:
    """Layer 0 is dense, layer 1 has experts."""
    model = model_of("qwen3_moe")
    mlp = model.model.layers[layer].mlp
    if layer:
        mlp.experts.forward = lambda x, *_: x
    else:
        mlp.forward = lambda x: mlp.down_proj(nn.functional.gelu(mlp.gate_proj(x)) * mlp.up_proj(x))
    with pytest.raises(ArchitectureError, match=rf"model\.layers\.{layer} is not what lorap knows of qwen3_moe models"):
        lorap.compress(model, calibration=windows(), config=config(recipe="lorap"), progress=False)


@pytest.mark.parametrize("family", ["glm4_moe", "hunyuan_v1_moe", "deepseek_v3", "flint", "kimi_linear"])
def test_routers_keep_their_digits_in_a_model_of_16_bits(family, tmp_path) -> None:
    """Rounded, the biases by which experts are chosen would choose others; transformers holds them in float32."""
    model = tiny(family).bfloat16()
    routers = [name for name in model.state_dict() if ".gate." in name or name.endswith((".sinks", ".dt_bias"))]
    exact = {name: torch.rand(model.state_dict()[name].shape) for name in routers}
    for name, value in exact.items():
        owner, _, leaf = name.rpartition(".")
        parts = vars(model.get_submodule(owner))
        kind = "_parameters" if leaf in parts["_parameters"] else "_buffers"
        parts[kind][leaf] = nn.Parameter(value) if kind == "_parameters" else value
    model.save_pretrained(tmp_path / "dense")
    expected = type(model).from_pretrained(tmp_path / "dense").state_dict()
    assert exact
    assert all(torch.equal(expected[name], value) for name, value in exact.items())
    source = find_model(tmp_path / "dense")
    chosen = config(recipe="lorap", sparsity=0.3)
    lorap.compress_to_folder(
        tmp_path / "dense", tmp_path / "small", chosen, RunOptions(calibration=windows(), progress=False)
    )
    stored = load_model(find_model(tmp_path / "small")).state_dict()
    found = {"paged": load_model(source, paged=True).state_dict(), "written": stored}
    if family == "glm4_moe":  # in the others the class says so where it makes the layer, which a cast does not see
        whole = type(model).from_pretrained(tmp_path / "dense", dtype=torch.float32)
        found["cast"] = lorap.optimize_for_inference(whole, dtype=torch.bfloat16).state_dict()
    for what, state in found.items():
        assert all(state[name].dtype == torch.float32 for name in exact), what
        if what != "paged":
            assert all(torch.equal(state[name], value) for name, value in exact.items()), what
    assert {tensor.dtype for name, tensor in found["paged"].items() if name not in exact} == {torch.bfloat16}
    sizes = planned_sizes(ModelShape.read(source), chosen)
    assert describe_model(find_model(tmp_path / "small"))["bytes"] == sum(sizes.nbytes.values())


def test_layers_may_ask_unlike_numbers_of_experts(tmp_path) -> None:
    tiny("hunyuan_v1_moe", num_experts_per_tok=[1, 2]).save_pretrained(tmp_path)
    assert ModelShape.read(find_model(tmp_path)).experts_per_token == 2


@pytest.mark.parametrize("family", [name for name, row in ARCHITECTURES.items() if row.packed])
def test_nothing_else_counts_as_a_projection(family) -> None:
    """Attention of AFMoE has a gate, and experts that all tokens read have the names of others."""
    model, row = empty_model(tiny_config(family)), ARCHITECTURES[family]
    found, expected = Counter[str](), Counter[str]()
    for name, weight in model.named_parameters():
        for kind in (kinds := kinds_of(counted_name(name, row))):
            found[kind] += 0 if name.endswith(".bias") else weight.numel() // len(kinds)
    for layer in row.decoder_layers(model):
        experts = row.experts(layer)
        for role, shape in row.shapes(layer).items():
            expected[role] += math.prod(shape) * (experts.count if experts and role in MLP else 1)
    assert {role: found[role] for role in (*ATTENTION, *MLP) if found[role]} == dict(expected)
