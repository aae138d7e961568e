"""Steps that move the scales of rounded weights: which way, how far, that nothing else moves, and that they are undone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corrections import step_streams
from made_reports import made_report
from torch import Tensor
from whole_model import divergence_of

import lorap
from lorap.algorithms.step_schedule import SCALE_RATE
from lorap.compression.distillation import growth, rescale
from lorap.compression.quantization import Rounding
from lorap.compression.runs.journal import Journal
from lorap.compression.runs.run import RunOptions, compress_to_folder
from lorap.nn.quantized import QuantizedLinear
from lorap.reports.model_card import method_text
from lorap.reports.run import CompressionReport, CorrectionReport
from lorap.weights import INTEGERS, TRELLIS

CPU = torch.device("cpu")


def rounded_parts(model: Any) -> dict[str, QuantizedLinear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, QuantizedLinear)}


@pytest.mark.parametrize("coding", [INTEGERS, TRELLIS], ids=["int4", "tcq4"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (63, 100), (100, 63), (64, 128)])
def test_growth_of_a_group_is_the_derivative_of_the_loss(coding: Any, rows: int, columns: int) -> None:
    drawn = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=drawn)
    rounding = Rounding(coding, 4, 32)
    linear = rounding.packed(rounding.weight(weight, None, torch.float32), None)
    x = torch.randn(7, columns, dtype=torch.float64, generator=drawn)
    g = torch.randn(7, rows, dtype=torch.float64, generator=drawn)
    grown = torch.ones(linear.weight_scale.shape, dtype=torch.float64, requires_grad=True)
    each = grown.repeat_interleave(min(32, columns), dim=1)[:, :columns]
    loss = (x @ (linear.dequantize(torch.float64) * each).T * g).sum()
    (expected,) = torch.autograd.grad(loss, grown)
    torch.testing.assert_close(growth(g.T @ x, linear), expected)


def rescaled(model: Any, dense: Any, ids: Tensor, folds: Tensor, rates: tuple[float, ...]) -> None:
    student, streams, targets, _ = step_streams(model, dense, ids, folds, len(rates))
    assert len(streams) == len(rates)
    rescale(student, streams, targets, rates)


@pytest.mark.parametrize("two_folds", [False, True])
@pytest.mark.parametrize("weights", ["int4", "tcq3"])
def test_a_step_goes_against_the_gradient(
    make_model: Callable[..., Any], tokens: Tensor, weights: Any, two_folds: bool
) -> None:
    dense = make_model("llama-gqa")
    model = lorap.quantize(copy.deepcopy(dense), weights, group_size=32)
    folds = torch.arange(len(tokens)) % 3 == 1 if two_folds else torch.zeros(len(tokens), dtype=torch.bool)
    parts = rounded_parts(model)
    before = {name: part.weight_scale.clone() for name, part in parts.items()}
    others = {name: each.clone() for name, each in model.state_dict().items() if not name.endswith("weight_scale")}
    signs = []
    for fold in folds.unique():
        # Numeric: each scale of one matrix of each layer, a share larger and smaller.
        signs.append({name: numeric_signs(model, dense, tokens[folds == fold], parts[name]) for name in chosen(parts)})
    rescaled(model, dense, tokens, folds, (SCALE_RATE,))
    for name in chosen(parts):
        moved = (1 - parts[name].weight_scale / before[name]) / SCALE_RATE
        expected = torch.where(signs[0][name] == signs[-1][name], signs[0][name], 0.0)
        assert float((moved - expected).abs().gt(1e-2).double().mean()) < 0.05, name
    for name, part in parts.items():
        assert not torch.equal(part.weight_scale, before[name]), name
    assert all(torch.equal(model.state_dict()[name], each) for name, each in others.items())


def chosen(parts: dict[str, QuantizedLinear]) -> list[str]:
    return [name for name in parts if name.endswith(("0.self_attn.k_proj", "1.mlp.down_proj"))]


def numeric_signs(model: Any, dense: Any, ids: Tensor, part: QuantizedLinear) -> Tensor:
    """Of how the divergence changes with each scale, for some of them; 0 elsewhere is never compared."""
    name = next(name for name, each in model.named_modules() if each is part)
    exact, exact_dense = copy.deepcopy(model), copy.deepcopy(dense).double()
    for path, each in rounded_parts(model).items():
        linear = torch.nn.Linear(each.in_features, each.out_features, bias=each.bias is not None, dtype=torch.float64)
        linear.weight.data = each.dequantize(torch.float64)
        if each.bias is not None:
            linear.bias.data = each.bias.data.double()
        exact.set_submodule(path, linear)
    exact = exact.double()
    weight = exact.get_submodule(name).weight
    (gradient,) = torch.autograd.grad(divergence_of(exact, exact_dense, ids), weight)
    products = gradient * weight.detach()
    return torch.stack([group.sum(1) for group in products.split(part.group_size, dim=1)], dim=1).sign().float()


def test_small_steps_add_up_in_sixteen_bits(make_model: Callable[..., Any], tokens: Tensor) -> None:
    """Each is far less than what bfloat16 can tell apart; together they are not."""
    dense = make_model("llama-gqa").to(torch.bfloat16)
    model = lorap.quantize(copy.deepcopy(dense), "int4", group_size=32)
    before = {name: part.weight_scale.clone() for name, part in rounded_parts(model).items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorap.algorithms.step_schedule.STEP_TOKENS", tokens.shape[1])
        rescaled(model, dense, tokens, torch.zeros(len(tokens), dtype=torch.bool), (0.0015,) * 4)
    moved = [float((part.weight_scale != before[name]).float().mean()) for name, part in rounded_parts(model).items()]
    assert max(moved) > 0.1
    assert all(part.weight_scale.dtype == torch.bfloat16 for part in rounded_parts(model).values())


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize("sparsity", [0.0, 0.4])
def test_scales_lie_where_the_judges_say(
    make_model: Callable[..., Any], compress_small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, sparsity: float
) -> None:
    dense = make_model("llama-gqa")
    options: dict[str, Any] = {
        "calibration": torch.randint(3, 500, (12, 32), generator=torch.Generator().manual_seed(0))
    }
    options |= {"weights": "int4", "storage": "factors", "sparsity": sparsity, "correction_steps": 2}
    found: dict[float, dict[str, Tensor]] = {}
    for fraction in (0.0, 0.25, 1.0):
        # Steps of weights come first, and go all the way.
        answers = [fraction] if sparsity == 0 else [1.0, fraction]
        monkeypatch.setattr("lorap.compression.correction.best_fraction", lambda *_, answers=answers: answers.pop(0))
        model, report = compress_small(copy.deepcopy(dense), scale_steps=3, **options)
        assert (report.rescaling.asked, report.rescaling.tried) == (3, 3)
        assert (report.rescaling.fraction, report.rescaling.taken) == (fraction, 3 if fraction else 0)
        assert len(report.rescaling.before) == len(report.rescaling.after) > 0
        found[fraction] = model.state_dict()
    moved = 0
    for name, tensor in found[0.0].items():
        if not name.endswith("weight_scale"):
            assert torch.equal(found[1.0][name], tensor), name
            continue
        torch.testing.assert_close(found[0.25][name], torch.lerp(tensor, found[1.0][name], 0.25), rtol=1e-6, atol=1e-9)
        share = float((found[1.0][name] / tensor - 1).abs().max())
        assert share < 3 * SCALE_RATE, name
        moved += share > 0
    assert moved > 10


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize("fraction", [0.5, 0.0])
@pytest.mark.parametrize("sparsity", [0.0, 0.4])
def test_an_interrupted_run_comes_out_the_same(
    sparsity: float, fraction: float, make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped among the steps, before they are written down, and right behind that."""
    make_model("qwen3").save_pretrained(tmp_path / "model", max_shard_size="100KB")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 500, 40 * 32))
    monkeypatch.setattr("lorap.compression.correction.best_fraction", lambda *_: fraction)
    config = lorap.CompressionConfig(
        recipe="lorap",
        sparsity=sparsity,
        weights="tcq3",
        scale_steps=2,
        correction_steps=2,
        num_calibration_samples=8,
        calibration_seq_len=32,
    )
    options = RunOptions(
        calibration=str(tmp_path / "tokens.npy"),
        evaluation=[str(tmp_path / "tokens.npy")],
        progress=False,
        device="cpu",
    )
    whole = compress_to_folder(tmp_path / "model", tmp_path / "whole", config, options)
    assert whole.rescaling is not None
    assert (whole.rescaling.taken, whole.rescaling.fraction) == (2 if fraction else 0, fraction)
    model, in_memory = lorap.compress(
        tmp_path / "model", calibration=options.calibration, config=config, device="cpu", progress=False
    )
    assert in_memory.rescaling == whole.rescaling
    lorap.save(model, tmp_path / "in memory", report=in_memory)
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "in memory" / "model.safetensors").read_bytes() == expected
    plain = compress_to_folder(tmp_path / "model", tmp_path / "plain", replace(config, scale_steps=0), options)
    assert ((tmp_path / "plain" / "model.safetensors").read_bytes() == expected) == (fraction == 0)
    assert plain.rescaling is None
    losses = [report.evaluations[0]["after"]["nats"] for report in (plain, whole)]
    assert (losses[0] == losses[1]) == (fraction == 0)
    for at, stops in enumerate(interruptions()):
        out = tmp_path / f"out-{at}"
        with monkeypatch.context() as patch:
            stops(patch)
            with pytest.raises(KeyboardInterrupt):
                compress_to_folder(tmp_path / "model", out, config, options)
        again = compress_to_folder(tmp_path / "model", out, config, options)
        assert again.rescaling == whole.rescaling
        assert (out / "model.safetensors").read_bytes() == expected
        assert again.evaluations[0]["after"]["nats"] == losses[1]


def interruptions() -> list[Callable[[pytest.MonkeyPatch], None]]:
    tensors, alone = Journal.keep_tensors, Journal.keep_alone

    def among(patch: pytest.MonkeyPatch) -> None:
        kept: list[str] = []

        def stop(self: Journal, name: str, *args: Any, **kwargs: Any) -> None:
            tensors(self, name, *args, **kwargs)
            kept.extend([name] * name.startswith("rescaled"))
            if len(kept) == 2:
                raise KeyboardInterrupt

        patch.setattr(Journal, "keep_tensors", stop)

    def at_the_end(patch: pytest.MonkeyPatch, *, kept: bool) -> None:
        def stop(self: Journal, name: str, *args: Any, **kwargs: Any) -> None:
            if name != "rescaled" or kept:
                alone(self, name, *args, **kwargs)
            if name == "rescaled":
                raise KeyboardInterrupt

        patch.setattr(Journal, "keep_alone", stop)

    return [among, lambda patch: at_the_end(patch, kept=False), lambda patch: at_the_end(patch, kept=True)]


def test_steps_of_scales_are_told() -> None:
    config = lorap.CompressionConfig(sparsity=0.0, weights="int4", scale_steps=8)
    assert "The scales then took 8 small steps towards" in method_text(config)
    assert "3 small steps of 8" in method_text(config, None, CorrectionReport(8, 3, 3))
    undone = method_text(config, None, CorrectionReport(8, 3, 0))
    assert "None of the 8 steps of the scales was taken" in undone
    with_weights = method_text(lorap.CompressionConfig(sparsity=0.2, weights="int4", scale_steps=8))
    assert with_weights.count("nothing else was trained") == 1
    assert "The scales" not in method_text(lorap.CompressionConfig(scale_steps=8))
    report = replace(made_report(3), config=config)
    report.rescaling = CorrectionReport(8, 8, 8, 128, 96, 1536, (0.5, 0.75), (0.25, 0.5))
    assert CompressionReport.from_dict(json.loads(json.dumps(report.to_dict()))).rescaling == report.rescaling
    assert "scales: 8 of 8 steps taken" in report.table()
