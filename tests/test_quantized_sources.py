"""Models that another program has quantized: read as the numbers that they stand for, compared with the formula in float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from families import tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorap
from lorap.checkpoint.folders import WEIGHTS
from lorap.checkpoint.foreign import floating_point
from lorap.checkpoint.load import find_model, load_model
from lorap.checkpoint.paging import in_memory
from lorap.checkpoint.quantized_weights import QuantizedWeight
from lorap.checkpoint.stored_tensors import stored_tensors
from lorap.compression.runs.run import RunOptions, compress_to_folder
from lorap.errors import CheckpointError
from lorap.evaluation.info import describe_model

Q = "model.layers.1.self_attn.q_proj"
TOKENS = torch.arange(2, 130) % 300
CONFIG = lorap.CompressionConfig(sparsity=0.3, num_calibration_samples=4, calibration_seq_len=16)
FP8 = torch.float8_e4m3fn
Stored = dict[str, Tensor]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose FFN has 104 channels: no multiple of a block of 16 or 32."""
    folder = tmp_path_factory.mktemp("sources") / "dense"
    tiny("llama", intermediate_size=104).to(torch.bfloat16).save_pretrained(folder)
    return folder


def words(numbers: Tensor, bits: int, order: Any = None) -> Tensor:
    """Rows of numbers in int32 words, lowest bits first; in each word in ``order``."""
    per = 32 // bits
    filled = torch.zeros(len(numbers), -(-numbers.shape[1] // per) * per, dtype=torch.int64)
    filled[:, : numbers.shape[1]] = numbers
    parts = filled.unflatten(1, (-1, per))[:, :, list(order or range(per))]
    found = sum(parts[:, :, place] << (bits * place) for place in range(per))
    return torch.where(found >= 2**31, found - 2**32, found).to(torch.int32)


def draw(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape)


def scales(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.rand(shape) * 0.03 + 0.01).to(dtype)


def by_block(grid: Tensor, rows: int, columns: int, block: tuple[int, int]) -> Tensor:
    i, j = torch.arange(rows) // block[0], torch.arange(columns) // block[1]
    return grid.double()[i[:, None], j[None, :]]


def fp8(block: tuple[int, int] | None, *, scale: str, kind: torch.dtype = torch.float32) -> Any:
    """Float8, with a scale for each block, the last of which are cut off, or one for all."""

    def make(rows: int, columns: int) -> tuple[Stored, Tensor]:
        numbers = torch.randn(rows, columns).to(FP8)
        size = block or (rows, columns)
        grid = scales(-(-rows // size[0]), -(-columns // size[1]), dtype=torch.float32)
        if kind.itemsize == 1:
            grid = torch.randint(-9, -5, grid.shape).float().exp2()
        weight = numbers.double() * by_block(grid, rows, columns, size)
        stored = (grid.log2() + 127).to(kind) if kind is torch.uint8 else grid.to(kind)
        return {"weight": numbers, scale: stored if block else stored.flatten()}, weight

    return make


def int8(group: int, *, symmetric: bool = True) -> Any:
    def make(rows: int, columns: int) -> tuple[Stored, Tensor]:
        block = (1, columns if group == -1 else group)
        numbers, grid = draw(-128, 128, rows, columns), scales(rows, -(-columns // block[1]))
        zeros = torch.zeros(grid.shape) if symmetric else draw(-128, 128, *grid.shape)
        weight = (numbers.double() - by_block(zeros, rows, columns, block)) * by_block(grid, rows, columns, block)
        stored = {"weight": numbers.to(torch.int8), "weight_scale": grid}
        return stored if symmetric else stored | {"weight_zero_point": zeros.to(torch.int8)}, weight

    return make


def packed(bits: int, group: int, *, symmetric: bool = True, ordered: bool = False) -> Any:
    def make(rows: int, columns: int) -> tuple[Stored, Tensor]:
        half, size = 2 ** (bits - 1), columns if group == -1 else group
        numbers, grid = draw(-half, half, rows, columns), scales(rows, -(-columns // size))
        zeros = torch.zeros(grid.shape, dtype=torch.int64) if symmetric else draw(-half, half, *grid.shape)
        groups = torch.arange(columns) // size
        groups = groups[torch.randperm(columns)] if ordered else groups
        weight = (numbers - zeros[:, groups]).double() * grid.double()[:, groups]
        stored = {"weight_packed": words(numbers + half, bits), "weight_scale": grid}
        stored["weight_shape"] = torch.tensor([rows, columns])
        stored |= {} if symmetric else {"weight_zero_point": words((zeros + half).T, bits).T.contiguous()}
        return stored | ({"weight_g_idx": groups.to(torch.int32)} if ordered else {}), weight

    return make


def gptq(bits: int, group: int, *, less: int, ordered: bool = False) -> Any:
    def make(rows: int, columns: int) -> tuple[Stored, Tensor]:
        size = columns if group == -1 else group
        numbers, grid = draw(0, 2**bits, columns, rows), scales(-(-columns // size), rows)
        zeros = draw(less, 2**bits, *grid.shape)
        groups = torch.arange(columns) // size
        groups = groups[torch.randperm(columns)] if ordered else groups
        weight = ((numbers - zeros[groups]).double() * grid.double()[groups]).T
        stored = {"qweight": words(numbers.T, bits).T.contiguous(), "qzeros": words(zeros - less, bits), "scales": grid}
        return stored | {"g_idx": groups.to(torch.int32)}, weight

    return make


def awq(group: int) -> Any:
    def make(rows: int, columns: int) -> tuple[Stored, Tensor]:
        order = (0, 2, 4, 6, 1, 3, 5, 7)  # which column each nibble of a word holds
        numbers, grid = draw(0, 16, columns, rows), scales(-(-columns // group), rows)
        zeros = draw(0, 16, *grid.shape)
        groups = torch.arange(columns) // group
        weight = ((numbers - zeros[groups]).double() * grid.double()[groups]).T
        return {"qweight": words(numbers, 4, order), "qzeros": words(zeros, 4, order), "scales": grid}, weight

    return make


def tensors(kind: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}}


def fp8_config(block: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}


# What it is -> quantization_config, and how a weight is stored, with what it stands for.
SOURCES: Mapping[str, tuple[dict[str, Any], Any]] = {
    "fp8": (fp8_config([32, 32]), fp8((32, 32), scale="weight_scale_inv")),
    "fp8, exponents": (fp8_config([32, 32]), fp8((32, 32), scale="weight_scale_inv", kind=torch.float8_e8m0fnu)),
    "fp8, bytes": (fp8_config([32, 32]), fp8((32, 32), scale="weight_scale_inv", kind=torch.uint8)),
    "fp8, one scale": (fp8_config(None), fp8(None, scale="weight_scale_inv")),
    "float8 by rows": (
        tensors("float-quantized", num_bits=8, type="float", strategy="channel"),
        lambda rows, columns: fp8((1, columns), scale="weight_scale")(rows, columns),
    ),
    "float8 by blocks": (
        tensors("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[48, 16]),
        fp8((48, 16), scale="weight_scale"),
    ),
    "float8": (
        tensors("float-quantized", num_bits=8, type="float", strategy="tensor"),
        fp8(None, scale="weight_scale"),
    ),
    "int8": (tensors("int-quantized", num_bits=8, type="int", strategy="channel"), int8(-1)),
    "int8, zeros": (
        tensors("int-quantized", num_bits=8, type="int", strategy="group", group_size=8, symmetric=False),
        int8(8, symmetric=False),
    ),
    "int4": (tensors("pack-quantized", num_bits=4, type="int", strategy="group", group_size=8), packed(4, 8)),
    "int4, zeros": (
        tensors("pack-quantized", num_bits=4, type="int", group_size=8, symmetric=False),
        packed(4, 8, symmetric=False),
    ),
    "int4, ordered": (
        tensors("pack-quantized", num_bits=4, type="int", strategy="group", group_size=8, actorder="group"),
        packed(4, 8, ordered=True),
    ),
    "packed int8": (tensors("pack-quantized", num_bits=8, type="int", strategy="channel"), packed(8, -1)),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True}, gptq(4, 8, less=1, ordered=True)),
    "gptq v2": (
        {"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
        gptq(8, -1, less=0),
    ),
    "gptq of 2 bits": ({"quant_method": "gptq", "bits": 2, "group_size": 16}, gptq(2, 16, less=1)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm"}, awq(8)),
}


def quantize(folder: Path, quantization: dict[str, Any], make: Callable[[int, int], tuple[Stored, Tensor]]) -> Stored:
    """Put a quantized weight in the place of each projection; returns what they stand for, in float64."""
    torch.manual_seed(0)
    stored, meant = load_file(folder / WEIGHTS), {}
    for name in [name for name in stored if "_proj" in name]:
        parts, meant[name] = make(*stored.pop(name).shape)
        stored |= {f"{name.removesuffix('.weight')}.{leaf}": tensor for leaf, tensor in parts.items()}
    write(folder, stored, quantization)
    return meant


def write(folder: Path, stored: Stored, quantization: dict[str, Any] | None = None) -> None:
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    if quantization is not None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))


@pytest.mark.parametrize("source", SOURCES)
def test_weights_are_the_numbers_that_they_stand_for(source: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantization, make = SOURCES[source]
    made = {name: make(*shape) for name, shape in (("a.q_proj", (40, 96)), ("down_proj", (64, 112)), ("c", (8, 48)))}
    others: Stored = {"a.q_proj.bias": torch.ones(40), "c.input_scale": torch.ones(1), "norm.weight": torch.ones(3)}
    file = tmp_path / WEIGHTS
    save_file(
        others | {f"{n}.{leaf}": t.contiguous() for n, (parts, _) in made.items() for leaf, t in parts.items()}, file
    )
    found = floating_point(stored_tensors(file), quantization)
    assert found.keys() == {*(f"{name}.weight" for name in made), "a.q_proj.bias", "norm.weight"}
    for name, (_, weight) in made.items():
        assert torch.equal(found[f"{name}.weight"].read(), weight.float()), name
        assert found[f"{name}.weight"].shape == weight.shape


@pytest.mark.parametrize("source", ["fp8", "int4", "awq"])
def test_a_model_is_opened_with_them(source: str, dense: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dense, tmp_path / "model")
    meant = quantize(folder, *SOURCES[source])
    assert len(meant) == 14
    found = find_model(folder)
    for paged, dtype in ((False, "float32"), (True, "auto")):
        model = load_model(found, dtype=dtype, paged=paged)
        assert not hasattr(model.config, "quantization_config")
        for name, weight in meant.items():
            with in_memory(model.model.layers[int(name.split(".")[2])]):
                expected = weight.float() if dtype == "float32" else weight.float().to(torch.bfloat16)
                assert torch.equal(model.get_parameter(name), expected), name
    assert describe_model(found)["params"] == sum(tensor.numel() for tensor in load_file(dense / WEIGHTS).values())
    assert describe_model(found)["bytes"] == sum(tensor.nbytes for tensor in load_file(folder / WEIGHTS).values())


@pytest.mark.parametrize("source", ["fp8"])
def test_it_is_compressed_as_the_same_model_in_floating_point(source: str, dense: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dense, tmp_path / "model")
    meant = quantize(folder, *SOURCES[source])
    plain = shutil.copytree(dense, tmp_path / "plain")
    write(
        plain,
        load_file(dense / WEIGHTS) | {name: weight.to(torch.bfloat16).contiguous() for name, weight in meant.items()},
    )
    files = []
    for which in (folder, plain):
        out = tmp_path / f"{which.name}-out"
        compress_to_folder(which, out, CONFIG, RunOptions(calibration=TOKENS, progress=False))
        files.append((out / WEIGHTS).read_bytes())
        assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "lorap"
    assert files[0] == files[1]
    assert run("plan", folder, "--no-time").exit_code == 0


def drop(leaf: str) -> Callable[[Stored], Any]:
    return lambda stored: stored.pop(f"{Q}.{leaf}")


def put(leaf: str, tensor: Tensor) -> Callable[[Stored], Any]:
    return lambda stored: stored.update({f"{Q}.{leaf}": tensor})


# What is wrong -> the source, fields of quantization_config, a change of the tensors, and what must be named.
REFUSED: Mapping[str, tuple[str, dict[str, Any], Callable[[Stored], Any], tuple[str, ...]]] = {
    "method": ("fp8", {"quant_method": "mxfp4"}, len, ("mxfp4", "awq and gptq", "floating point")),
    "no scale": ("fp8", {}, drop("weight_scale_inv"), (f"{Q}.weight", "weight_scale_inv", "floating point")),
    "blocks": ("fp8", {"weight_block_size": [16, 32]}, len, ("weight_scale_inv", "(2, 4)", "(4, 4)")),
    "no blocks": ("fp8", {"weight_block_size": None}, len, ("weight_scale_inv", "(2, 4)", "(1, 1)")),
    "scale of no kind": (
        "fp8",
        {},
        put("weight_scale_inv", torch.ones(2, 2, dtype=torch.int32)),
        ("weight_scale_inv", "I32"),
    ),
    "format": ("int8", {"format": "nvfp4-pack-quantized"}, len, ("nvfp4-pack-quantized", "floating point")),
    "rotated": ("int8", {"transform_config": {"config_groups": {"R1": {}}}}, len, ("rotated",)),
    "no groups": ("int8", {"config_groups": {}}, len, ("config_groups", "floating point")),
    "no zeros": ("int8, zeros", {}, drop("weight_zero_point"), (f"{Q}.weight", "weight_zero_point")),
    "shape": ("int4", {}, put("weight_shape", torch.tensor([64, 80])), ("weight_packed", "(64, 13)", "(64, 10)")),
    "llm-awq": ("awq", {"version": "gemv"}, len, ("gemv", "gemm")),
    "3 bits": ("gptq", {"bits": 3}, len, ("3 bits", "2, 4 and 8")),
    "marlin": ("gptq", {"checkpoint_format": "marlin"}, len, ("marlin", "gptq_v2")),
    "no order": ("gptq", {}, drop("g_idx"), (f"{Q}.weight", "g_idx")),
    "group": ("gptq", {"group_size": 16}, len, ("qzeros", "(13, 8)", "(7, 8)")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused(case: str, tmp_path: Path) -> None:
    source, fields, change, words_ = REFUSED[case]
    quantization, make = SOURCES[source]
    stored = {f"{Q}.{leaf}": tensor for leaf, tensor in make(64, 104)[0].items()}
    change(stored)
    save_file(stored, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError) as error:
        floating_point(stored_tensors(tmp_path / WEIGHTS), quantization | fields)
    assert all(word in str(error.value) for word in words_), str(error.value)


def test_scales_that_belong_to_no_weight_are_refused(dense: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dense, tmp_path / "model")
    quantize(folder, *SOURCES["int4"])
    whole = load_file(folder / WEIGHTS)
    for name in (f"{Q}.k_scale", "model.norm.weight_scale_inv", f"{Q}.weight_zero_point"):
        write(folder, whole | {name: torch.ones(1)})
        with pytest.raises(CheckpointError) as error:
            find_model(folder)
        assert name in str(error.value)
        assert "quantized weights" in str(error.value)


def test_weights_that_are_no_numbers_are_refused_before_a_run(dense: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dense, tmp_path / "model")
    quantize(folder, *SOURCES["fp8"])
    stored = load_file(folder / WEIGHTS)
    stored[f"{Q}.weight_scale_inv"][1, 0] = float("nan")
    write(folder, stored)
    with pytest.raises(CheckpointError, match=rf"{Q}.weight contains 1,024 values"):
        compress_to_folder(folder, tmp_path / "out", CONFIG, RunOptions(calibration=TOKENS, progress=False))


def test_zero_points_that_programs_read_in_two_ways_are_refused(dense: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dense, tmp_path / "model")
    quantize(folder, *SOURCES["gptq"])
    stored = load_file(folder / WEIGHTS)
    stored[f"{Q}.qzeros"][0, 0] = 0x7777777F
    write(folder, stored)
    with pytest.raises(CheckpointError) as error:
        load_model(find_model(folder))
    assert f"{Q}.weight" in str(error.value)
    assert "gptq_v2" in str(error.value)


def test_one_weight_is_in_memory_at_a_time(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(dense, tmp_path / "model")
    quantize(folder, *SOURCES["awq"])
    read: list[str] = []
    own = QuantizedWeight.read
    monkeypatch.setattr(QuantizedWeight, "read", lambda self: (read.append(self.name), own(self))[1])
    model = load_model(find_model(folder), paged=True)
    assert not read
    with in_memory(model.model.layers[1]):
        assert len(read) == 7
        assert all(name.startswith("model.layers.1.") for name in read)
