"""``lorap profile``: stages whose parts fit into the whole, the kernels that ran, and a trace that shows the ranges.

Proved here on a CPU: every decoder layer, its attention and its FFN, and the head appear in both phases; no hook is left on
the model; ranges nest in the trace as modules nest in the model. What only a GPU has, NVTX and CUDA events, is not run.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import run
from transformers import AutoModelForCausalLM

import lorap
from lorap.architectures import cache_argument
from lorap.evaluation.layer_steps import weight_bytes
from lorap.evaluation.profile_results import KernelTime, PhaseTime, Profile
from lorap.evaluation.profiling import _kernels, _weight_bytes, deeper, profile_model, run_ranges
from lorap.nn import decoder_layer

WORK = {"tokens": 24, "new_tokens": 3}
OPTIONS = ["--tokens", "24", "--new-tokens", "3", "--device", "cpu"]


def assert_parts_fit(times: dict[str, Any], layers: int) -> None:
    assert [len(times[key]) for key in ("layers", "attention", "mlp")] == [layers] * 3
    for layer, attention, mlp in zip(times["layers"], times["attention"], times["mlp"], strict=True):
        assert min(attention, mlp) > 0
        assert attention + mlp <= layer
    assert times["head"] > 0
    assert sum(times["layers"]) + times["head"] <= times["total"]


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "smollm3"])
def test_parts_fit_into_the_whole(make_model, family):
    model = make_model(family)
    found = profile_model(model, **WORK).to_dict()
    assert list(found["phases"]) == ["prefill", "decode"]
    for times in found["phases"].values():
        assert_parts_fit(times, model.config.num_hidden_layers)


def test_kernels_are_those_that_ran(make_model):
    model = make_model("llama-gqa")
    found = profile_model(model, **WORK)
    for phase in ("prefill", "decode"):
        kernels = {kernel.name: kernel for kernel in found.kernels[phase]}
        assert kernels["aten::mm"].calls == 15  # 7 in each of 2 layers, and the head
        assert sum(kernel.share for kernel in found.kernels[phase]) == pytest.approx(1)
        seconds = [kernel.seconds for kernel in found.kernels[phase]]
        assert seconds == sorted(seconds, reverse=True)
        assert not {"prefill", "decode", "head", "layer.0", "layer.0.mlp"} & set(kernels)
        assert found.busy(phase) > 0


def test_rates_are_bytes_of_weights_over_seconds(make_model):
    """1.5 MB in layers and 0.5 MB in the head: 2 MB in 4 ms of prefill, and in 0.5 ms of decoding."""
    model = make_model("llama-gqa")  # the head is the embedding
    layers = sum(parameter.nbytes for layer in model.model.layers for parameter in layer.parameters())
    bytes_read = _weight_bytes(model)
    assert bytes_read["layers"] == layers
    assert bytes_read["head"] == model.lm_head.weight.nbytes
    assert bytes_read["attention"] + bytes_read["mlp"] == layers - 2 * 2 * 64 * 4  # norms

    times = {
        "prefill": PhaseTime(4e-3, [1e-3, 2e-3], [5e-4, 5e-4], [5e-4, 5e-4], 1e-3),
        "decode": PhaseTime(5e-4, [1e-4, 2e-4], [5e-5, 5e-5], [2e-5, 4e-5], 1e-4),
    }
    read = {"layers": 1_500_000, "attention": 400_000, "mlp": 1_080_000, "head": 500_000}
    mm = {"prefill": [KernelTime("mm", 3e-3, 1.0, 15)], "decode": [KernelTime("gemv", 2e-4, 1.0, 7.5)]}
    found = Profile("cpu", 24, 3, times, mm, read)
    assert found.bandwidth("prefill") == pytest.approx(0.5e9)
    assert found.to_dict()["bytes_per_second"]["decode"] == pytest.approx(4e9)
    assert found.busy("decode") == pytest.approx(0.4)
    stages, prefill, decode = found.table().split("\n\n")
    row = next(line.split() for line in stages.splitlines() if line.strip().startswith("mlp"))
    assert row == ["mlp", "1.1", "1.000", "25.0%", "1.08", "0.060", "12.0%", "18.00"]
    assert ("0.50 GB/s" in prefill, "4.00 GB/s" in decode) == (True, True)
    assert ("mm" in prefill, "gemv" in prefill, decode.split()[-1]) == (True, False, "7.5")


def test_kernels_belong_to_the_phase_in_which_they_start():
    """A GPU kernel runs after its launch: what counts is when, not who called it."""
    cpu, gpu = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(name, device, start, end):
        span = SimpleNamespace(start=start, elapsed_us=lambda: end - start)
        return SimpleNamespace(name=name, device_type=device, time_range=span, self_cpu_time_total=end - start)

    events = [
        event("prefill", cpu, 0, 90),
        event("decode", cpu, 100, 140),
        event("decode", cpu, 140, 200),
        event("decode", gpu, 103, 190),
        event("gemm", gpu, 10, 95),
        event("gemv", gpu, 105, 125),
        event("gemv", gpu, 150, 190),
        event("aten::mm", cpu, 5, 8),
    ]
    found = _kernels(events, "cuda", 2)
    assert found["prefill"] == [KernelTime("gemm", pytest.approx(85e-6), 1.0, 1)]
    assert found["decode"] == [KernelTime("gemv", pytest.approx(30e-6), 1.0, 1)]
    assert [kernel.name for kernel in _kernels(events, "cpu", 2)["prefill"]] == ["aten::mm"]


def test_compressed_and_optimized(make_model, compress_small):
    small, _ = compress_small(make_model("llama-gqa"))
    found = profile_model(lorap.optimize_for_inference(small), **WORK)
    assert_parts_fit(found.to_dict()["phases"]["decode"], 2)
    if lorap.nn.native.HAS_CPU:
        names = {kernel.name for kernel in found.kernels["decode"]}
        assert {"lorap_cpu::low_rank_linear_group", "lorap_cpu::silu_gated_linear", "lorap_cpu::linear"} <= names


@pytest.mark.skipif(not lorap.nn.native.HAS_CPU, reason="lorap/_native.so is not built")
@pytest.mark.parametrize("weights", ["float", "int4", "tcq3"])
def test_steps_in_one_call_beside_those_of_dense_layers(weights, make_model, compress_small, monkeypatch, tmp_path):
    dense = make_model("llama-gqa")
    dense_bytes = [sum(parameter.nbytes for parameter in layer.parameters()) for layer in dense.model.layers]
    small, report = compress_small(dense, recipe="lorap", sparsity=0.3, weights=weights)
    lorap.save(small, tmp_path, report=report)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert profile_model(model, **WORK).steps == {}  # not optimized: there is no such call
    ran, op = [], decoder_layer._op
    monkeypatch.setattr(decoder_layer, "_op", lambda *arguments: ran.append(arguments[6]) or op(*arguments))
    torch.manual_seed(5)
    found = profile_model(lorap.optimize_for_inference(model), **WORK)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert [*found.steps] == ["layer", "dense_layer"]
    layer, whole = found.steps.values()
    assert layer.weight_bytes == sum(weight_bytes(each) for each in model.model.layers) / 2
    assert layer.weight_bytes < whole.weight_bytes == dense_bytes[0]
    assert (
        ran[-20:] == [length for length in range(24, 29) for _ in range(2)] * 2
    )  # 2 layers, 2 + 3 steps behind 24 tokens
    rows = [line.split("  ") for line in found.table().splitlines() if "one call" in line or "same, dense" in line]
    for row, step in zip(rows, found.steps.values(), strict=True):
        numbers = [cell.strip() for cell in row if cell.strip()]
        assert numbers[2:] == [f"{1e3 * step.seconds:,.3f}", f"{step.weight_bytes / step.seconds / 1e9:,.2f}"]
    assert found.to_dict()["steps"]["layer"]["seconds"] == layer.seconds > 0


@pytest.mark.skipif(not lorap.nn.native.HAS_CPU, reason="lorap/_native.so is not built")
def test_a_dense_model_has_nothing_beside_its_steps(make_model):
    assert [*profile_model(lorap.optimize_for_inference(make_model("qwen3")), **WORK).steps] == ["layer"]
    assert profile_model(lorap.optimize_for_inference(make_model("smollm3")), **WORK).steps == {}


def test_model_is_left_as_it_was(make_model):
    model = make_model("llama-gqa")
    ids = torch.arange(8)[None]
    before = model(ids).logits
    run_ranges(model, **WORK)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


def test_table(make_model):
    stages, prefill, decode = profile_model(make_model("llama-gqa"), **WORK).table(top=4).split("\n\n")
    header, _, *rows = stages.splitlines()
    assert header.split("  ")[0] == "stage"
    assert "prefill of 24, ms" in header
    assert [row.split("  ")[0] for row in rows if not row.startswith(" ")] == [
        "decoder layers",
        "head",
        "embedding, rotary, cache",
        "whole forward",
        f"slowest layer in decoding: {rows[-1].split(': ')[1]}",
    ]
    assert [row.split()[0] for row in rows if row.startswith("  ")] == ["attention", "mlp", "norms,"]
    whole = next(row for row in rows if row.startswith("whole forward"))
    assert whole.count("100.0%") == 2
    assert len(prefill.splitlines()) == len(decode.splitlines()) == 3 + 4


def test_trace_shows_nested_ranges(make_model, tmp_path):
    trace = tmp_path / "trace.json"
    profile_model(make_model("llama-gqa"), trace=trace, **WORK)
    events = json.loads(trace.read_text())["traceEvents"]
    spans = {name: spans_of(events, name) for name in ("prefill", "decode", "layer.1", "layer.1.mlp", "head")}
    counts = {name: len(found) for name, found in spans.items()}
    assert counts == {"prefill": 1, "decode": 3, "layer.1": 4, "layer.1.mlp": 4, "head": 4}
    assert_inside(spans["layer.1.mlp"], spans["layer.1"])
    assert_inside(spans["layer.1"] + spans["head"], spans["prefill"] + spans["decode"])
    assert any(event.get("name") == "aten::mm" for event in events)


def spans_of(events: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    found = [event for event in events if event.get("name") == name and event.get("cat") == "user_annotation"]
    return [(event["ts"], event["ts"] + event["dur"]) for event in found]


def assert_inside(inner: list[tuple[float, float]], outer: list[tuple[float, float]]) -> None:
    for start, end in inner:
        assert any(begin <= start and end <= stop + 0.01 for begin, stop in outer)  # microseconds, rounded


def test_command(model_folder, tmp_path):
    trace = tmp_path / "trace.json"
    result = run("profile", model_folder, *OPTIONS, "--optimize", "--trace", trace, "--json")
    assert result.exit_code == 0, result.output
    assert "whole forward" in result.stderr
    assert f"trace written to {trace}" in result.stderr
    found = json.loads(result.stdout)
    assert found["optimized"]
    assert (found["tokens"], found["new_tokens"], found["device"]) == (24, 3, "cpu")
    assert_parts_fit(found["phases"]["prefill"], 2)
    assert json.loads(trace.read_text())["traceEvents"]


def test_command_for_nsight(model_folder):
    result = run("profile", model_folder, *OPTIONS)
    assert result.exit_code == 0, result.output
    nsys, ncu = result.stdout.splitlines()[-2:]
    work = f"lorap profile {model_folder} --tokens 24 --new-tokens 3 --dtype auto --device cuda --ranges-only"
    assert nsys.strip().startswith("nsys profile --trace=cuda,nvtx")
    assert ncu.strip().startswith("ncu --nvtx --nvtx-include decode/")
    assert nsys.endswith(work)
    assert ncu.endswith(work)
    assert run("profile", model_folder, *OPTIONS, "--ranges-only").stdout == ""


def test_folder_names_are_quoted():
    assert "'my model' --ranges-only" in deeper(["lorap", "profile", "my model"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trace", "/no/such/folder/trace.json"], "lorap: cannot write /no/such/folder/trace.json"),
        (["--device", "gpu"], "lorap: device 'gpu' cannot be used"),
    ],
    ids=["trace-folder", "device"],
)
def test_mistakes_end_in_one_sentence(model_folder, options, message):
    result = run("profile", model_folder, *options)
    assert result.exit_code == 2
    assert result.stderr.strip().splitlines()[-1].startswith(message)


def test_unknown_family(tmp_path):
    model = torch.nn.Linear(2, 2)
    model.config = type("Config", (), {"model_type": "gpt2"})()
    model.get_output_embeddings = lambda: model
    model.device = torch.device("cpu")
    with pytest.raises(lorap.ArchitectureError, match="cannot find the layers of model type 'gpt2'; known: llama"):
        run_ranges(model)


def test_help_teaches():
    result = run("profile", "--help")
    assert "Example:\n    lorap profile" in result.stdout
    assert "Reading the first table" in result.stdout
    assert Path("trace.json").name in result.stdout


def test_keys_and_values_go_by_the_name_that_this_transformers_has(make_model):
    class Older(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None, use_cache=None): ...

    assert cache_argument(Older()) == "past_key_values"
    model, ids = make_model("qwen3"), torch.arange(7)[None]
    name = cache_argument(model)
    with torch.no_grad():
        first = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], use_cache=True, **{name: first[name]}).logits
        assert torch.allclose(rest, model(ids).logits[:, 4:], atol=1e-4)
