"""`lorap plan` says what `lorap compress` then does, from headers alone.

Proved here: ranks, widths, parameters and bytes equal those of the checkpoint; operations equal those that torch counts; nothing
but headers is read; memory does not grow with the layers; rates, processes and GPUs do to the seconds what they should.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from corrections import corrected
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from typer.testing import CliRunner

from lorap.algorithms.factorization import factorize_batch
from lorap.algorithms.pivoting import pivot, storage_error
from lorap.algorithms.refit import output_scores, removed_share, repair_down
from lorap.architectures import PROJECTIONS
from lorap.calibration.statistics import ActivationStats
from lorap.checkpoint.folders import INDEX
from lorap.checkpoint.load import find_model
from lorap.cli import app
from lorap.cli.compress import compress_command
from lorap.cli.plan import LEFT_OUT
from lorap.compression.estimate import GPUS, Estimate, Machine, ModelShape, estimate, find_gpu, this_machine, work
from lorap.compression.estimate.cost_terms import CostTerms, duration, quantity
from lorap.compression.estimate.sizes import planned_sizes
from lorap.compression.shrinkage import JUDGED_OUTPUTS, choose_ridge
from lorap.config import CompressionConfig
from lorap.errors import ArchitectureError, CheckpointError, ConfigError
from lorap.evaluation.info import describe_model

SMALL = ["--num-calibration-samples", "8", "--calibration-seq-len", "32"]
# What is exact: every recipe that decides by shapes, both kinds of storage, both targets, and options that change sizes.
BY_SHAPE: dict[str, dict[str, Any]] = {
    "lorap": {"recipe": "lorap"},
    "svd-llm": {"recipe": "svd-llm"},
    "stock": {"recipe": "lorap", "target": "stock", "sparsity": 0.3},
    "pivoted": {"recipe": "lorap", "storage": "pivoted", "rank_multiple": 3, "width_multiple": 7},
    "attention": {"recipe": "svd-llm", "sublayers": ("self_attn",)},
    "nothing": {"recipe": "best", "sparsity": 0.0},
}
FIGURES = "memory=80,bandwidth=3350,bf16=989,fp32=67,fp64=67,pcie=64"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def last_json(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def unit_machine() -> Machine:
    """Everything at one a second, eigenproblems n^2 seconds, so that seconds are amounts."""
    rates = dict.fromkeys(("float64", "float32", "bfloat16", "float16"), 1.0)
    return Machine(
        name="unit",
        kind="measured",
        assumptions=(),
        products=rates,
        cholesky=rates,
        eigen={wanted: {2: 4.0, 1000: 1e6} for wanted in ("float64", "float32", "values")},
        moved=1.0,
        layer_call=1.0,
        memory_bytes=10**12,
        base_bytes=1000,
        host_bytes=10**12,
        link=None,
        disk_read=1.0,
        disk_write=1.0,
        cached_read=1.0,
        hashed=1.0,
        drawn=1.0,
        parallel=8,
    )


def seconds(found: Estimate) -> dict[str, float]:
    return {stage.name: stage.seconds for stage in found.stages}


def flop(found: Estimate, stage: str) -> dict[str, float]:
    """Of matrix products, by what they are for."""
    (one,) = [each for each in found.stages if each.name == stage]
    return {part.what: part.amount for part in one.parts if part.unit == "FLOP"}


# ----------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("options", BY_SHAPE.values(), ids=list(BY_SHAPE))
@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "llama-biases", "llama-wide-heads", "qwen2", "smollm3"])
def test_sizes_are_those_of_the_checkpoint(make_model, compress_small, tmp_path: Path, family: str, options) -> None:
    make_model(family).save_pretrained(tmp_path / "dense")
    shape = ModelShape.read(find_model(tmp_path / "dense"))
    config = CompressionConfig(**{"sparsity": 0.5, **options})
    sizes = planned_sizes(shape, config)
    assert sizes.decided_by == ""

    small, report = compress_small(make_model(family), **{"sparsity": 0.5, **options})
    small.save_pretrained(tmp_path / "small")
    found = describe_model(find_model(tmp_path / "small"))
    assert {kind: counts["params"] for kind, counts in found["kinds"].items()} == dict(sizes.params)
    assert found["ranks"] == {role: [rank] for role, rank in sizes.layer.ranks.items()}
    assert found["intermediate_size"] == [sizes.layer.intermediate_size]
    assert found["bytes"] == sum(sizes.nbytes.values())
    assert found["index_bytes"] == sizes.index_bytes
    assert (sizes.total, sum(shape.params.values())) == (report.params_saved, report.params_total_before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [["--recipe", "lorap"], ["--recipe", "svd-llm"], ["--target", "stock", "--sparsity", "0.3"]],
    ids=["lorap", "svd-llm", "stock"],
)
def test_both_commands_agree(model_folder: Path, small_text: Path, tmp_path: Path, options: list, dtype: str) -> None:
    options = [
        "--sparsity",
        0.5,
        *options,
        *SMALL,
        "--calibration",
        small_text,
        "--eval-text",
        "none",
        "--dtype",
        dtype,
    ]
    planned = last_json(run("plan", model_folder, *options, "--gpu", "h100", "--json"))
    done = last_json(run("compress", model_folder, tmp_path / "out", *options, "--quiet", "--json"))
    assert planned["exact"]
    assert planned["config"] == done["config"]
    assert (planned["params"], planned["params_before"]) == (done["params_saved"], done["params_total_before"])
    for projection in done["projections"]:
        assert planned["ranks"].get(projection["role"]) == projection["rank"]
        if projection["role"] == "down_proj":
            assert planned["intermediate_size"] == projection["shape_after"][1]
    found = describe_model(find_model(tmp_path / "out"))
    assert planned["bytes"] == found["bytes"]
    assert {kind: counts["params"] for kind, counts in planned["kinds"].items()} == {
        kind: counts["params"] for kind, counts in found["kinds"].items()
    }


def test_what_the_loss_decides_is_told_as_a_budget_and_an_even_split(make_model, tmp_path: Path) -> None:
    make_model("llama-gqa").save_pretrained(tmp_path)
    shape = ModelShape.read(find_model(tmp_path))
    sizes = planned_sizes(shape, CompressionConfig(sparsity=0.5))
    even = planned_sizes(shape, CompressionConfig(sparsity=0.5, allocation="even"))
    assert sizes.layer == even.layer
    assert (sizes.decided_by, even.decided_by) == ("the loss, by a backward pass", "")
    # Two layers of 2 x 64 x (64 + 32) + 3 x 64 x 100 parameters.
    assert sizes.budget == (2 * 64 * 96 + 3 * 64 * 100)
    printed = run("plan", tmp_path, "--sparsity", 0.5, "--gpu", "h100").stdout
    assert "Ranks and widths will be decided by the loss, by a backward pass" in printed
    assert "even split of the budget, 31,488 parameters" in printed


def test_flap_is_told_as_the_width_of_an_even_cut(make_model, tmp_path: Path) -> None:
    make_model("llama-gqa").save_pretrained(tmp_path)
    shape = ModelShape.read(find_model(tmp_path))
    sizes = planned_sizes(shape, CompressionConfig(recipe="flap", sparsity=0.3))
    # Attention has 12,288 parameters a layer and stays dense; an FFN channel has 192.
    assert sizes.layer.intermediate_size == 100 - round(0.3 * (12_288 + 19_200) / 192)
    assert sizes.layer.ranks == {}
    assert sizes.params["down_proj"] == 2 * 64 * (sizes.layer.intermediate_size + 1)  # its new bias has 64
    with pytest.raises(ConfigError, match="229 of 200 FFN channels would have to go; lower the sparsity"):
        planned_sizes(shape, CompressionConfig(recipe="flap", sparsity=0.7))


@pytest.mark.real_model
def test_gguf_headers_give_the_shapes_of_the_loaded_model(real_model_folder: Path) -> None:
    shape = ModelShape.read(find_model(real_model_folder))
    assert shape.projections["k_proj"] == (192, 576)
    assert shape.projections["down_proj"] == (576, 1536)
    assert (shape.num_layers, shape.vocab_size, shape.tied, shape.dtype) == (30, 49152, True, "float32")
    assert sum(shape.params.values()) == 134_515_008
    assert not shape.paged


@pytest.fixture(scope="session")
def real_model_folder() -> Path:
    folder = Path(__file__).resolve().parent.parent / ".cache" / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        pytest.skip("python benchmarks/assets.py fetches it")
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Only headers


@pytest.fixture(scope="module")
def llama_405b(tmp_path_factory) -> Path:
    """Llama-3.1-405B in eight files that say what they hold and hold nothing: 812 GB of holes."""
    folder = tmp_path_factory.mktemp("405b")
    config = transformers.LlamaConfig(
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = transformers.LlamaForCausalLM(config).state_dict()
    names, weight_map = list(state), {}
    for part in range(8):
        header, end = {}, 0
        for name in names[part::8]:
            start, end = end, end + 2 * state[name].numel()
            header[name] = {"dtype": "BF16", "shape": list(state[name].shape), "data_offsets": [start, end]}
            weight_map[name] = f"model-{part}.safetensors"
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path = folder / f"model-{part}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with path.open("r+b") as file:
            file.truncate(8 + len(text) + end)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")
    return folder


def read_bytes() -> int:
    """That this process has asked the system for so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def test_405_billion_parameters_are_planned_from_headers(llama_405b: Path) -> None:
    before = read_bytes()
    found = last_json(run("plan", llama_405b, "--recipe", "lorap", "--gpu", "h100", "--processes", 8, "--json"))
    assert read_bytes() - before < 2_000_000
    assert found["params_before"] == 405_853_388_800
    assert found["bytes_before"] == 2 * 405_853_388_800
    assert found["exact"]
    # v and o would get 1.2 times their dense size, so they stay dense and q and k have three fifths to live on.
    assert found["ranks"] == {"q_proj": int(0.6 * 8192), "k_proj": int(0.6 * 1024 * 16384 / (1024 + 16384))}
    assert found["intermediate_size"] == 53248 - int(0.21 * 53248) + int(0.01 * 53248)
    assert sum(stage["seconds"] for stage in found["stages"]) == pytest.approx(found["seconds"])
    assert all(path.stat().st_blocks * 512 < 200_000 for path in llama_405b.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model_type": "mamba"}, "cannot compress model type 'mamba'"),
        ({"quantization_config": {"quant_method": "lorap"}}, "compressed by lorap already; start from the dense model"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            r"weights are quantized \(gptq\), but they are floating-point",
        ),
    ],
)
def test_what_cannot_be_compressed_is_refused(make_model, tmp_path: Path, change: dict, error: str) -> None:
    make_model("llama-gqa").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises((ArchitectureError, CheckpointError), match=error):
        ModelShape.read(find_model(tmp_path))


def test_other_refusals(make_model, tmp_path: Path) -> None:
    model = make_model("llama-gqa")
    state = {
        name: tensor for name, tensor in model.state_dict().items() if "k_proj" not in name and "lm_head" not in name
    }
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"missing, first model\.layers\.0\.self_attn\.k_proj\.weight"):
        ModelShape.read(find_model(tmp_path))
    with pytest.raises(CheckpointError, match="`plan` reads local folders"):
        ModelShape.read(find_model("someone/model", fetch=False))
    make_model("llama-gqa").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="unknown dtype 'int3'"):
        ModelShape.read(find_model(tmp_path), dtype="int3")
    result = run("plan", tmp_path, "--sparsity", 0.99, "--recipe", "lorap", "--gpu", "h100")
    assert (result.exit_code, "leaves rank 0" in result.output) == (2, True)


# ----------------------------------------------------------------------------------------------------------------------
# Operations, against what torch counts


@pytest.fixture
def shape_of(make_model, tmp_path: Path) -> Callable[..., ModelShape]:
    def make(family: str, **overrides: Any) -> ModelShape:
        make_model(family, **overrides).save_pretrained(tmp_path / family)
        return ModelShape.read(find_model(tmp_path / family))

    return make


def test_evaluation_takes_what_torch_counts(make_model, shape_of, unit_machine: Machine) -> None:
    model = make_model("llama-gqa")
    model.set_attn_implementation("eager")  # torch does not count inside fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(128, 32, dtype=torch.int64))
    config = CompressionConfig(recipe="lorap", calibration_seq_len=32)
    found = estimate(shape_of("llama-gqa"), config, unit_machine)
    counted = sum(amount for what, amount in flop(found, "evaluate before").items())
    # Rotary frequencies are a product as well, of 8 x 32 numbers.
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-4)


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("weighed", [True, False], ids=["metric of outputs", "plain"])
def test_a_factorization_takes_what_torch_counts(shape_of, unit_machine: Machine, weighed: bool) -> None:
    """Eigenproblems and triangular solves are no products, so torch does not see them."""
    out, inner, rank = 192, 320, 70
    torch.manual_seed(0)
    weight, x, g = torch.randn(out, inner).double(), torch.randn(500, inner).double(), torch.randn(400, out).double()
    metric, outputs = x.T @ x / 500, (g.T @ g / 400).float() if weighed else None

    def solve() -> None:
        (found,) = factorize_batch([weight], [rank], [metric], output_metrics=[outputs])
        stored = pivot(found.left, found.right)
        exact = found.left @ found.right
        again = torch.empty_like(exact)
        again[stored.pivot_rows] = stored.right
        storage_error(exact, again, metric)

    config = CompressionConfig(output_weighting="loss" if weighed else "none")
    shape = replace(shape_of("llama-gqa"), projections={"o_proj": (out, inner)})
    terms = CostTerms(unit_machine)
    layer = planned_sizes(shape_of("llama-gqa"), CompressionConfig(recipe="lorap")).layer
    work.factorize(terms, shape, config, replace(layer, ranks={"o_proj": rank}), "o_proj")
    products = {part.what: 0.0 for part in terms.parts}
    for part in terms.parts:
        products[part.what] += part.amount if "Cholesky" not in part.rate and part.unit == "FLOP" else 0
    # Pivoting is LU, QR and solves but for right = rows of left times right; an inverse of L is no product either.
    products["pivot rows"] = 2 * rank**2 * inner
    products["factors"] -= 2 * out**3 if weighed else 0
    products["storage error"] -= 2 * out * rank * inner  # the second of two: rows come from the stored factors above
    assert sum(products.values()) == pytest.approx(counted(solve), rel=0.08)


def test_a_refit_takes_what_torch_counts(unit_machine: Machine, shape_of) -> None:
    hidden, width, kept = 160, 300, 210
    torch.manual_seed(0)
    down = torch.randn(hidden, width).double()
    folds = tuple(ActivationStats(width, moments=True) for _ in range(2))
    for fold in folds:
        fold.update(torch.randn(500, width))
    stays = torch.arange(kept)

    def refit() -> None:
        output_scores(down, folds[0].channel_sq_norm, torch.eye(hidden))
        choose_ridge(down, folds, stays, shrinkage=0.2)
        again = repair_down(down, folds[0].moment, stays, ridge=0.1)
        removed_share(down, folds[0].moment, stays, again)

    shape = replace(shape_of("llama-gqa"), projections={"down_proj": (hidden, width)})
    layer = planned_sizes(shape_of("llama-gqa"), CompressionConfig(recipe="lorap")).layer
    terms = CostTerms(unit_machine)
    work.prune(terms, shape, CompressionConfig(channel_score="output"), replace(layer, intermediate_size=kept))
    products = sum(part.amount for part in terms.parts if part.unit == "FLOP" and "Cholesky" not in part.rate)
    # choose_ridge judges every second row of so narrow a model, which is more than it aims at; solves are no products.
    rows = len(down[:: hidden // JUDGED_OUTPUTS])
    assert rows == 80
    solves = 8 * 2 * JUDGED_OUTPUTS * 2 * kept**2 + 2 * hidden * 2 * kept**2
    judged = 8 * 2 * (rows - JUDGED_OUTPUTS) * 3 * width**2
    assert products - solves + judged == counted(refit)


def test_calibration_by_hand(shape_of, unit_machine: Machine) -> None:
    """Two layers; 256 tokens; everything is observed at once by the paper's recipe, and no second moment is taken."""
    config = CompressionConfig(
        recipe="lorap", sparsity=0.5, num_calibration_samples=8, calibration_seq_len=32, sublayers=("mlp",)
    )
    found = flop(estimate(shape_of("llama-gqa"), config, unit_machine), "calibrate")
    attention, across = 2 * 64 * (64 + 32), 4 * 32 * 64
    kept = 100 - 50
    assert found == {
        "observe mlp inner": 2 * 256 * (2 * (attention + 2 * 64 * 100) + across),
        "advance": 2 * 256 * (2 * (attention + 3 * 64 * kept) + across),
    }


def test_what_is_observed_behind_changed_parts(shape_of, unit_machine: Machine) -> None:
    """Each later part of a layer runs behind compressed ones, but the FFN is observed before it is pruned."""
    config = CompressionConfig(
        recipe="lorap",
        sequential="sublayer",
        allocation="even",
        sparsity=0.5,
        num_calibration_samples=8,
        calibration_seq_len=32,
    )
    shape = shape_of("llama-mha")
    found = flop(estimate(shape, config, unit_machine), "calibrate")
    one, across = 16 * (64 + 64), 4 * 32 * 64  # half of a square matrix of 64 is rank 16
    assert found == {
        "observe attention output": 2 * 256 * (2 * 3 * one + across),
        "observe mlp inner": 2 * 256 * (2 * (4 * one + 2 * 64 * 100) + across),
        "advance": 2 * 256 * (2 * (4 * one + 3 * 64 * 50) + across),
    }


def test_planning_happens_only_where_the_loss_is_asked(shape_of, unit_machine: Machine) -> None:
    def stages(**options: Any) -> set[str]:
        return set(seconds(estimate(shape_of("llama-gqa"), CompressionConfig(**options), unit_machine)))

    assert "plan" in stages()
    assert "plan" in stages(allocation="even")
    assert "plan" not in stages(allocation="even", output_weighting="none")
    assert "plan" not in stages(recipe="lorap")
    assert "plan" in stages(recipe="flap")
    assert "factorize" not in stages(target="stock")
    shape = shape_of("llama-gqa")
    assert "sample" in seconds(estimate(shape, CompressionConfig(), unit_machine))
    texts = estimate(shape, CompressionConfig(), unit_machine, calibration=["wiki.txt"], evaluation_texts=0)
    assert not {"sample", "evaluate before", "evaluate after"} & set(seconds(texts))


class Products(TorchDispatchMode):
    """Counts as FlopCounterMode does, which refuses to run inside torch.autograd.grad."""

    flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flop += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.usefixtures("short_steps")
def test_a_correction_takes_what_torch_counts(make_model, compress_small, shape_of, unit_machine: Machine) -> None:
    config = CompressionConfig(
        recipe="lorap", sparsity=0.5, correction_steps=4, num_calibration_samples=16, calibration_seq_len=32
    )
    dense = make_model("llama-gqa")
    model, _ = compress_small(make_model("llama-gqa"), sparsity=0.5)
    for each in (dense, model):
        each.set_attn_implementation("eager")
    with Products() as products:
        corrected(model, dense, torch.randint(3, 500, (16, 32)), torch.arange(16) > 7, steps=4)
    shape = shape_of("llama-gqa")
    found = estimate(shape, config, unit_machine)
    assert sum(flop(found, "correct").values()) == pytest.approx(products.flop, rel=0.1)
    plain = estimate(shape, replace(config, correction_steps=0), unit_machine)
    assert "correct" not in seconds(plain)
    # Every layer lies on the disk once more.
    (kept,) = [stage for stage in found.stages if stage.name == "keep layers"]
    (nbytes,) = [part.amount for part in kept.parts]
    assert found.disk_bytes - plain.disk_bytes == nbytes
    (stage,) = [stage for stage in found.stages if stage.name == "correct"]
    assert sum(part.amount for part in stage.parts if part.what == "corrected layers") == 4 * nbytes


@pytest.mark.parametrize(
    ("windows", "said"), [(1, "1 calibration window suffices for 1 of 8"), (50, "for 4 of 8"), (96, "")]
)
def test_few_windows_are_told_before_the_work(shape_of, unit_machine: Machine, windows: int, said: str) -> None:
    config = CompressionConfig(num_calibration_samples=windows)
    table = estimate(shape_of("llama-gqa"), config, unit_machine).table()
    assert ("few windows" in table) == bool(said)
    assert said in table
    assert not said or "96 would for all" in table


# ----------------------------------------------------------------------------------------------------------------------
# Memory, processes, machines


@pytest.mark.parametrize("recipe", ["best", "lorap"])
def test_memory_does_not_grow_with_the_layers(shape_of, unit_machine: Machine, recipe: str) -> None:
    few = shape_of("llama-mha")
    many = replace(few, num_layers=200 * few.num_layers)
    config = CompressionConfig(recipe=recipe, sparsity=0.3, correction_steps=8)

    def memory(shape: ModelShape) -> dict[str, int]:
        found = estimate(shape, config, unit_machine, calibration=["wiki.txt"], max_memory=1000)
        return {stage.name: stage.memory_bytes for stage in found.stages}

    assert memory(few) == memory(many)
    free = estimate(many, config, unit_machine, calibration=["wiki.txt"])
    assert (
        free.memory_bytes > estimate(many, config, unit_machine, calibration=["wiki.txt"], max_memory=1000).memory_bytes
    )


def test_without_a_budget_planning_keeps_the_states_before_every_layer(shape_of, unit_machine: Machine) -> None:
    few = shape_of("llama-mha")
    many = replace(few, num_layers=few.num_layers + 1000)
    plans = [
        next(stage for stage in estimate(shape, CompressionConfig(), unit_machine).stages if stage.name == "plan")
        for shape in (few, many)
    ]
    assert plans[1].memory_bytes - plans[0].memory_bytes == 1000 * 2048 * 64 * 4


def test_a_model_that_cannot_be_paged_is_held_as_a_whole(shape_of, unit_machine: Machine) -> None:
    paged = shape_of("llama-mha")
    whole = replace(paged, paged=False)
    config = CompressionConfig(recipe="lorap")
    both = [estimate(shape, config, unit_machine) for shape in (paged, whole)]
    by_name = [{stage.name: stage.memory_bytes for stage in found.stages} for found in both]
    layer = paged.layer_params * paged.itemsize
    assert by_name[1]["factorize"] - by_name[0]["factorize"] == paged.computed_bytes - layer


def test_processes_share_windows_and_whole_factorizations(shape_of, unit_machine: Machine) -> None:
    shape, config = shape_of("llama-mha"), CompressionConfig(recipe="svd-llm", sparsity=0.5)
    one, eight = (seconds(estimate(shape, config, unit_machine, processes=count)) for count in (1, 8))
    (calibrate,) = [stage for stage in estimate(shape, config, unit_machine).stages if stage.name == "calibrate"]
    paging = sum(part.seconds for part in calibrate.parts if part.what.endswith("weights"))
    assert paging > 0
    assert eight["calibrate"] - paging == pytest.approx((one["calibrate"] - paging) / 8)
    # Seven matrices, of which the three of the FFN are the largest: no more than the largest at once.
    assert one["factorize"] / 7 < eight["factorize"] < one["factorize"] / 4
    assert "prune and repair" not in one
    crowded = replace(unit_machine, parallel=1)
    assert seconds(estimate(shape, config, crowded, processes=8)) == one


def test_eigenproblems_between_and_beyond_known_sizes(unit_machine: Machine) -> None:
    assert unit_machine.eigen_seconds(2, "float64") == 4
    assert unit_machine.eigen_seconds(30, "float64") == pytest.approx(900)
    assert unit_machine.eigen_seconds(1000, "values") == 1e6
    assert unit_machine.eigen_seconds(3000, "float32") == pytest.approx(27e6)
    assert unit_machine.eigen_seconds(1, "float32") == 4


def test_this_machine_is_tried(tmp_path: Path) -> None:
    found = this_machine(tmp_path, dtype="bfloat16")
    assert list(found.products) == ["bfloat16", "float32", "float64"]
    assert found.products["float32"] > found.products["float64"] * 0.8
    numbers = [*found.products.values(), *found.cholesky.values(), found.moved, found.disk_read, found.disk_write]
    assert all(math.isfinite(rate) and rate > 1e6 for rate in numbers)
    assert found.eigen["float64"][1024] > 5 * found.eigen["float64"][256]
    assert 10**8 < found.base_bytes < found.memory_bytes
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="choose another --out"):
        this_machine(tmp_path / "absent", dtype="float32")


def test_gpus_by_name_and_by_figures() -> None:
    table, figures = find_gpu("h100"), find_gpu(f"name=H100,{FIGURES}")
    assert figures == table
    assert table.kind == "published"
    assert any("50% of the published rate" in sentence for sentence in table.assumptions)
    assert table.products["bfloat16"] == 0.5 * 989e12
    assert find_gpu("4090").rule != table.rule
    assert set(GPUS) == {"h100", "h200", "a100", "l40s", "4090"}
    for wrong, error in (
        ("h101", "no published figures for GPU 'h101'; choose from h100, h200"),
        ("name=mine,memory=80", "or give them: name=NAME,memory=NUMBER"),
        (f"name=mine,{FIGURES},speed=3", "no published figures"),
        (f"name=mine,{FIGURES.replace('80', 'much')}", "must be numbers"),
        (f"name=mine,{FIGURES.replace('80', '0')}", "must be above 0, and memory=0 is not"),
    ):
        with pytest.raises(ConfigError, match=error):
            find_gpu(wrong)


def test_a_gpu_that_is_too_small_is_told(llama_405b: Path) -> None:
    small = f"name=small,{FIGURES.replace('memory=80', 'memory=9')}"
    assert "This does not fit: the memory is 9.00 GB." in run("plan", llama_405b, "--gpu", small).stdout
    assert "This does not fit" not in run("plan", llama_405b, "--gpu", "h100", "--recipe", "lorap").stdout


def test_options_are_those_of_compress(model_folder: Path) -> None:
    theirs = set(inspect.signature(compress_command).parameters) - set(LEFT_OUT)
    help_text = run("plan", "--help").stdout
    for name in theirs - {"context", "model"}:
        assert f"--{name.replace('_', '-')}" in help_text
    for name in ("--gpu", "--processes", "--out", "--quiet", "--json"):
        assert name in help_text
    for name in ("--overwrite", "--restart"):
        assert name not in help_text
    result = run("plan", model_folder, "--gpu", "abacus")
    assert (result.exit_code, "no published figures for GPU 'abacus'" in result.output) == (2, True)


def test_json_says_what_the_table_says(model_folder: Path, tmp_path: Path) -> None:
    result = run("plan", model_folder, "--recipe", "lorap", "--out", tmp_path, "--json")
    found: Mapping[str, Any] = last_json(result)
    assert found["machine"]["kind"] == "measured"
    for stage in found["stages"]:
        parts = stage["parts"]
        assert stage["seconds"] == pytest.approx(sum(part["seconds"] for part in parts))
        assert f"{stage['name']}, {duration(stage['seconds'])}" in result.stderr
        assert all(part["formula"] for part in parts)
    assert f"{found['params']:,}" in result.stderr
    assert set(found["ranks"]) <= set(PROJECTIONS)
    assert list(tmp_path.iterdir()) == [model_folder]


def test_numbers_for_people() -> None:
    assert [quantity(value, "B") for value in (3, 1234, 98.76e6, 2.5e13)] == ["3.00 B", "1.23 kB", "98.8 MB", "25.0 TB"]
    assert [duration(value) for value in (2e-6, 0.0123, 1.5, 59.7, 150, 8000, 10 * 86400)] == [
        "2.0 us",
        "12 ms",
        "1.5 s",
        "60 s",
        "2.5 min",
        "2.2 h",
        "10 d",
    ]
