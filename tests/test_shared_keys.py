"""Layers that attend to keys and values of an earlier layer, or whose values are their keys (Gemma 4)."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from allocations import peak_bytes
from families import assert_goes_on, config, logits, tiny, tiny_config, windows, written
from tiny_models import random_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import lorap
import lorap.architectures
from lorap.architectures import ARCHITECTURES, ATTENTION, MLP, find_architecture
from lorap.calibration.context import DecoderContext
from lorap.calibration.contract import verify_contract
from lorap.calibration.offload import HiddenStateStore
from lorap.calibration.sensitivity import layer_sensitivities
from lorap.calibration.stream import CalibrationStream, logits_of
from lorap.calibration.windows import TokenWindows
from lorap.checkpoint.folders import read_tensors
from lorap.checkpoint.load import find_model
from lorap.checkpoint.validate import model_class
from lorap.compression.allocation import attention_ranks, break_even_rank
from lorap.compression.estimate import ModelShape, Texts, estimate
from lorap.compression.estimate.memory import TOKENIZER
from lorap.compression.runs.run import RunOptions
from lorap.errors import ArchitectureError, ConfigError
from lorap.evaluation.info import describe_model
from lorap.evaluation.inspection.inspect import inspect_model
from lorap.evaluation.inspection.plots import write_plots
from lorap.reports.run import REPORT

FAMILY = "gemma4_text"
# Values of every second layer are its keys, and all layers have their own.
VALUELESS: dict[str, Any] = {
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
}
KINDS: dict[str, dict[str, Any]] = {"shared": {}, "valueless": VALUELESS}
ROLES = {
    "shared": [ATTENTION, ATTENTION, ("q_proj", "o_proj"), ("q_proj", "o_proj")],
    "valueless": [ATTENTION, ("q_proj", "k_proj", "o_proj")] * 2,
}


def context_of(model: Any, **options: Any) -> DecoderContext:
    return DecoderContext.of(model, device=torch.device("cpu"), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_have_the_projections_that_they_read(kind) -> None:
    model = tiny(FAMILY, **KINDS[kind])
    row = find_architecture(model)
    assert [row.roles(layer) for layer in model.model.layers] == [(*roles, *MLP) for roles in ROLES[kind]]
    assert row.ffn_widths(model) == ([100, 100, 200, 200] if kind == "shared" else [100] * 4)


@pytest.mark.parametrize("stored", ["memory", "files"])
def test_a_stream_gives_each_layer_what_the_model_does(stored, tmp_path) -> None:
    model = tiny(FAMILY)
    store = HiddenStateStore(budget_bytes=0 if stored == "files" else None, folder=tmp_path)
    context = context_of(model, store=store)
    stream = CalibrationStream.from_windows(context, TokenWindows(windows(), "", ""), batch_tokens=96)
    for index, layer in enumerate(context.layers):
        stream.advance(index, layer)
    with torch.no_grad():
        expected = model(windows()).logits
        found = torch.cat([logits_of(context, batch.hidden) for batch in stream.batches])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert (store.spilled_bytes > 0) == (stored == "files")


def test_streams_do_not_read_each_others_keys() -> None:
    """One that went on behind other weights leaves those of its copy as they are."""
    model = tiny(FAMILY)
    context = context_of(model)
    stream = CalibrationStream.from_windows(context, TokenWindows(windows(), "", ""))
    other = stream.copy()
    for index, layer in enumerate(context.layers[:2]):
        stream.advance(index, layer)
        other.advance(index, layer)
    expected = stream.copy()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(-1)
    before = stream.copy()
    before.advance(1, context.layers[1])  # as for sums of the dense model beside those of the compressed one
    stream.advance(3, context.layers[3])
    expected.advance(3, context.layers[3])
    assert torch.equal(stream.batches[0].hidden, expected.batches[0].hidden)
    before.batches[0].hidden = other.batches[0].hidden
    before.advance(3, context.layers[3])
    assert not torch.equal(before.batches[0].hidden, expected.batches[0].hidden)


def moments_of(model: Any) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """By layer and role, sums of g g^T |x| / |g| and of x x^T |g| / |x| over all tokens, by autograd through the whole model."""
    ids, found, handles = windows(), dict[Any, Any](), []
    for index, layer in enumerate(model.model.layers):
        for role, linear in ARCHITECTURES[FAMILY].linears(layer).items():

            def note(_module: nn.Module, args: Any, output: Tensor, key: Any = (index, role)) -> None:
                output.retain_grad()
                found[key] = args[0].detach(), output

            handles.append(linear.register_forward_hook(note))
    loss = nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    loss.backward()
    for handle in handles:
        handle.remove()
    sums = {}
    for key, (x, output) in found.items():
        x, g = x.flatten(0, 1).double(), output.grad.flatten(0, 1).double()
        ratio = g.norm(dim=1) / x.norm(dim=1)
        sums[key] = (g / ratio.clamp(min=1e-30)[:, None]).T @ g, (x * ratio[:, None]).T @ x
    return sums


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_layer_that_gave_keys_and_values(kind) -> None:
    model = tiny(FAMILY, **KINDS[kind])
    expected, context = moments_of(model), context_of(model)
    walk = layer_sensitivities(context, TokenWindows(windows(), "", ""), context.architecture.linears)
    seen = 0
    for index, found in walk:
        for role, sensitivity in found.items():
            for told, sums in zip((sensitivity.output, sensitivity.input), expected[index, role], strict=True):
                mean = sums / sensitivity.tokens
                torch.testing.assert_close(told.double(), mean, rtol=1e-3, atol=1e-4 * float(mean.abs().max()))
            seen += 1
    assert seen == len(expected)


@pytest.mark.parametrize("recipe", ["lorap", "best"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_counted_is_what_was_saved(kind, recipe, tmp_path) -> None:
    model = tiny(FAMILY, **KINDS[kind])
    row, before = ARCHITECTURES[FAMILY], {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = config(recipe=recipe, sparsity=0.3, correction_steps=0)
    model, report = lorap.compress(model, calibration=windows(), config=options, progress=False)
    layers = model.model.layers
    ours = [(index, role) for index, layer in enumerate(layers) for role in row.roles(layer)]
    assert [(one.layer, one.role) for one in report.projections] == ours
    lorap.save(model, tmp_path / "small", report=report)
    names = tuple(f"{row.module_name(*one)}." for one in ours)

    def params(tensors: Any) -> int:
        own = [tensor for name, tensor in tensors.items() if name.startswith(names)]
        return sum(math.prod(tensor.shape) for tensor in own if tuple(tensor.shape) != (1,) and tensor.dtype != "I64")

    kept = params(read_tensors(tmp_path / "small")) / params(before)
    assert kept == pytest.approx(0.7, abs=0.02)
    assert report.param_ratio == pytest.approx(kept)
    for _ in range(2):  # with the report, and without it
        assert describe_model(find_model(tmp_path / "small"))["param_ratio"] == pytest.approx(kept)
        (tmp_path / "small" / REPORT).unlink(missing_ok=True)
    opened = type(model).from_pretrained(tmp_path / "small")
    assert torch.equal(logits(opened), logits(model))
    assert torch.equal(written(opened), written(model))
    others = [name for name in before if not name.startswith(names)]
    assert all(torch.equal(before[name], opened.state_dict()[name]) for name in others)


def test_a_run_goes_on_behind_the_layer_that_gave_keys(tmp_path, monkeypatch) -> None:
    assert_goes_on(tiny(FAMILY), tmp_path, monkeypatch, before=2)


@pytest.mark.parametrize("missing", [("v_proj",), ("k_proj", "v_proj"), ()])
def test_ranks_of_a_layer_keep_the_share_of_what_it_has(missing) -> None:
    shapes = {"q_proj": (1024, 640), "k_proj": (256, 640), "v_proj": (256, 640), "o_proj": (640, 1024)}
    shapes = {role: shape for role, shape in shapes.items() if role not in missing}
    found = attention_ranks(shapes, 0.5, 2.0)
    total = sum(rows * columns for rows, columns in shapes.values())
    kept = sum(rank * sum(shapes[role]) for role, rank in found.items())
    kept += sum(math.prod(shape) for role, shape in shapes.items() if role not in found)
    assert kept / total == pytest.approx(0.5, abs=0.01)
    assert all(0 < rank < break_even_rank(shapes[role]) for role, rank in found.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_right_rows_pass(kind, dtype) -> None:
    verify_contract(context_of(tiny(FAMILY, **KINDS[kind]).to(dtype)))


@pytest.mark.parametrize("mistake", ["values beside", "keys as values", "optional", "two FFNs"])
def test_a_wrong_row_is_refused(mistake, monkeypatch) -> None:
    model = tiny(FAMILY, **(VALUELESS if mistake == "keys as values" else {}))
    if mistake == "values beside":
        attention = model.model.layers[2].self_attn
        attention.o_proj.register_forward_pre_hook(lambda _module, args: (args[0] + 0.1,))
        said = r"layers\.2 is not .*with the earlier layer's v_proj silenced, 0?\.?\d+.* of what o_proj reads stays"
    elif mistake == "keys as values":
        attention = model.model.layers[1].self_attn
        attention.v_norm.register_forward_hook(lambda _module, _args, output: output + 1)
        said = r"layers\.1 is not .*with k_proj silenced"
    elif mistake == "optional":
        monkeypatch.setattr(lorap.architectures, "ARCHITECTURES", {FAMILY: lorap.architectures.Architecture("wrong")})
        said = r"model\.layers\.2\.self_attn\.k_proj does not exist"
    else:
        model.model.layers[3].mlp.register_forward_hook(lambda _module, args, output: output + args[0])
        said = r"layers\.3 is not .*what the FFN gives is not what down_proj gives"
    with pytest.raises(ArchitectureError, match=said):
        lorap.compress(model, calibration=windows(), config=config(recipe="lorap"), progress=False)


def test_experts_beside_the_ffn_are_refused() -> None:
    chosen = AutoConfig.for_model(
        FAMILY, hidden_size=64, num_hidden_layers=2, vocab_size=90, vocab_size_per_layer_input=90, enable_moe_block=True
    )
    chosen.num_experts, chosen.top_k_experts, chosen.moe_intermediate_size = 3, 2, 16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(chosen)
    with pytest.raises(ArchitectureError, match=r"this gemma4_text model: enable_moe_block is True.*experts beside"):
        find_architecture(model)


def test_one_width_for_unlike_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer 1 of this gemma4_text model have other shapes than those of layer 0"):
        lorap.compress(tiny(FAMILY), calibration=windows(), config=config(target="stock", sparsity=0.2), progress=False)


def test_a_stock_folder_holds_the_widths_of_its_class(tmp_path) -> None:
    """Attention alone was compressed; an FFN of another width has no place there."""
    attention = config(recipe="lorap", sparsity=0.3, sublayers=("self_attn",))
    model, _ = lorap.compress(tiny(FAMILY), calibration=windows(), config=attention, progress=False)
    expected = logits(model)
    lorap.export_stock(model, tmp_path / "stock")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    torch.testing.assert_close(logits(opened), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    model, _ = lorap.compress(tiny(FAMILY), calibration=windows(), config=config(recipe="lorap"), progress=False)
    for pad in (False, True):
        with pytest.raises(
            ArchitectureError, match=r"FFN widths are .* and a stock gemma4_text model of this config has"
        ):
            lorap.export_stock(model, tmp_path / "other", pad_widths=pad)


def test_layers_are_inspected_with_what_they_have(tmp_path) -> None:
    found = inspect_model(tiny(FAMILY), calibration=windows(), progress=False)
    told = [(one.layer, one.role) for one in found.projections]
    assert told == [(i, role) for i, roles in enumerate(ROLES["shared"]) for role in (*roles, *MLP)]
    line = next(line for line in found.table().splitlines() if line.startswith("k_proj") and "32 x 64, 64 x 64" in line)
    shares = sorted(one.effective_share for one in found.find("plain", roles=["k_proj"]))
    assert f" {100 * sum(shares) / 2:.0f} " in line
    assert {path.name for path in write_plots(found, tmp_path)} >= {"spectra.svg", "effective_ranks.png"}
    alone = inspect_model(tiny(FAMILY), layers=[2, 3], calibration=None, progress=False)
    assert "k_proj" not in alone.table()


@pytest.mark.parametrize("recipe", ["lorap", "best"])
def test_planned_memory_is_a_bound(recipe, tmp_path, monkeypatch) -> None:
    sizes = {"hidden_size": 192, "intermediate_size": 320, "hidden_size_per_layer_input": 24}
    tiny(FAMILY, **sizes).save_pretrained(tmp_path / "dense")
    chosen, shape = config(recipe=recipe, sparsity=0.5), ModelShape.read(find_model(tmp_path / "dense"))
    assert (shape.resident_params, shape.own_inputs) == (500 * 4 * 24 + 192 * 4 * 24 + 24 + 192, 4 * 24)
    monkeypatch.setattr(sys.modules[estimate.__module__], "resident_bytes", lambda: -TOKENIZER)
    bound = estimate(shape, chosen, Texts.of(chosen, ["a.txt"], evaluation_texts=0), room=10**12).memory_bytes
    run = RunOptions(calibration=windows(), progress=False)
    peak = peak_bytes(lambda: lorap.compress_to_folder(tmp_path / "dense", tmp_path / "small", chosen, run))
    assert peak <= bound <= 3 * peak


def test_attention_that_hears_is_none_of_the_decoder(tmp_path) -> None:
    """Projections of the audio tower have the names of those that are compressed, and stay."""
    hears = {"model_type": "gemma4_audio", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    hears |= {"subsampling_conv_channels": [8, 4], "output_proj_dims": 24, "use_clipped_linears": False}
    own = AutoConfig.for_model(**tiny_config("gemma4").to_dict() | {"audio_config": hears})
    model = random_model(lambda: model_class(own).from_config(own))
    assert any("audio_tower" in name and ".q_proj." in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    counts = describe_model(find_model(tmp_path))["kinds"]
    layers = ARCHITECTURES["gemma4"].decoder_layers(model)
    for role in (*ATTENTION, *MLP):
        own = [ARCHITECTURES["gemma4"].linears(layer).get(role) for layer in layers]
        assert counts[role]["params"] == sum(linear.weight.numel() for linear in own if linear)
    assert ModelShape.read(find_model(tmp_path)).params["q_proj"] == counts["q_proj"]["params"]
