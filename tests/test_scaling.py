"""`lorap plan` says what `lorap compress` then does.

Proved here: ranks, widths, parameters and bytes equal those of the checkpoint, from headers alone; memory is a bound; and with a
clock that counts operations, times of some layers and windows make those of all.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from allocations import peak_bytes
from commands import last_json, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import lorap
from lorap.checkpoint.folders import INDEX
from lorap.checkpoint.load import find_model
from lorap.cli.compress import compress_command
from lorap.cli.plan import LEFT_OUT
from lorap.compression.estimate import Estimate, ModelShape, Texts, estimate, trial
from lorap.compression.estimate.estimate import duration, quantity
from lorap.compression.estimate.memory import TOKENIZER, Memory
from lorap.compression.estimate.sizes import planned_sizes
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
    "int4": {"recipe": "lorap", "weights": "int4", "group_size": 32},
    "pivoted-int8": {"recipe": "lorap", "storage": "pivoted", "weights": "int8"},
}


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
    planned = last_json(run("plan", model_folder, *options, "--no-time", "--json"))
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
    printed = run("plan", tmp_path, "--sparsity", 0.5, "--no-time").stdout
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
    found = last_json(run("plan", llama_405b, "--recipe", "lorap", "--no-time", "--json"))
    assert read_bytes() - before < 5_000_000  # headers, and modules of Python that are imported
    assert found["params_before"] == 405_853_388_800
    assert found["bytes_before"] == 2 * 405_853_388_800
    assert found["exact"]
    # v and o would get 1.2 times their dense size, so they stay dense and q and k have three fifths to live on.
    assert found["ranks"] == {"q_proj": int(0.6 * 8192), "k_proj": int(0.6 * 1024 * 16384 / (1024 + 16384))}
    assert found["intermediate_size"] == 53248 - int(0.21 * 53248) + int(0.01 * 53248)
    assert (found["seconds"], found["trial"]) == (None, None)
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
    result = run("plan", tmp_path, "--sparsity", 0.99, "--recipe", "lorap", "--no-time")
    assert (result.exit_code, "leaves rank 0" in result.output) == (2, True)


@pytest.fixture
def shape_of(make_model, tmp_path: Path) -> Callable[..., ModelShape]:
    def make(family: str, **overrides: Any) -> ModelShape:
        make_model(family, **overrides).save_pretrained(tmp_path / family)
        return ModelShape.read(find_model(tmp_path / family))

    return make


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def planned(shape: ModelShape, config: CompressionConfig, texts: Any = ("wiki.txt",), **options: Any) -> Estimate:
    return estimate(shape, config, Texts.of(config, list(texts), evaluation_texts=1), **options)


@pytest.mark.parametrize(
    ("windows", "said"), [(1, "1 calibration window suffices for 1 of 8"), (50, "for 4 of 8"), (96, "")]
)
def test_few_windows_are_told_before_the_work(shape_of, windows: int, said: str) -> None:
    table = planned(shape_of("llama-gqa"), CompressionConfig(num_calibration_samples=windows)).table()
    assert ("few windows" in table) == bool(said)
    assert said in table
    assert not said or "96 would for all" in table


@pytest.mark.parametrize("options", [{"recipe": "lorap"}, {}, {"recipe": "svd-llm"}], ids=["lorap", "best", "svd-llm"])
def test_memory_is_a_bound_and_not_far_from_it(make_model, shape_of, tokens, options: dict) -> None:
    sizes = {"hidden_size": 192, "intermediate_size": 500, "num_attention_heads": 6, "num_hidden_layers": 3}
    config = CompressionConfig(sparsity=0.5, num_calibration_samples=16, calibration_seq_len=32, **options)
    shape = replace(shape_of("llama-gqa", **sizes), paged=False)
    texts = Texts.of(config, ["wiki.txt"], evaluation_texts=0)
    model = make_model("llama-gqa", **sizes)
    peak = peak_bytes(lambda: lorap.compress(model, calibration=tokens, config=config, progress=False))
    bound = Memory(shape, config, planned_sizes(shape, config), texts, base=-TOKENIZER, room=10**12).by_stage()
    assert peak + shape.computed_bytes <= max(bound.values()) <= 2 * (peak + shape.computed_bytes)


def test_a_model_too_large_to_write_in_memory_is_told(shape_of) -> None:
    shape = shape_of("llama-gqa")
    shape = replace(shape, params={**shape.params, "q_proj": 10**10})  # far more than this process holds itself
    config = CompressionConfig(recipe="lorap")
    small, large = (planned(shape, config, ["self"], room=room) for room in (6 * 10**10, 9 * 10**10))
    assert "40.0 GB, more than half of" in small.remarks[0]
    assert "--calibration FILE" in small.remarks[0]
    assert large.remarks == planned(shape, config, room=6 * 10**10).remarks == []


@pytest.mark.parametrize("recipe", ["best", "lorap"])
def test_memory_does_not_grow_with_the_layers(shape_of, recipe: str) -> None:
    few = shape_of("llama-mha")
    many = replace(few, num_layers=200 * few.num_layers)
    config = CompressionConfig(recipe=recipe, sparsity=0.3)
    bounded = [planned(shape, config, max_memory=1000) for shape in (few, many)]
    assert {name: abs(nbytes - bounded[1].memory[name]) < 10**6 for name, nbytes in bounded[0].memory.items()} == (
        dict.fromkeys(bounded[0].memory, True)
    )
    free = planned(many, config)
    assert free.memory_bytes > bounded[1].memory_bytes
    if recipe == "best":  # the hidden states of 2,048 tokens before every layer
        less = planned(replace(many, num_layers=many.num_layers - 100), config)
        assert free.memory["plan"] - less.memory["plan"] == pytest.approx(100 * 2048 * 64 * 4, abs=10**6)


def test_a_model_that_cannot_be_paged_is_held_as_a_whole(shape_of) -> None:
    paged = shape_of("llama-mha")
    sizes = {"config": CompressionConfig(recipe="lorap"), "base": 0, "room": 0}
    texts = Texts.of(sizes["config"], ["wiki.txt"], evaluation_texts=0)
    found = [
        Memory(shape, sizes=planned_sizes(shape, sizes["config"]), texts=texts, **sizes).by_stage()["factorize"]
        for shape in (paged, replace(paged, paged=False))
    ]
    in_memory = (paged.layer_params + paged.resident_params) * paged.itemsize
    assert found[1] - found[0] == paged.computed_bytes - in_memory


def test_what_does_not_fit_is_told_and_not_tried(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorap.system.free_memory_bytes", lambda device: 10**6)
    monkeypatch.setattr("lorap.compression.estimate.try_layers", None)
    result = run("plan", model_folder, "--json")
    found = last_json(result)
    assert (found["seconds"], found["trial"]) == (None, None)
    assert found["remarks"][0].startswith("This does not fit: ")
    assert found["remarks"][0] in result.stderr
    assert f"peak memory: {quantity(found['memory_bytes'], 'B')}" in result.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Time


class Products(TorchDispatchMode):
    """A clock: each operation of a matrix product is a second, and a second more is whatever else torch is called for."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.now += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Products]:
    with Products() as products:
        monkeypatch.setattr("lorap.system.time", products)
        yield products


TRIED = {"lorap": {"recipe": "lorap"}, "best": {}, "flap": {"recipe": "flap", "sparsity": 0.3}}


@pytest.mark.usefixtures("clock", "short_steps")
@pytest.mark.parametrize("options", TRIED.values(), ids=list(TRIED))
def test_two_of_four_layers_tell_what_four_take(
    make_model, tokenizer, small_text, tmp_path, monkeypatch, options
) -> None:
    monkeypatch.setattr(trial, "TRIED_PARAMS", 70_000)
    monkeypatch.setattr(trial, "TRIED_TOKENS", 10 * 32)
    monkeypatch.setattr("lorap.compression.planning.SENSITIVITY_TOKENS", 4 * 32)
    make_model("smollm3", num_hidden_layers=4).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = [f"--{name}={value}" for name, value in ({"sparsity": 0.5} | options).items()]
    words += ["--num-calibration-samples", 24, "--calibration-seq-len", 32, "--eval-text", small_text]
    words += ["--calibration", small_text, "--calibration", "self"]
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    plan = last_json(run("plan", tmp_path / "model", *words, "--out", tmp_path, "--json"))
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.txt"}
    done = last_json(run("compress", tmp_path / "model", tmp_path / "out", *words, "--quiet", "--json"))
    assert plan["trial"]["layers"] == 2
    assert plan["trial"]["windows"] == 10
    found = {stage["name"]: stage["seconds"] for stage in plan["stages"]}
    assert set(found) == set(done["seconds"])
    assert sum(found.values()) == plan["seconds"]
    assert all(math.isfinite(seconds) and seconds >= 0 for seconds in found.values())
    assert plan["seconds"] > 0
    for stage, seconds in done["seconds"].items():
        assert found[stage] == pytest.approx(seconds, rel=0.2), stage
    assert plan["seconds"] == pytest.approx(sum(done["seconds"].values()), rel=0.1)


@pytest.mark.usefixtures("short_steps")
def test_steps_that_a_short_text_leaves_nothing_to_judge_by_are_told_as_compress_does(
    model_folder: Path, small_text: Path, tmp_path: Path
) -> None:
    """Of 4 windows, all that the text has, none can be spared."""
    small_text.write_text(small_text.read_text("utf-8")[:300], "utf-8")
    words = ["--calibration", small_text, "--num-calibration-samples", 4, "--calibration-seq-len", 32]
    words += ["--eval-text", "none", "--sparsity", 0.5]
    done = run("compress", model_folder, tmp_path / "out", *words)
    told = next(line for line in done.output.splitlines() if line.startswith("correction: 0 of 8 steps taken"))
    planned = run("plan", model_folder, *words, "--out", tmp_path)
    assert told in planned.stdout.splitlines()
    assert "few windows" not in planned.stdout


def test_a_trial_that_cannot_be_written_is_refused(model_folder: Path, small_text: Path, tmp_path: Path) -> None:
    result = run("plan", model_folder, "--calibration", small_text, *SMALL, "--out", tmp_path / "absent")
    assert result.exit_code == 2
    assert "choose another --out" in result.output
    assert str(tmp_path / "absent") in result.output


def test_options_are_those_of_compress(model_folder: Path) -> None:
    theirs = set(inspect.signature(compress_command).parameters) - set(LEFT_OUT)
    help_text = run("plan", "--help").stdout
    for name in theirs - {"context", "model"}:
        assert f"--{name.replace('_', '-')}" in help_text
    for name in ("--no-time", "--out", "--device", "--quiet", "--json"):
        assert name in help_text
    for name in ("--overwrite", "--restart", "--gpu", "--processes"):
        assert name not in help_text
    for gone, instead in ((("--gpu", "h100"), "--device cuda"), (("--processes", 8), "torchrun")):
        result = run("plan", model_folder, *gone)
        assert (result.exit_code, f"no {gone[0]} any more" in result.output, instead in result.output) == (
            2,
            True,
            True,
        )


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
