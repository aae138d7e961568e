"""``lorap profile``: stages whose parts fit into the whole, the kernels that ran, and a trace that shows the ranges.

Proved here on a CPU: every decoder layer, its attention and its FFN, and the head appear in both phases; no hook is left on
the model; ranges nest in the trace as modules nest in the model. What only a GPU has, NVTX and CUDA events, is not run.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lorap
from lorap.cli import app
from lorap.profiling import deeper, profile_model, run_ranges

WORK = {"tokens": 24, "new_tokens": 3}
OPTIONS = ["--tokens", "24", "--new-tokens", "3", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _keep_signal_handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


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
    kernels = {kernel.name: kernel for kernel in found.kernels}
    assert kernels["aten::mm"].calls == 15 * (1 + WORK["new_tokens"])  # 7 in each of 2 layers, and the head
    assert sum(kernel.share for kernel in found.kernels) == pytest.approx(1)
    seconds = [kernel.seconds for kernel in found.kernels]
    assert seconds == sorted(seconds, reverse=True)
    assert not {"prefill", "decode", "head", "layer.0", "layer.0.mlp"} & set(kernels)
    assert found.busy > 0


def test_compressed_and_optimized(make_model, compress_small):
    small, _ = compress_small(make_model("llama-gqa"))
    found = profile_model(lorap.optimize_for_inference(small), **WORK)
    assert_parts_fit(found.to_dict()["phases"]["decode"], 2)
    if lorap.native.HAS_CPU:
        names = {kernel.name for kernel in found.kernels}
        assert {"lorap_cpu::low_rank_linear_group", "lorap_cpu::silu_gated_linear", "lorap_cpu::linear"} <= names


def test_model_is_left_as_it_was(make_model):
    model = make_model("llama-gqa")
    ids = torch.arange(8)[None]
    before = model(ids).logits
    run_ranges(model, **WORK)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


def test_table(make_model):
    stages, kernels = profile_model(make_model("llama-gqa"), **WORK).table(top=4).split("\n\n")
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
    assert len(kernels.splitlines()) == 2 + 4


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
