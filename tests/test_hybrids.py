"""Models that have attention in some layers only: what is compressed in the others, and what says no."""

from __future__ import annotations

import math

import pytest
import torch
from families import HYBRID, config, tiny, windows
from safetensors.torch import load_file, save_file

import lorap
from lorap.architectures import ARCHITECTURES, MLP, PROJECTIONS
from lorap.checkpoint.folders import WEIGHTS, read_tensors
from lorap.checkpoint.load import find_model, load_model
from lorap.evaluation.info import describe_model, kind_of
from lorap.evaluation.inspection.inspect import inspect_model

KINDS = ["linear_attention", "full_attention", "linear_attention"]
OPTIONS = HYBRID | {"layer_types": KINDS, "num_hidden_layers": len(KINDS)}


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "lorap", "sparsity": 0.5},
        {"recipe": "best", "sparsity": 0.3, "shapes": "uniform", "correction_steps": 0},
        {"recipe": "flap", "sparsity": 0.3},
        {"recipe": "best", "sparsity": 0.3, "storage": "factors", "correction_steps": 0},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_the_share_that_was_asked_for_is_gone_from_what_is_ours(options, tmp_path) -> None:
    model = tiny("qwen3_5_text", **OPTIONS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model, report = lorap.compress(model, calibration=windows(), config=config(**options), progress=False)
    ours = {(one.layer, one.role) for one in report.projections}
    assert ours == {
        (index, role) for index, kind in enumerate(KINDS) for role in (PROJECTIONS if "full" in kind else MLP)
    }
    lorap.save(model, tmp_path / "small", report=report)
    stored = read_tensors(tmp_path / "small")
    names = [ARCHITECTURES["qwen3_5_text"].module_name(*one) for one in ours]

    def params(tensors: dict) -> int:
        own = [tensor for name, tensor in tensors.items() if name.startswith(tuple(f"{name}." for name in names))]
        return sum(math.prod(tensor.shape) for tensor in own if tensor.shape != (1,) and tensor.dtype not in ("I64",))

    assert params(stored) / params(before) == pytest.approx(1 - options["sparsity"], abs=0.02)
    assert describe_model(find_model(tmp_path / "small"))["param_ratio"] == pytest.approx(
        params(stored) / params(before)
    )
    after = model.state_dict()
    others = [name for name in before if not name.startswith(tuple(f"{name}." for name in names))]
    assert sum("linear_attn" in name for name in others) >= 2 * 6
    assert all(torch.equal(before[name], after[name]) for name in others)


def test_one_width_for_unlike_layers_is_refused() -> None:
    with pytest.raises(lorap.ConfigError, match=r"layer 0 of this qwen3_5_text model has no attention.*sublayers mlp"):
        lorap.compress(
            tiny("qwen3_5_text", **OPTIONS),
            calibration=windows(),
            config=config(target="stock", sparsity=0.2),
            progress=False,
        )
    alone = config(target="stock", sparsity=0.25, sublayers=("mlp",))
    _, report = lorap.compress(tiny("qwen3_5_text", **OPTIONS), calibration=windows(), config=alone, progress=False)
    assert {one.shape_after for one in report.by_role("down_proj")} == {(64, 75)}


def test_spectra_are_of_layers_that_have_attention() -> None:
    model = tiny("qwen3_5_text", **OPTIONS)
    with pytest.raises(lorap.ArchitectureError, match="layer 0 has no attention of q, k, v and o"):
        inspect_model(model, calibration=None, progress=False)
    assert inspect_model(model, layers=[1], calibration=None, progress=False).layers == (1,)
    with pytest.raises(lorap.ArchitectureError, match="no layer of this model has"):
        inspect_model(tiny("deepseek_v3"), calibration=None, progress=False)


def test_what_files_hold_in_parts_is_joined(tmp_path) -> None:
    """OLMo Hybrid: the convolutions of q, k and v are three tensors in files, and one in the model."""
    model = tiny("olmo_hybrid")
    expected = model.model.layers[0].linear_attn.conv1d.weight
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    parts = [f"model.layers.0.linear_attn.{part}_conv1d.weight" for part in "qkv"]
    assert torch.equal(torch.cat([stored[name] for name in parts]), expected)
    for paged in (False, True):
        opened = load_model(find_model(tmp_path), paged=paged)
        layer = opened.model.layers[0]
        if paged:
            layer.offloaded.load(layer, torch.device("cpu"))
        assert torch.equal(layer.linear_attn.conv1d.weight, expected)
    save_file({name: tensor for name, tensor in stored.items() if name != parts[1]}, tmp_path / WEIGHTS)
    with pytest.raises(lorap.CheckpointError, match=r"missing, first model\.layers\.0\.linear_attn\.conv1d\.weight"):
        find_model(tmp_path)
    save_file(stored | {parts[2]: stored[parts[2]][..., :3].contiguous()}, tmp_path / WEIGHTS)
    with pytest.raises(lorap.CheckpointError, match=r"v_conv1d\.weight.* of shape \(\d+, 1, 3\).*\(\d+, 1, 4\)"):
        find_model(tmp_path)


@pytest.mark.parametrize("recipe", ["lorap", "best"])
def test_latent_attention_stays_and_is_no_part_of_the_share(recipe, tmp_path) -> None:
    """DeepSeek-V3, whose files call two of its projections as those of attention are called."""
    model = tiny("deepseek_v3")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen = config(recipe=recipe, sparsity=0.3, correction_steps=0)
    model, report = lorap.compress(model, calibration=windows(), config=chosen, progress=False)
    assert report.config.sublayers == ("mlp",)
    assert {one.role for one in report.projections} == {*MLP}
    after = model.state_dict()
    others = [name for name in before if "self_attn" in name]
    assert len(others) == 2 * 7
    assert all(torch.equal(before[name], after[name]) for name in others)
    lorap.save(model, tmp_path / "small", report=report)
    found = describe_model(find_model(tmp_path / "small"))
    assert found["param_ratio"] == pytest.approx(report.param_ratio)
    assert "Attention" not in (tmp_path / "small" / "README.md").read_text()
    with pytest.raises(
        lorap.ConfigError, match=r"deepseek_v3 models have no attention of q, k, v and o.*sublayers mlp"
    ):
        lorap.compress(
            tiny("deepseek_v3"),
            calibration=windows(),
            config=config(recipe=recipe, sublayers=("self_attn",)),
            progress=False,
        )


def test_projections_of_other_attention_are_not_counted() -> None:
    """OLMo Hybrid calls them as those of attention are called."""
    assert kind_of("model.layers.0.linear_attn.q_proj.weight") == "other"
    assert kind_of("model.layers.1.self_attn.q_proj.weight") == "q_proj"
