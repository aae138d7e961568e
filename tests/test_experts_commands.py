"""Every command on a mixture of experts: what it says before, does, and says afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from allocations import peak_bytes
from commands import assert_refused, last_json, run
from families import config, tiny, windows
from test_runs import torchrun

import lorap
from lorap.architectures import ATTENTION, MLP
from lorap.checkpoint.load import find_model, load_model
from lorap.compression.estimate import ModelShape, Texts
from lorap.compression.estimate.memory import TOKENIZER, Memory
from lorap.compression.estimate.sizes import planned_sizes
from lorap.compression.runs.run import RunOptions
from lorap.evaluation.info import describe_model
from lorap.evaluation.inspection.inspect import inspect_model
from lorap.evaluation.inspection.values import SingularValues

MIXTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
SMALL = ["--num-calibration-samples", 8, "--calibration-seq-len", 32, "--sparsity", 0.3, "--device", "cpu"]
# All that decides by shapes, with what it removes where widths are multiples of 8.
BY_SHAPE: dict[str, dict[str, Any]] = {
    "lorap": {"recipe": "lorap"},
    "experts": {"recipe": "lorap", "sublayers": ("mlp",)},
    "attention": {"recipe": "lorap", "sublayers": ("self_attn",)},
    "nothing": {"recipe": "best", "sparsity": 0.0},
}


@pytest.fixture
def folder(tokenizer, tmp_path: Path) -> Path:
    """A dense mixture with its tokenizer."""
    tiny("qwen3_moe").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("options", BY_SHAPE.values(), ids=list(BY_SHAPE))
@pytest.mark.parametrize("family", MIXTURES)
def test_planned_sizes_are_those_of_the_checkpoint(family, options, tmp_path) -> None:
    tiny(family).save_pretrained(tmp_path / "dense")
    shape, chosen = ModelShape.read(find_model(tmp_path / "dense")), config(**{"sparsity": 0.4, **options})
    sizes = planned_sizes(shape, chosen)
    assert sizes.decided_by == ""
    assert (shape.experts, shape.experts_per_token, shape.width) == (5, 2, 48)
    assert shape.layer_params == 5 * 3 * 64 * 48 + 2 * 64 * (64 + 32)
    small, report = lorap.compress(tiny(family), calibration=windows(), config=chosen, progress=False)
    lorap.save(small, tmp_path / "small", report=report)
    found = describe_model(find_model(tmp_path / "small"))
    assert {kind: counts["params"] for kind, counts in found["kinds"].items()} == dict(sizes.params)
    assert {kind: counts["params_before"] for kind, counts in found["kinds"].items()} == dict(shape.params)
    assert found["ranks"] == {role: [rank] for role, rank in sizes.layer.ranks.items()}
    assert found["intermediate_size"] == [sizes.layer.intermediate_size]
    assert found["bytes"] == sum(sizes.nbytes.values())
    assert describe_model(find_model(tmp_path / "dense"))["bytes"] == sum(shape.stored_bytes.values())
    assert all(shape.stored_bytes[kind] == 4 * count for kind, count in shape.params.items())


@pytest.mark.parametrize("recipe", ["lorap", "best"])
def test_planned_memory_is_a_bound(recipe, tmp_path) -> None:
    """Of one layer: what is freed of a model that was there before is not seen."""
    sizes = {"hidden_size": 192, "num_experts": 6, "moe_intermediate_size": 160, "num_hidden_layers": 1}
    tiny("qwen3_moe", **sizes).save_pretrained(tmp_path)
    chosen = config(recipe=recipe, sparsity=0.5)
    shape = ModelShape.read(find_model(tmp_path))
    bound = Memory(
        shape, chosen, planned_sizes(shape, chosen), Texts.of(chosen, ["a.txt"], evaluation_texts=0), -TOKENIZER, 10**12
    ).by_stage()
    model = tiny("qwen3_moe", **sizes)
    peak = peak_bytes(lambda: lorap.compress(model, calibration=windows(), config=chosen, progress=False))
    held = shape.layer_params * shape.itemsize
    assert peak + held <= max(bound.values()) <= 3 * (peak + held)


def test_plan_tries_a_layer_and_compress_does_what_it_said(folder, small_text, tmp_path) -> None:
    options = ["--calibration", small_text, "--eval-text", small_text, "--recipe", "lorap", *SMALL]
    planned = last_json(run("plan", folder, *options, "--out", tmp_path, "--json"))
    assert planned["exact"]
    assert planned["trial"]["layers"] == 2
    assert all(one["seconds"] is not None for one in planned["stages"] if one["name"] in ("calibrate", "prune"))
    done = last_json(run("compress", folder, tmp_path / "small", *options, "--quiet", "--json"))
    assert (planned["params"], planned["params_before"]) == (done["params_saved"], done["params_total_before"])
    assert planned["intermediate_size"] == done["projections"][-1]["shape_after"][1]


def test_spectra_of_experts_are_their_mean(folder, small_text, tmp_path) -> None:
    model = tiny("qwen3_moe")
    found = inspect_model(model, calibration=windows(), progress=False)
    assert [(one.layer, one.role) for one in found.projections] == [(i, r) for i in range(2) for r in ATTENTION + MLP]
    experts, read = model.model.layers[0].mlp.experts, []
    handle = experts.register_forward_pre_hook(lambda _module, args: read.append(args))
    with torch.no_grad():
        model(windows())
    handle.remove()
    ((x, chosen, weights),) = read
    squares: dict[str, list[torch.Tensor]] = {"plain": [], "weighted": []}
    for expert in range(5):
        (gate, up), down = experts.gate_up_proj.data[expert].double().chunk(2), experts.down_proj.data[expert].double()
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        inner = torch.nn.functional.silu(x[rows].double() @ gate.T) * (x[rows].double() @ up.T)
        counted = weights[rows, places].double().square()
        norms = counted @ inner.square() / counted.sum()
        squares["plain"].append(torch.linalg.svdvals(down).square())
        squares["weighted"].append(torch.linalg.svdvals(down * norms.sqrt()).square())
    for kind, each in squares.items():
        expected = SingularValues.of(torch.stack(each).mean(0), (64, 48))
        (told,) = found.find(kind, layer=0, roles=["down_proj"])
        assert (told.shape, told.ranks) == (expected.shape, expected.ranks)
        assert told.effective_rank == pytest.approx(expected.effective_rank, rel=1e-4)
    assert found.channels[0]["plain"].channels == 5 * 48
    options = ["--calibration", small_text, "--num-calibration-samples", 4, "--no-plots", "--quiet", "--json"]
    told = last_json(run("inspect", folder, tmp_path / "look", *options))
    assert len(told["projections"]) == 14
    plain = last_json(run("inspect", folder, tmp_path / "plain", "--calibration", "none", *options[4:]))
    assert "weighted" not in plain["projections"][-1]


def test_commands_on_what_was_compressed(folder, small_text, tmp_path) -> None:
    small, tokens = tmp_path / "small", ["--seq-len", 32]
    last_json(
        run(
            "compress",
            folder,
            small,
            "--calibration",
            small_text,
            "--eval-text",
            small_text,
            *SMALL,
            "--quiet",
            "--json",
        )
    )
    told = last_json(run("info", small, "--json"))
    report = json.loads((small / "lorap_report.json").read_text())
    assert told["param_ratio"] == pytest.approx(report["param_ratio"])
    assert "FFN width" in run("info", small).stdout
    nats = last_json(run("eval", small, "--text", small_text, *tokens, "--max-tokens", 256, "--json"))
    assert 5 < nats["results"][0]["nats"] < 20
    written = run("generate", small, "--prompt", "once", "--max-new-tokens", 5)
    assert written.exit_code == 0, written.output
    page = run("report", small)
    assert page.exit_code == 0, page.output
    assert_refused(run("inspect", small, tmp_path / "look", "--quiet"), "compressed by lorap already")
    assert_refused(run("recover", small, tmp_path / "tuned", "--quiet"), "mixtures of experts")


@pytest.mark.slow
def test_two_processes_share_the_experts(folder, tmp_path) -> None:
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, windows().numpy())
    alone = RunOptions(calibration=[tokens], progress=False)
    lorap.compress_to_folder(folder, tmp_path / "1", config(recipe="lorap", sparsity=0.4), alone)
    done = torchrun(2, folder, tokens, tmp_path / "2", "--num-calibration-samples", "8", "--recipe", "lorap")
    assert done.returncode == 0, done.stderr[-3000:]
    found = [load_model(find_model(tmp_path / name)).state_dict() for name in ("1", "2")]
    one, two = found
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if "experts" in name:
            torch.testing.assert_close(two[name], tensor)
