"""Headers, indexes and JSON are untrusted input.

Proved here: tensors fill a file exactly and have sizes that torch can count; names stay in the folder; JSON says each thing once;
what lorap accepts safetensors accepts. More of the same, by chance: tests/fuzz.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import safe_open, save_file

from lorap.checkpoint.folders import INDEX, WEIGHTS, read_tensors, weight_files
from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.headers import BITS, read_header
from lorap.checkpoint.load import ModelSource, find_model
from lorap.checkpoint.stored_tensors import stored_tensors
from lorap.checkpoint.validate import CheckedFolder
from lorap.errors import CheckpointError
from lorap.evaluation.info import describe_model, format_info
from lorap.jsonio import MAX_DEPTH, named, parse_object, read_json, shown


def entry(dtype: Any = "F32", shape: Any = (3,), offsets: Any = (0, 12)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(path: Path, header: Any, size: int = 12) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    return path


def refusal(call: Any, *arguments: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        call(*arguments)
    return str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Headers


def test_offsets_count_from_the_start_of_the_file(tmp_path):
    tensors = {"a": torch.arange(15.0).view(3, 5), "b": torch.arange(7, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    for name, info in read_header(tmp_path / "x.safetensors").items():
        raw = torch.frombuffer(bytearray(data[info.offset : info.offset + info.nbytes]), dtype=tensors[name].dtype)
        assert torch.equal(raw.view(info.shape), tensors[name])


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_of_safetensors_is_known(dtype, tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": entry(dtype, [8, 3], [0, 3 * BITS[dtype]])}, 3 * BITS[dtype])
    assert read_header(path)["a"].nbytes == 3 * BITS[dtype]
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["a"]


def test_scalars_and_empty_tensors_are_as_valid_as_in_safetensors(tmp_path):
    header = {
        "a": entry(shape=[], offsets=[0, 4]),
        "b": entry(shape=[2, 0], offsets=[4, 4]),
        "c": entry("F64", [1], [4, 12]),
    }
    found = read_header(write(tmp_path / "x.safetensors", header | {"__metadata__": {"format": "pt"}}))
    assert {name: (info.numel, info.nbytes) for name, info in found.items()} == {"a": (1, 4), "b": (0, 0), "c": (1, 8)}
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert set(file.keys()) == {"a", "b", "c"}


HEADERS = {
    "bool-shape": ({"a": entry(shape=[True])}, "a has the shape [True]"),
    "float-shape": ({"a": entry(shape=[3.0])}, "a has the shape [3.0]"),
    "negative-shape": ({"a": entry(shape=[-3])}, "a has the shape [-3]"),
    "huge-shape": ({"a": entry(shape=[10**30])}, "a has the shape [1000000000000000000000000000000]"),
    "huge-product": (
        {"a": entry(shape=[2**62, 2**62])},
        "a is F32 of shape [4611686018427387904, 4611686018427387904]",
    ),
    "text-shape": ({"a": entry(shape="3")}, "a has the shape '3'"),
    "many-dimensions": ({"a": entry(shape=[1] * 65)}, "a has the shape [1, 1"),
    "bool-offset": ({"a": entry("U8", [1], [False, True])}, "a has the data_offsets [False, True]"),
    "negative-offset": ({"a": entry(offsets=[-12, 0])}, "a has the data_offsets [-12, 0]"),
    "backward-offsets": ({"a": entry(offsets=[12, 0])}, "a has the data_offsets [12, 0]"),
    "one-offset": ({"a": entry(offsets=[12])}, "a has the data_offsets [12]"),
    "huge-offset": ({"a": entry(offsets=[0, 2**63])}, "a has the data_offsets [0, 9223372036854775808]"),
    "unknown-dtype": ({"a": entry("F31")}, "a has the unknown dtype 'F31'"),
    "listed-dtype": ({"a": entry(["F32"])}, "a has the unknown dtype ['F32']"),
    "no-dtype": ({"a": {"shape": [3], "data_offsets": [0, 12]}}, "a has the unknown dtype None"),
    "not-an-entry": ({"a": 3}, "a is 3"),
    "too-few-bytes": ({"a": entry(shape=[4])}, "a is F32 of shape [4], which cannot be 12 bytes"),
    "half-a-byte": ({"a": entry("F4", [25])}, "a is F4 of shape [25], which cannot be 12 bytes"),
    "overlap": ({"a": entry(), "b": entry(shape=[1], offsets=[8, 12])}, "b starts at byte"),
    "same-bytes": ({"a": entry(), "b": entry()}, "it shares bytes with the one before it"),
    "gap": (
        {"a": entry(shape=[1], offsets=[0, 4]), "b": entry(shape=[1], offsets=[8, 12])},
        "it leaves a gap before it",
    ),
    "late-start": ({"a": entry(shape=[2], offsets=[4, 12])}, "it leaves a gap before it"),
    "bytes-left": ({"a": entry(shape=[2], offsets=[0, 8])}, "the header describes"),
    "no-tensors": ({}, "the header describes"),
    "metadata": ({"a": entry(), "__metadata__": {"format": 1}}, "its __metadata__ is not an object of strings"),
    "metadata-list": ({"a": entry(), "__metadata__": []}, "its __metadata__ is not an object of strings"),
    "unprintable-name": ({"\x1b[2J": entry()}, r"a tensor is called '\x1b[2J'"),
    "long-name": ({"a" * 5000: entry()}, "a tensor is called 'aaa"),
    "empty-name": ({"": entry()}, "a tensor is called ''"),
    "duplicate-tensor": (b'{"a": {"dtype": "F32"}, "a": {"dtype": "F32"}}', "it has the key a twice"),
    "duplicate-field": (b'{"a": {"dtype": "I8", "dtype": "F32"}}', "it has the key dtype twice"),
    "nan": (b'{"a": NaN}', "it contains NaN"),
    "infinity": (b'{"a": -Infinity}', "it contains -Infinity"),
    "nested": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "it is nested too deeply"),
    "nested-a-bit": (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "it is nested more than 32 deep"),
    "surrogate": (b'{"a": "\\ud800"}', "surrogates not allowed"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "codec can't decode"),
    "long-number": (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
}


@pytest.mark.parametrize(("header", "message"), HEADERS.values(), ids=HEADERS)
def test_a_header_that_lies_is_refused(header, message, tmp_path):
    found = refusal(read_header, write(tmp_path / "x.safetensors", header))
    assert "x.safetensors is truncated or corrupt: " in found
    assert message in found
    assert len(found) < 500
    assert found.isprintable()


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path / "pipe.safetensors", tmp_path / "gone.safetensors", tmp_path):
        assert "it is no file" in refusal(read_header, path)
    assert "cannot read" in refusal(read_header, tmp_path / ("x" * 5000))


def test_a_header_is_not_read_before_its_length_is_checked(tmp_path):
    for length in (100_000_001, 2**63, 2**64 - 1):
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", length))
        os.truncate(path, 200_000_000)  # sparse
        assert f"a header of {length:,} bytes in a file of 200,000,000" in refusal(read_header, path)


# ----------------------------------------------------------------------------------------------------------------------
# Several files


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(2), "c": torch.zeros(1)}, tmp_path / "two.safetensors")
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    return tmp_path


def index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_is_followed(sharded):
    assert [path.name for path in weight_files(sharded)] == ["one.safetensors", "two.safetensors"]
    assert {name: info.shape for name, info in read_tensors(sharded).items()} == {"a": (3,), "b": (2,), "c": (1,)}


NAMES = [
    "../up.safetensors",
    "/etc/up.safetensors",
    "sub/up.safetensors",
    "sub\\up.safetensors",
    "c:up.safetensors",
    "..",
    "",
    3,
]
NAMES += [
    None,
    ["one.safetensors"],
    "one.bin",
    "one\0.safetensors",
    "x" * 300 + ".safetensors",
    "\ud800.safetensors",
    ".safetensors/",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_file_name_that_leaves_the_folder_is_refused(name, sharded):
    save_file({"b": torch.zeros(2)}, sharded.parent / "up.safetensors")
    index(sharded, {"a": "one.safetensors", "b": name})
    assert any(part in refusal(weight_files, sharded) for part in ("no usable weight_map", "surrogates not allowed"))


def test_a_blob_of_a_hub_cache_may_be_linked(sharded, tmp_path_factory):
    blob = tmp_path_factory.mktemp("blobs") / "0123"
    (sharded / "one.safetensors").rename(blob)
    (sharded / "one.safetensors").symlink_to(blob)
    assert set(read_tensors(sharded)) == {"a", "b", "c"}


def test_a_tensor_in_two_files_is_refused(sharded):
    save_file({"a": torch.ones(3), "b": torch.zeros(2), "c": torch.zeros(1)}, sharded / "two.safetensors")
    assert "two.safetensors holds a, which another file" in refusal(read_tensors, sharded)


def test_what_an_index_says_about_tensors_means_nothing(sharded):
    index(sharded, {"a": "two.safetensors", "d": "one.safetensors"})
    assert set(read_tensors(sharded)) == {"a", "b", "c"}


def test_one_file_goes_before_an_index_as_in_transformers(sharded):
    save_file({"whole": torch.zeros(3)}, sharded / WEIGHTS)
    assert weight_files(sharded) == [sharded / WEIGHTS]
    assert set(read_tensors(sharded)) == {"whole"}


# ----------------------------------------------------------------------------------------------------------------------
# What `lorap info` makes of it

UP, MARKS = "model.layers.0.mlp.up_proj", {"quant_method": "lorap", "dense_intermediate_size": 9}
ODD: dict[str, dict[str, tuple[int, ...]]] = {
    "scalar-width": {f"{UP}.weight": ()},
    "empty-width": {f"{UP}.weight": (0, 3)},
    "flat-right": {f"{UP}.right.weight": (3,), f"{UP}.left.weight": (3, 3)},
    "scalar-left": {f"{UP}.right.weight": (3, 3), f"{UP}.left.weight": ()},
    "nothing-before": {f"{UP}.right.weight": (3, 0), f"{UP}.left.weight": (2, 3)},
}


@pytest.mark.parametrize("shapes", ODD.values(), ids=ODD)
def test_info_survives_odd_shapes(shapes, tmp_path):
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / WEIGHTS)
    checked = CheckedFolder(tmp_path, {}, None, stored_tensors(tmp_path / WEIGHTS), LoRAPConfig(**MARKS))
    source = ModelSource(str(tmp_path), "odd", folder=tmp_path, checked=checked)
    if any(len(shape) != 2 for shape in shapes.values()) and len(shapes) == 2:
        assert "the model is damaged" in refusal(describe_model, source)
    else:
        found = describe_model(source)
        assert found["params"] == sum(math.prod(shape) for shape in shapes.values())
        assert format_info(found)


@pytest.mark.parametrize("size", [["a"], {"a": 1}, "12", 2.5, None], ids=repr)
def test_a_config_of_any_kind_is_read_or_refused(size, tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps({"intermediate_size": size, "model_type": size}))
    assert refusal(find_model, tmp_path)
    checked = CheckedFolder(tmp_path, {"intermediate_size": size}, None, stored_tensors(tmp_path / WEIGHTS))
    source = ModelSource(str(tmp_path), "odd", folder=tmp_path, checked=checked)
    assert describe_model(source)["intermediate_size"] == []


@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), b"x" * 500], ids=len)
def test_a_damaged_gguf_file_is_named(data, tmp_path):
    (tmp_path / "m.gguf").write_bytes(data)
    found = refusal(find_model, tmp_path / "m.gguf")
    assert "m.gguf is no GGUF file, or a damaged one" in found


# ----------------------------------------------------------------------------------------------------------------------
# JSON


def test_a_json_file_is_read(tmp_path):
    (tmp_path / "x.json").write_text('{"a": [1, 2.5, null, true, "\\ud83d\\ude00"], "b": {"a": NaN}}')
    found = read_json(tmp_path / "x.json")
    assert found["a"] == [1, 2.5, None, True, "\U0001f600"]
    assert found["b"]["a"] != found["b"]["a"]
    assert "it contains NaN" in refusal(lambda: read_json(tmp_path / "x.json", constants=()))


def test_a_json_file_may_not_be_huge(tmp_path):
    (tmp_path / "x.json").touch()
    os.truncate(tmp_path / "x.json", 10**12)  # sparse
    assert "it has 1,000,000,000,000 bytes, more than" in refusal(read_json, tmp_path / "x.json")


def test_nesting_is_counted():
    fits, too_deep = (b'{"a": ' + b"[" * depth + b"]" * depth + b"}" for depth in (MAX_DEPTH - 2, MAX_DEPTH))
    assert parse_object(fits)
    with pytest.raises(ValueError, match="nested more than 32 deep"):
        parse_object(too_deep)


def test_anything_can_be_shown():
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (10**5000, deep, "x" * 10**6, "\ud800\n\x1b", {"a": object()}):
        assert shown(value).isprintable()
        assert len(shown(value)) <= 83
    assert [named(name) for name in ("a.b", "a\nb", "", 3)] == ["a.b", r"'a\nb'", "''", "3"]
    while deep:  # without recursion
        deep = deep.pop()
