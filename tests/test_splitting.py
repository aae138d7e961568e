"""Families that store projections as one matrix: split where lorap works on them, joined where another host reads them."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import config, logits, tiny, windows
from safetensors.torch import load_file, save_file

import lorap
from lorap.architectures import known_architecture
from lorap.checkpoint.build import join_model
from lorap.checkpoint.folders import WEIGHTS
from lorap.checkpoint.load import find_model, load_model
from lorap.checkpoint.paging import in_memory
from lorap.errors import ArchitectureError, CheckpointError, ConfigError

# 4 heads and 2 of keys and values, of 16; so q has rows 0 to 63, k 64 to 95 and v 96 to 127.
ROWS = {"q_proj": (0, 64), "k_proj": (64, 96), "v_proj": (96, 128), "gate_proj": (0, 100), "up_proj": (100, 200)}


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("splitting") / "dense"
    tiny("phi3").save_pretrained(folder)
    return folder


def assert_rows(model: Any, stored: dict[str, torch.Tensor]) -> None:
    for index in (0, 1):
        layer = model.model.layers[index]
        with in_memory(layer):
            for role, (begin, end) in ROWS.items():
                part, whole = ("mlp", "gate_up_proj") if role in ("gate_proj", "up_proj") else ("self_attn", "qkv_proj")
                expected = stored[f"model.layers.{index}.{part}.{whole}.weight"][begin:end]
                assert torch.equal(layer.get_parameter(f"{part}.{role}.weight"), expected), role


def test_each_projection_has_its_rows(phi: Path) -> None:
    stored, whole, dense = load_file(phi / WEIGHTS), load_model(find_model(phi)), tiny("phi3")
    assert_rows(whole, stored)
    assert_rows(load_model(find_model(phi), paged=True), stored)
    assert torch.equal(logits(whole), logits(dense))
    join_model(whole)
    assert type(whole.model.layers[0].mlp) is type(dense.model.layers[0].mlp)
    assert whole.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in whole.state_dict().items())
    assert torch.equal(logits(whole), logits(dense))


@pytest.mark.parametrize("weights", ["int4", "tcq3"])
@pytest.mark.parametrize("family", ["phi3", "glm4"])
def test_split_modules_are_copied_and_pickled(family: str, weights: Any) -> None:
    chosen = lorap.CompressionConfig(sparsity=0, weights=weights, num_calibration_samples=2, calibration_seq_len=16)
    model, _ = lorap.compress(tiny(family), calibration=windows(), config=chosen, progress=False)
    expected, kinds = logits(model), [type(module) for module in model.modules()]
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(module) for module in again.modules()] == kinds
        assert torch.equal(logits(again), expected)


def test_a_matrix_of_files_alone_becomes_the_projections_of_the_class(tmp_path: Path) -> None:
    """Sarvam: q, k and v are one matrix in files, under a name of its own, and three linear layers in the model."""
    model = tiny("sarvam_moe", attention_bias=True)
    model.save_pretrained(tmp_path)
    stored, layers = load_file(tmp_path / WEIGHTS), model.model.layers
    opened = load_model(find_model(tmp_path), paged=True)
    for index in (0, 1):
        layer = opened.model.layers[index]
        with in_memory(layer):
            for role in ("q_proj", "k_proj", "v_proj"):
                begin, end = ROWS[role]
                for leaf in ("weight", "bias"):
                    found = layer.get_parameter(f"self_attn.{role}.{leaf}")
                    assert torch.equal(found, layers[index].get_parameter(f"self_attn.{role}.{leaf}"))
                    assert torch.equal(
                        found, stored[f"model.layers.{index}.attention.query_key_value.{leaf}"][begin:end]
                    )
    assert torch.equal(logits(load_model(find_model(tmp_path))), logits(model))
    name = "model.layers.1.attention.query_key_value.weight"
    save_file(stored | {name: stored[name][:100].contiguous()}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"query_key_value\.weight has the shape \(100, 64\).* 128 rows"):
        find_model(tmp_path)


def test_biases_go_with_their_rows() -> None:
    model = tiny("phi3")
    for layer in model.model.layers:
        layer.self_attn.qkv_proj.bias = torch.nn.Parameter(torch.randn(128))
    expected, bias = logits(model), model.model.layers[1].self_attn.qkv_proj.bias
    known_architecture(model, to="split")
    assert torch.equal(model.model.layers[1].self_attn.k_proj.bias, bias[64:96])
    assert torch.equal(logits(model), expected)


def test_quantized_matrices_are_split_as_well(phi: Path, tmp_path: Path) -> None:
    folder, meant = shutil.copytree(phi, tmp_path / "model"), {}
    stored = load_file(folder / WEIGHTS)
    for name in [name for name in stored if "_proj" in name]:
        numbers = torch.randint(-128, 128, stored[name].shape)
        scales = torch.rand(len(numbers), 1) * 0.002
        stored |= {name: numbers.to(torch.int8), f"{name}_scale": scales}
        meant[name] = numbers.float() * scales
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
    }
    settings = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(settings))
    for paged in (False, True):
        assert_rows(load_model(find_model(folder), paged=paged), meant)


@pytest.mark.parametrize(
    "options", [{"sparsity": 0.0, "correction_steps": 0}, {"sparsity": 0.1, "sublayers": ("self_attn",)}]
)
def test_what_is_saved_opens_again_and_in_no_host_without_lorap(options: Any, tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level("INFO", "lorap"):
        model, report = lorap.compress(tiny("phi3"), calibration=windows(), config=config(**options), progress=False)
    assert "qkv_proj as q_proj, k_proj, v_proj" in caplog.text
    lorap.save(model, tmp_path / "small", report=report)
    opened = type(tiny("phi3")).from_pretrained(tmp_path / "small")
    assert torch.equal(logits(opened), logits(model))
    # Such a host has no layer for q, k and v, and would fill qkv_proj with random numbers.
    assert json.loads((tmp_path / "small/config.json").read_text())["hidden_act"] == "silu_needs_import_lorap"


def test_what_cannot_be_written_is_refused(phi: Path, tmp_path: Path) -> None:
    stock = config(recipe="best", sparsity=0.3, target="stock", correction_steps=0)
    with pytest.raises(ConfigError, match=r"phi3 .*--sublayers mlp --shapes uniform.*export --format stock"):
        lorap.compress(tiny("phi3"), calibration=windows(), config=stock, progress=False)
    model = lorap.optimize_for_inference(tiny("phi3"))
    with pytest.raises(ArchitectureError, match=r"GatedMLP.*before optimize_for_inference"):
        lorap.export_stock(model, tmp_path / "stock")
    folder = shutil.copytree(phi, tmp_path / "model")
    stored = load_file(folder / WEIGHTS)
    stored["model.layers.1.self_attn.qkv_proj.weight"] = torch.zeros(112, 64)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"layers.1.self_attn.qkv_proj.weight has the shape \(112, 64\).*128 rows"
    ):
        find_model(folder)
