"""A budget between 4 and 8 bits: which matrices get 8, by the loss to expect and by exact bytes."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
import torch
from commands import last_json, run
from safetensors.torch import load_file
from test_byte_budget import ODD, dense_model, stored_bytes
from transformers import AutoModelForCausalLM

import lorap
from lorap.algorithms.rounding import column_energies, expected_errors, round_weight
from lorap.architectures import PROJECTIONS
from lorap.calibration.sensitivity import Sensitivity, _Sums
from lorap.checkpoint.format import LoRAPConfig
from lorap.cli.compress import saved
from lorap.compression import byte_budget
from lorap.compression.byte_budget import resolve_budget
from lorap.compression.prices import PRICE_SHRINKAGE, Prices
from lorap.compression.stored_bytes import DenseModel
from lorap.config import CompressionConfig
from lorap.distributed import SINGLE_PROCESS
from lorap.nn.quantized import QuantizedLinear

LARGER = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 6, "num_key_value_heads": 2}
WIDE = {"gate_proj", "up_proj"}


def spread(size: int, generator: torch.Generator) -> torch.Tensor:
    """A second moment with channels of very different sizes."""
    root = torch.randn(size, 2 * size, generator=generator) * torch.randn(size, 1, generator=generator).exp()
    return root @ root.T / (2 * size)


def statistics(dense: DenseModel) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """By layer and role: a weight, the moment of its inputs, and the metric of its outputs, of gate and up its diagonal."""
    generator, found = torch.Generator().manual_seed(0), {}
    for index, shapes in enumerate(dense.shapes):
        for role in PROJECTIONS:
            rows, columns = shapes[role]
            weight = torch.randn(rows, columns, generator=generator) * torch.rand(1, generator=generator)
            metric = spread(rows, generator)
            found[index, role] = weight, spread(columns, generator), metric.diagonal() if role in WIDE else metric
    return found


def priced(config: CompressionConfig, dense: DenseModel, known: Any) -> Prices:
    prices = Prices(config, dense)
    for (index, role), (weight, inputs, metric) in known.items():
        prices.add(index, role, weight, Sensitivity(metric, inputs), metric)
    return prices


def test_matrices_get_8_bits_in_the_order_of_a_brute_force_reference() -> None:
    """Costs column by column in float64, and the best of all choices of bits by trying them all."""
    dense = dense_model(num_hidden_layers=1, **ODD)
    known, extra, gain = statistics(dense), {}, {}
    for (_, role), (weight, inputs, metric) in known.items():
        rows, columns = weight.shape
        damped = (1 - PRICE_SHRINKAGE) * inputs.double() + PRICE_SHRINKAGE * inputs.double().diagonal().diag()
        damped += 0.01 * damped.diagonal().mean() * torch.eye(columns)
        order = sorted(range(columns), key=lambda column: -float(inputs[column, column]))
        after = {column: order[place + 1 :] for place, column in enumerate(order)}
        outputs = metric if role in WIDE else metric.diagonal()
        costs = {4: 0.0, 8: 0.0}
        for column in range(columns):
            rest, unexplained = after[column], damped[column, column]
            if rest:
                across = damped[column, rest]
                unexplained = unexplained - across @ torch.linalg.solve(damped[rest][:, rest], across)
            largest = weight[:, column // 64 * 64 : column // 64 * 64 + 64].double().abs().amax(1)
            for bits in costs:
                scales = largest / (2 ** (bits - 1) - 0.5)
                costs[bits] += 0.5 * float((outputs.double() * scales**2).sum()) / 12 * float(unexplained)
        gain[role] = costs[4] - costs[8]
        extra[role] = rows * 4 * (-(-columns * 8 // 32) - -(-columns * 4 // 32))
    for inner in ("up_proj",):  # with gate, in one op
        gain["gate_proj"], extra["gate_proj"] = (have["gate_proj"] + have.pop(inner) for have in (gain, extra))
    order = sorted(gain, key=lambda role: -gain[role] / extra[role])
    whole = dense.planned(dense.unchanged(), CompressionConfig(weights="int4"))
    for count in range(1, len(order)):
        chosen = set(order[:count])
        size = dense.other_bytes + whole + sum(extra[role] for role in chosen)
        config = resolve_budget(dense, CompressionConfig(size=size, weights="mixed"))
        assert (config.weights, config.sparsity) == ("mixed", 0.0)
        prices = priced(config, dense, known)
        base = sum(candidates[0].cost for candidates in prices.curves.values())
        (plan,) = prices.allocate(SINGLE_PROCESS)
        assert set(plan.bits) - {"up_proj"} == chosen, count
        assert ("up_proj" in plan.bits) == ("gate_proj" in plan.bits)
        assert set(plan.bits.values()) == {8}
        assert dense.planned([plan], config) + dense.other_bytes == size
        best = max(
            sum(gain[role] for role in some)
            for length in range(len(order) + 1)
            for some in itertools.combinations(order, length)
            if sum(extra[role] for role in some) <= size - whole - dense.other_bytes
        )
        reached = base - sum(_cost(prices, plan, key) for key in prices.curves)
        assert reached == pytest.approx(best, rel=1e-4)


def _cost(prices: Prices, plan: Any, key: tuple[int, str]) -> float:
    role = key[1]
    bits = tuple(plan.bits.get(each, 4) for each in (("gate_proj", "down_proj") if role == "down_proj" else (role,)))
    return next(candidate.cost for candidate in prices.curves[key] if candidate.bits == bits)


@pytest.mark.parametrize("by_loss", [True, False])
def test_from_3_to_9_bits_a_budget_is_met_and_used(by_loss: bool) -> None:
    dense = dense_model(num_hidden_layers=4, **LARGER)
    known, config = statistics(dense), None
    for bits in (3.0, 3.7, 4.25, 4.4, 4.9, 5.6, 6.5, 7.3, 8.0, 8.4, 9.0):
        asked = CompressionConfig(
            recipe="best" if by_loss else "lorap",
            bits_per_weight=bits,
            weights="mixed" if bits < byte_budget.MIXED_FROM else "auto",
            rank_multiple=1,
            width_multiple=1,
        )
        config = resolve_budget(dense, asked)
        if config.weights == "mixed":
            prices = priced(config, dense, known) if by_loss else Prices(config, dense)
            for index in range(0 if by_loss else 4):
                prices.add_unseen(index, {role: known[index, role][0] for role in PROJECTIONS})
            plans = prices.allocate(SINGLE_PROCESS)
        elif config.sparsity:
            assert not by_loss
            continue  # tests/test_byte_budget.py
        else:
            plans = dense.unchanged()
        used, budget = dense.planned(plans, config), dense.projection_budget(config)
        assert used <= budget == int(bits * dense.weights / 8)
        assert config.weights == ("int8" if bits > 8.3 else "mixed")
        assert (config.sparsity > 0) == (bits < 4.35)
        assert used >= (0.97 if bits < 8.5 else 0.9) * budget
        if config.weights == "mixed":
            shares = {plan.bits.get(role, 4) for plan in plans for role in PROJECTIONS}
            assert 8 in shares or bits < 4.35


def test_other_hosts_get_one_width() -> None:
    dense = dense_model(num_hidden_layers=2, attention_bias=False, mlp_bias=False, **LARGER)
    found = resolve_budget(dense, CompressionConfig(bits_per_weight=7, target="stock"))
    assert (found.weights, found.sparsity) == ("int4", 0.0)


def test_ranks_and_bits_chosen_together_are_no_worse_than_either_width_alone() -> None:
    dense = dense_model(num_hidden_layers=2, **LARGER)
    known = statistics(dense)
    for bits in (2.2, 3.0, 4.0):
        config = resolve_budget(
            dense, CompressionConfig(bits_per_weight=bits, weights="mixed", rank_multiple=8, width_multiple=8)
        )
        assert config.weights == "mixed"
        costs = {}
        for some in ((4,), (8,), (4, 8)):
            prices = priced(config, dense, known)
            for key, candidates in prices.curves.items():
                prices.curves[key] = [each for each in candidates if {*each.bits} <= {*some}]
            curves, taken = dict(prices.curves), prices.allocate(SINGLE_PROCESS)
            assert dense.planned(taken, config) <= dense.projection_budget(config)
            costs[some] = 0.0
            for (index, role), candidates in curves.items():
                plan = taken[index]
                shape = dense.shapes[index][role]
                size = plan.intermediate_size if role == "down_proj" else plan.ranks.get(role, min(shape))
                roles = ("gate_proj", "down_proj") if role == "down_proj" else (role,)
                wanted = size, tuple(plan.bits.get(each, 4) for each in roles)
                costs[some] += next(each.cost for each in candidates if (each.size, each.bits) == wanted)
        assert costs[4, 8] <= 1.001 * min(costs[(4,)], costs[(8,)])
        assert costs[4, 8] > 0


def test_rounding_errors_are_as_large_as_expected() -> None:
    """GPTQ's mean error is that of the grid, times the energy that later columns do not make up for."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(200, 130, generator=generator)
    shared = torch.randn(130, 40, generator=generator)
    moment = (shared @ shared.T + 3 * torch.eye(130)).double()
    for bits in (4, 8):
        errors = expected_errors(weight, bits=bits, group=32)
        scales = torch.nn.functional.pad(weight.abs(), (0, 30)).reshape(200, 5, 32).amax(-1) / (2 ** (bits - 1) - 0.5)
        torch.testing.assert_close(errors[:, 129], scales[:, 4] ** 2 / 12)
        expected = (errors.double() @ column_energies(moment)).sum()
        found = round_weight(weight, moment, bits=bits, group=32, scale_dtype=torch.float32).weight(torch.float32)
        change = (weight - found).double()
        actual = (change @ moment * change).sum()
        assert 0.7 < float(actual / expected) < 1.15
        assert float(actual) < 0.6 * float((errors.double() @ moment.diagonal()).sum())


def test_of_gate_and_up_the_diagonal_is_summed_up_alone() -> None:
    sums = _Sums(("gate_proj", "up_proj"))
    x, g = torch.randn(3, 9, 5), torch.randn(3, 9, 7)
    mask = torch.rand(3, 9) > 0.3
    for role in ("q_proj", "gate_proj"):
        sums.add(role, x, g, mask)
    sums.add_up({"q_proj": (5, 7), "gate_proj": (5, 7), "up_proj": (5, 7)}, torch.device("cpu"), SINGLE_PROCESS)
    found = sums.sensitivities()
    torch.testing.assert_close(found["gate_proj"].output, found["q_proj"].output.diagonal())
    torch.testing.assert_close(found["gate_proj"].input, found["q_proj"].input)
    assert torch.equal(found["up_proj"].output, torch.zeros(7))


@pytest.mark.parametrize(
    ("family", "recipe", "bits"), [("llama-biases", "best", 7.0), ("qwen2", "lorap", 7.5), ("llama-gqa", "best", 4.2)]
)
def test_what_is_saved_opens_with_the_same_numbers(family, recipe, bits, make_model, compress_small, tmp_path) -> None:
    model = make_model(family, **ODD | {"head_dim": 20}).bfloat16()
    options = {"bits_per_weight": bits, "group_size": 32, "rank_multiple": 1, "width_multiple": 1}
    options |= {"weights": "mixed"} if bits < byte_budget.MIXED_FROM else {}
    model, report = compress_small(model, recipe=recipe, sparsity=None, correction_steps=0, **options)
    assert (report.config.weights, report.config.sparsity > 0) == ("mixed", bits < 5)
    lorap.save(model, tmp_path, report=report)
    fields = LoRAPConfig(**json.loads((tmp_path / "config.json").read_text())["quantization_config"])
    assert (fields.weights, fields.format_version) == ("int4", 6 if fields.other_bits else 5)
    assert 0 < len(fields.other_bits) < 14 or bits < 5
    for name, part in model.named_modules():
        if isinstance(part, QuantizedLinear):
            assert part.bits == fields.bits_of(name)
    weights = sum(layer.numel() for layer in make_model(family, **ODD | {"head_dim": 20}).model.layers.parameters())
    stored = sum(
        t.numel() * t.element_size() for n, t in load_file(tmp_path / "model.safetensors").items() if "_proj" in n
    )
    norms = sum(p.numel() for n, p in model.model.layers.named_parameters() if "norm" in n)
    assert stored <= bits * (weights - norms) / 8
    assert stored > 0.93 * bits * (weights - norms) / 8  # steps are large in so small a model
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    before, after = model.state_dict(), opened.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "int8 where that helps most for its bytes and else int4" in (tmp_path / "README.md").read_text()


def test_a_run_to_a_folder_goes_on_with_its_bits_and_the_plan_tells_of_them(
    model_folder, small_text, tmp_path, monkeypatch
) -> None:
    from lorap.compression import pipeline

    budget = {"bits_per_weight": 7.5, "weights": "mixed", "group_size": 32}
    config = CompressionConfig(num_calibration_samples=8, calibration_seq_len=32, **budget)
    options = lorap.RunOptions(calibration=str(small_text), progress=False, device="cpu", dtype="bfloat16")
    whole = lorap.compress_to_folder(model_folder, tmp_path / "whole", config, options)
    assert whole.config.weights == "mixed"
    round_layer = pipeline.round_layer

    def interrupted(context: Any, index: int, *args: Any, **kwargs: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        round_layer(context, index, *args, **kwargs)

    monkeypatch.setattr(pipeline, "round_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lorap.compress_to_folder(model_folder, tmp_path / "out", config, options)
    monkeypatch.setattr(pipeline, "round_layer", round_layer)
    lorap.compress_to_folder(model_folder, tmp_path / "out", config, options)
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    told = re.search(r": ([\d.]+) MB .*, ([\d.]+) bits for each weight", saved(tmp_path / "whole"))
    assert told, saved(tmp_path / "whole")
    assert float(told[1]) == pytest.approx(sum(tensor.nbytes for tensor in first.values()) / 1e6, abs=0.05)
    assert 7 < float(told[2]) < 7.51

    asked = [
        "--bits-per-weight",
        7.5,
        "--weights",
        "mixed",
        "--group-size",
        32,
        "--dtype",
        "bfloat16",
        "--calibration",
        small_text,
        "--no-time",
    ]
    planned = last_json(run("plan", model_folder, *asked, "--json"))
    assert planned["config"]["weights"] == "mixed"
    assert not planned["exact"]
    assert 0.9 < stored_bytes(tmp_path / "whole") / planned["bytes"] <= 1
    shown = run("plan", model_folder, *asked).stdout
    assert "Weights are int4 or int8, matrix by matrix, and the sparsity 0.0000" in shown
    assert "Bits will be decided by the loss" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "mixed"}, "weights mixed follow from a budget of bytes"),
        ({"weights": "mixed", "size": 10**9, "storage": "pivoted"}, "mixed weights are too coarse for pivoted storage"),
        ({"weights": "mixed", "size": 10**9, "target": "stock"}, "for target stock choose int4 or int8"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(lorap.ConfigError, match=message):
        CompressionConfig(**options)
