"""Folders of weights on a trellis: the same after loading and in fused layers, counted, told of, and refused when damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import assert_refused, last_json, run
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import lorap
from lorap.checkpoint.folders import stored_parameters
from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.layouts import compressed_shapes, dense_shapes
from lorap.checkpoint.load import find_model, load_model
from lorap.evaluation.info import describe_model, format_info
from lorap.kernels import packing, trellis
from lorap.nn.linear import LowRankLinear, count_parameters, weight_of
from lorap.nn.quantized import QuantizedLinear
from lorap.nn.trellis import TrellisLinear, layer_of
from lorap.weights import INTEGERS, KINDS, TRELLIS

Q, UP, DOWN = (f"model.layers.{name}" for name in ("0.self_attn.q_proj", "0.mlp.up_proj", "1.mlp.down_proj"))
OTHER = {Q: 4, UP: 2, DOWN: 4}
# Neither tiles of 64 rows nor groups of 32 columns are whole.
ODD = {"hidden_size": 60, "intermediate_size": 101, "num_attention_heads": 3, "num_key_value_heads": 1}


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens[:2, :20]).logits


def layers_of(model: Any) -> dict[str, TrellisLinear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, TrellisLinear)}


def drawn(linear: torch.nn.Linear, bits: int, group_size: int) -> TrellisLinear:
    """A layer of any codes in the place of ``linear``, found without a search."""
    rows, columns = linear.weight.shape
    packed = torch.randint(-(2**31), 2**31 - 1, trellis.packed_shape(rows, columns, bits)).int()
    windows = trellis.unpack(packed, bits, trellis.tiles(rows) * trellis.TILE)
    scales = 0.02 + 0.1 * torch.rand(rows, -(-columns // group_size))
    scales = scales.to(linear.weight.dtype)
    return TrellisLinear.from_numbers(windows, scales, bits=bits, group_size=group_size, bias=linear.bias)


@pytest.mark.parametrize("bits", trellis.BITS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (63, 100), (129, 33)])
def test_a_layer_computes_with_what_its_codes_stand_for(rows, columns, bits) -> None:
    layer = drawn(torch.nn.Linear(columns, rows), bits, 32)
    weight = weight_of(layer)
    assert weight.shape == (rows, columns)
    assert len(weight.unique()) > min(20, weight.numel() // 2)
    x = torch.randn(3, 5, columns)
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias, rtol=1e-4, atol=1e-4)
    assert (layer.in_features, layer.out_features, layer.bits) == (columns, rows, bits)
    assert count_parameters(layer) == rows * columns + rows
    empty = TrellisLinear.empty_like(torch.nn.Linear(columns, rows).bfloat16(), bits=bits, group_size=32)
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == {
        name: tensor.shape for name, tensor in layer.state_dict().items()
    }
    assert empty.weight_scale.dtype == torch.bfloat16


def test_sizes_without_torch_are_those_of_the_packing() -> None:
    for rows, columns in ((1, 1), (64, 7), (65, 100), (200, 31)):
        for bits in TRELLIS.bits:
            assert TRELLIS.packed_shape(rows, columns, bits) == trellis.packed_shape(rows, columns, bits)
        for bits in INTEGERS.bits:
            assert INTEGERS.packed_shape(rows, columns, bits) == (rows, packing.words(columns, bits))
    assert (TRELLIS.bits, TRELLIS.tile, INTEGERS.bits) == (trellis.BITS, trellis.TILE, packing.BITS)
    assert (TRELLIS.bits, TRELLIS.tile, INTEGERS.bits) == ((2, 3, 4, 5, 6), 64, (4, 8))
    assert (TRELLIS.packed_shape(65, 100, 3), INTEGERS.packed_shape(65, 100, 4)) == ((2, 600), (65, 13))
    assert (layer_of(TRELLIS), layer_of(INTEGERS)) == (TrellisLinear, QuantizedLinear)
    assert {kind: bits for kind, (_, bits) in KINDS.items()} == {
        "int4": 4,
        "int8": 8,
        **{f"tcq{bits}": bits for bits in range(2, 7)},
    }


@pytest.mark.parametrize("weights", ["tcq2", "tcq3", "tcq4", "tcq5", "tcq6"])
@pytest.mark.parametrize("storage", ["dense", "factors"])
def test_saved_and_loaded_it_is_the_same(storage, weights, make_model, compress_small, tokens, tmp_path) -> None:
    make_model("llama-biases", **ODD).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    if storage != "dense":
        model, _ = compress_small(model, storage="factors", sparsity=0.6)
    lorap.quantize(model, weights, group_size=32)
    stored = {name: part.bits for name, part in layers_of(model).items()}
    assert {*stored.values()} == {KINDS[weights][1]}
    assert len(stored) == 2 * (7 if storage == "dense" else 4 * 2 + 3)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    fields = settings["quantization_config"]
    assert (fields["format_version"], fields["weights"], fields["group_size"]) == (
        7 if weights < "tcq5" else 8,
        weights,
        32,
    )
    assert settings["hidden_act"] == "silu_needs_import_lorap"
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name: part.bits for name, part in layers_of(opened).items()} == stored
    assert torch.equal(logits(opened, tokens), expected)
    assert len(layers_of(AutoModel.from_pretrained(tmp_path))) == len(stored)
    opened.save_pretrained(tmp_path / "again")
    first, again = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    dense = dense_shapes("llama", settings)
    assert dense is not None
    shapes = compressed_shapes(dense, LoRAPConfig(**fields))
    assert shapes == {name: tuple(tensor.shape) for name, tensor in first.items()}
    assert stored_parameters(tmp_path) == count_parameters(model)


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory) -> Path:
    """Several bits."""
    model, place = make_model("llama-gqa"), tmp_path_factory.mktemp("trellis")
    lorap.quantize(model, "tcq3", group_size=32, other_bits=OTHER).save_pretrained(place)
    return place


def test_several_bits_are_one_folder(folder, tokens) -> None:
    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert {name: part.bits for name, part in layers_of(opened).items()} == {
        name: OTHER.get(name, 3) for name in layers_of(opened)
    }
    info = describe_model(find_model(folder))
    assert (info["weights"], info["other_bits"]) == ("tcq3", {"tcq2": 1, "tcq4": 2})
    assert info["params"] == count_parameters(opened) == stored_parameters(folder)
    assert "tcq2 in 1 projections, tcq4 in 2 projections and tcq3 in all others, in groups of 32" in format_info(info)
    stored = sum(t.nbytes for name, t in load_file(folder / "model.safetensors").items() if "_proj" in name)
    weights = sum(part.in_features * part.out_features for part in layers_of(opened).values())
    assert info["bits_per_weight"] == pytest.approx(8 * stored / weights)
    expected = logits(opened, tokens)
    torch.testing.assert_close(logits(lorap.optimize_for_inference(opened), tokens), expected, rtol=1e-4, atol=1e-4)


def test_pairs_run_by_their_factors_in_fused_models_too(make_model, compress_small, tokens) -> None:
    model, _ = compress_small(make_model("llama-gqa"), sparsity=0.6)
    for pair in [part for part in model.modules() if isinstance(part, LowRankLinear)]:
        pair.left, pair.right = drawn(pair.left, 3, 32), drawn(pair.right, 2, 64)
    pair = model.get_submodule(Q)
    x = torch.randn(3, pair.in_features)
    weight = pair.reconstruct()
    torch.testing.assert_close(weight, weight_of(pair.left) @ weight_of(pair.right))
    torch.testing.assert_close(pair(x), x @ weight.T, rtol=1e-3, atol=1e-4)
    for layer in model.model.layers:
        for role in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, role, drawn(getattr(layer.mlp, role), 4, 32))
    expected = logits(model, tokens)
    torch.testing.assert_close(logits(lorap.optimize_for_inference(model), tokens), expected, rtol=1e-4, atol=1e-4)


def test_commands_open_it(folder, model_folder, small_text, tmp_path) -> None:
    with_tokenizer = tmp_path / "folder"
    shutil.copytree(folder, with_tokenizer)
    for path in model_folder.glob("tokenizer*"):
        shutil.copy(path, with_tokenizer)
    text = ["--text", small_text, "--seq-len", 32, "--max-tokens", 64, "--device", "cpu"]
    assert last_json(run("eval", with_tokenizer, *text, "--json"))
    said = run("generate", with_tokenizer, "--prompt", "a", "--max-new-tokens", 3, "--device", "cpu")
    assert said.exit_code == 0, said.output
    assert last_json(run("info", with_tokenizer, "--json"))["weights"] == "tcq3"
    for command in (["compress", with_tokenizer, tmp_path / "out"], ["plan", with_tokenizer, "--no-time"]):
        assert_refused(run(*command, "--calibration", small_text), "compressed by lorap already")


def test_export_refuses_it_before_it_is_loaded(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("lorap.cli.models.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    for kind in ("stock", "deci", "gguf"):
        refused = run("export", folder, tmp_path / "out", "--format", kind)
        assert_refused(refused, "the weights of this model are tcq3, tcq2 and tcq4; reconstruct or export it before")
    assert not (tmp_path / "out").exists()


def test_doors_that_need_floating_point_say_so(folder, make_model, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    for door in (
        lambda: lorap.quantize(model, "int8"),
        lambda: lorap.reconstruct(model),
        lambda: lorap.export_stock(model, tmp_path / "stock"),
        lambda: lorap.export_gguf(model, tmp_path / "gguf", tokenizer=None),
        lambda: lorap.export_deci(model, tmp_path / "deci"),
        lambda: lorap.recover(folder, tmp_path / "tuned"),
    ):
        with pytest.raises(lorap.LoRAPError, match="tcq3, tcq2 and tcq4"):
            door()
    with pytest.raises(lorap.CheckpointError, match=r"names model\.layers\.9\.mlp\.up_proj, but"):
        lorap.quantize(make_model("llama-gqa"), "tcq3", other_bits={"model.layers.9.mlp.up_proj": 4})


def with_settings(folder: Path, place: Path, **fields: Any) -> Path:
    shutil.copytree(folder, place)
    settings = json.loads((place / "config.json").read_text())
    settings["quantization_config"] |= fields
    (place / "config.json").write_text(json.dumps(settings))
    return place


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"other_bits": {Q: 8}},
            f"other_bits says 8 for {Q}, but tcq3 weights go with tcq2, tcq3, tcq4, tcq5 or tcq6 alone",
        ),
        ({"other_bits": {Q: 3}}, f"other_bits says 3 for {Q}, but tcq3 weights are in 3 bits already"),
        ({"other_bits": {Q: 7}}, f"other_bits.{Q} should be 2, 3, 4, 5, 6 or 8 and is 7"),
        ({"weights": "tcq7"}, "weights should be .* and is 'tcq7'"),
        (
            {"weights": "int4", "other_bits": OTHER},
            f"other_bits says 4 for {Q}, but int4 weights are in 4 bits already",
        ),
        ({"weights": "int4", "other_bits": {UP: 2}}, f"says 2 for {UP}, but int4 weights go with int4 or int8 alone"),
        ({"weights": "int4", "other_bits": {}}, "weight_packed has the shape .* but config.json makes it"),
        ({"weights": "tcq4", "other_bits": {}}, "weight_packed has the shape .* but config.json makes it"),
        ({"format_version": 6}, r"tcq3 weights in groups of 32 and other_bits and format version 6.* must be 7"),
        ({"other_bits": OTHER | {Q: 5}}, r"and other_bits and format version 7.* must be 8"),
        ({"weights": "tcq6"}, r"tcq6 weights .* and format version 7.* must be 8"),
        ({"format_version": 9}, "format version 9 and this lorap reads 1 to 8"),
        ({"group_size": None}, "int4 and tcq weights have one"),
        ({"group_size": 64}, "weight_scale has the shape .* but config.json makes it"),
    ],
    ids=str,
)
def test_contradictions_are_refused_by_name(fields, said, folder, tmp_path) -> None:
    with pytest.raises(lorap.CheckpointError, match=said):
        AutoModelForCausalLM.from_pretrained(with_settings(folder, tmp_path / "damaged", **fields))


def test_an_older_reader_refuses_it_by_its_version(folder, monkeypatch) -> None:
    monkeypatch.setattr("lorap.checkpoint.quantization_fields.FORMAT_VERSIONS", (1, 2, 3, 4, 5, 6))
    with pytest.raises(lorap.CheckpointError, match="format version 7 and this lorap reads 1 to 6"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(("weights", "other_bits"), [("tcq5", {}), ("tcq4", {Q: 6}), ("tcq6", {Q: 2})], ids=str)
def test_who_knows_four_bits_alone_refuses_more(weights, other_bits, make_model, monkeypatch, tmp_path) -> None:
    model = lorap.quantize(make_model("llama-gqa"), weights, group_size=32, other_bits=other_bits)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("lorap.checkpoint.quantization_fields.FORMAT_VERSIONS", (1, 2, 3, 4, 5, 6, 7))
    with pytest.raises(lorap.CheckpointError, match="format version 8 and this lorap reads 1 to 7"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_damaged_tensors_are_refused_by_name(folder, tmp_path) -> None:
    def scale_of(scales: torch.Tensor) -> torch.Tensor:
        scales[-1, -1] = torch.nan
        return scales

    shutil.copytree(folder, tmp_path / "damaged")
    path = tmp_path / "damaged" / "model.safetensors"
    whole = path.read_bytes()
    for leaf, how, said in [
        ("weight_scale", scale_of, f"{DOWN}.weight_scale is nan in row 63"),
        ("weight_scale", lambda t: t[:, :-1].contiguous(), f"{DOWN}.weight_scale has the shape"),
        ("weight_packed", lambda t: t[:, :-1].contiguous(), f"{DOWN}.weight_packed has the shape"),
        ("weight_packed", lambda t: torch.cat((t, t)), f"{DOWN}.weight_packed has the shape"),
        ("weight_packed", lambda t: t.long(), f"{DOWN}.weight_packed is torch.int64; int32"),
        ("weight_packed", lambda t: t.float(), f"{DOWN}.weight_packed is stored as F32; whole numbers"),
        ("weight_packed", lambda t: t.view(torch.float32), f"{DOWN}.weight_packed is stored as F32"),
        ("weight_shape", lambda t: t.float() + 0.4, f"{DOWN}.weight_shape is stored as F32"),
        ("weight_shape", lambda t: t + 1, f"{DOWN}.weight_shape says"),
    ]:
        tensors = load_file(path)
        tensors[f"{DOWN}.{leaf}"] = how(tensors[f"{DOWN}.{leaf}"])
        save_file(tensors, path, metadata={"format": "pt"})
        for door in (
            lambda: load_model(find_model(tmp_path / "damaged")),
            lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "damaged"),
        ):
            with pytest.raises(lorap.CheckpointError, match="weight_") as caught:
                door()
            assert said in str(caught.value)
        path.write_bytes(whole)
    path.write_bytes(whole[:-100])
    with pytest.raises(lorap.CheckpointError):
        load_model(find_model(tmp_path / "damaged"))
