"""Folders are read with suspicion and written completely or not at all.

Proved here: damaged files are named in one sentence; output folders that would overwrite something are refused;
interrupted, unpermitted and too large writes leave nothing behind; the source model is only ever read.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_transformers import low_rank, with_pivoted_storage

import lorap
from lorap.checkpoint.folders import INDEX, WEIGHTS, read_tensors, weight_files
from lorap.checkpoint.headers import read_header
from lorap.checkpoint.load import find_model
from lorap.errors import CheckpointError
from lorap.evaluation.info import describe_model, format_info
from lorap.outputs import check_output, staged_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.zeros(3, 5), "b": torch.ones(7, dtype=torch.bfloat16)}, path, metadata={"format": "pt"})
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Reading


DAMAGES = {
    "truncated": lambda data: data[:-1],
    "appended": lambda data: data + b"x",
    "garbage": lambda data: b"\xff" * len(data),
    "short": lambda data: data[:5],
    "long header": lambda data: struct.pack("<Q", len(data)) + data[8:],
    "not an object": lambda data: struct.pack("<Q", 2) + b"[]",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_named(damage, weights):
    weights.write_bytes(DAMAGES[damage](weights.read_bytes()))
    with pytest.raises(CheckpointError, match=r"some\.safetensors is truncated or corrupt"):
        read_header(weights)


def test_missing_shard_is_named(tmp_path, weights):
    index = {"weight_map": {"a": "some.safetensors", "c": "gone.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"1 of 2 weight files are missing, first gone\.safetensors"):
        weight_files(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, {"a": 3}, {"a": "../up.safetensors"}], ids=repr)
def test_unusable_index_is_refused(weight_map, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="no usable weight_map"):
        weight_files(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Where may be written


def test_occupied_output_is_refused_and_replaced_on_demand(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(CheckpointError, match=r"is not empty; choose a new folder or pass --overwrite"):
        check_output(out)
    with staged_folder(out, overwrite=True) as stage:
        (stage / "new").touch()
        assert names(out) == ["old"]
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "relation", ["model", "model/inside", ".", "model/../model"], ids=["same", "inside", "parent", "spelled-otherwise"]
)
@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
def test_output_may_not_overlap_the_model(relation, overwrite, model_folder):
    out = model_folder.parent / relation
    with pytest.raises(CheckpointError, match="overlaps the source model"):
        check_output(out, source=model_folder, overwrite=overwrite)


def test_output_may_not_be_the_model_under_another_name(model_folder, tmp_path):
    (tmp_path / "link").symlink_to(model_folder)
    with pytest.raises(CheckpointError, match="overlaps the source model"):
        check_output(tmp_path / "link", source=model_folder, overwrite=True)


def test_output_may_not_be_a_file(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        check_output(tmp_path / "out", overwrite=True)


def test_too_small_a_disk_is_noticed_before_the_work(tmp_path):
    with pytest.raises(CheckpointError, match=r"about 1,000,000,000,000 MB are needed"):
        check_output(tmp_path / "out", needed_bytes=10**18)


NO_PERMISSION = """
import os, sys
from pathlib import Path
import lorap.outputs as outputs
if os.getuid() == 0:
    os.setuid(65534)
try:
    outputs.check_output(Path(sys.argv[1]) / "out")
except outputs.CheckpointError as error:
    print(error)
"""


def test_no_permission_to_write():
    with tempfile.TemporaryDirectory() as name:
        # Everybody may enter the folder above, so that only `locked` refuses.
        Path(name).chmod(0o755)
        locked = Path(name) / "locked"
        locked.mkdir(mode=0o555)
        command = [sys.executable, "-c", NO_PERMISSION, str(locked)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == f"no permission to write into {locked}; choose another output folder", run.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Completely or not at all


def write_half(out: Path, raised: type[BaseException], overwrite: bool = False) -> None:
    with staged_folder(out, overwrite=overwrite) as stage:
        (stage / "half").touch()
        raise raised


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt, SystemExit])
def test_interrupted_write_leaves_nothing(raised, tmp_path):
    with pytest.raises(raised):
        write_half(tmp_path / "deep" / "out", raised)
    assert names(tmp_path / "deep") == []


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_interrupted_replacement_keeps_the_old_folder(raised, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("precious")
    with pytest.raises(raised):
        write_half(out, raised, overwrite=True)
    assert names(tmp_path) == ["out"]
    assert (out / "old").read_text() == "precious"


DISK_FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from lorap.outputs import staged_folder
from lorap.errors import CheckpointError
out = Path(sys.argv[1])
if sys.argv[2] == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
def by_safetensors(stage):
    save_file({"a": torch.ones(2**20)}, stage / "model.safetensors")
def by_python(stage):
    (stage / "model.json").write_bytes(bytes(2**22))
for write in (by_safetensors, by_python):
    try:
        with staged_folder(out) as stage:
            write(stage)
    except CheckpointError as error:
        print(error)
"""


@pytest.mark.parametrize("kind", ["tmpfs", "limit"])
def test_full_disk_is_named_and_leaves_nothing(kind, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if kind == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
        try:
            mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("no mount command")
        if mounted.returncode:
            pytest.skip(f"mount is not permitted: {mounted.stderr.strip()}")
    try:
        command = [sys.executable, "-c", DISK_FULL, str(disk / "out"), kind]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        left = names(disk)
    finally:
        if kind == "tmpfs":
            subprocess.run(["umount", str(disk)], check=False)
    sentences = run.stdout.splitlines()
    assert len(sentences) == 2, run.stderr
    assert all("the disk is full or a quota is reached" in sentence for sentence in sentences), sentences
    assert left == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)], ids=["022", "027", "077"])
def test_files_get_the_mode_that_the_umask_asks_for(umask, mode, make_model, compress_small, tokenizer, tmp_path):
    """safetensors itself writes 0600, which nobody else on a shared machine could read."""
    model, report = compress_small(make_model("llama-gqa"))
    before = os.umask(umask)
    try:
        out = lorap.save(model, tmp_path / "out", report=report, tokenizer=tokenizer, max_shard_size="50KB")
    finally:
        os.umask(before)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == dict.fromkeys(names(out), mode)
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask
    assert len(weight_files(out)) > 1


def test_saved_folder_is_complete(make_model, compress_small, tokenizer, tmp_path):
    model, report = compress_small(make_model("llama-gqa"))
    out = lorap.save(model, tmp_path / "out", report=report, tokenizer=tokenizer)
    assert {"README.md", "config.json", "lorap_report.json", WEIGHTS, "tokenizer.json"} <= set(names(out))
    assert sum(info.numel for info in read_tensors(out).values() if not info.is_guard) == report.params_saved
    assert json.loads((out / "lorap_report.json").read_text())["params_saved"] == report.params_saved


def test_pivoted_checkpoint_is_counted_without_its_index(make_model, compress_small, tmp_path):
    dense = make_model("llama-biases")
    before = sum(parameter.numel() for parameter in dense.parameters())
    model, report = compress_small(dense)
    by_factors = report.params_saved
    model, report = with_pivoted_storage(model, report)
    ranks = [model.get_submodule(name).rank for name in low_rank(model)]
    assert report.params_saved == by_factors - sum(rank * rank for rank in ranks)
    out = lorap.save(model, tmp_path / "out", report=report)
    tensors = read_tensors(out)
    index = [info for info in tensors.values() if info.is_index]
    assert sorted(info.numel for info in index) == sorted(ranks)
    assert not any(info.is_parameter for info in index)
    assert sum(info.numel for info in tensors.values() if info.is_parameter) == report.params_saved
    found = describe_model(find_model(out))
    assert found["params"] == report.params_saved
    assert found["params_before"] == before
    assert found["index_bytes"] == 8 * sum(ranks)
    assert found["bytes"] == 4 * (report.params_saved + 2 * len(ranks)) + 8 * sum(ranks)
    assert (found["storage"], found["dtypes"]) == ("pivoted", ["F32"])
    q = found["kinds"]["q_proj"]
    q_rank = model.model.layers[0].self_attn.q_proj.rank
    assert q == {"params": 2 * (q_rank * (128 - q_rank) + 64), "params_before": 2 * (64 * 64 + 64)}
    assert f"low-rank layers are pivoted; their row index takes {8 * sum(ranks) / 1e3:.1f} kB" in format_info(found)


def test_info_names_the_storage(make_model, compress_small, model_folder, tmp_path):
    model, report = compress_small(make_model("llama-gqa"))
    out = lorap.save(model, tmp_path / "out", report=report)
    small, dense = (describe_model(find_model(folder)) for folder in (out, model_folder))
    assert (small["storage"], small["index_bytes"]) == ("factors", 0)
    assert (dense["storage"], dense["index_bytes"]) == (None, 0)
    assert not any("pivoted" in format_info(found) for found in (small, dense))


def test_info_of_half_a_low_rank_layer_is_refused(make_model, compress_small, tmp_path):
    model, report = compress_small(make_model("llama-gqa"))
    out = lorap.save(model, tmp_path / "out", report=report)
    tensors = load_file(out / WEIGHTS)
    del tensors["model.layers.1.self_attn.k_proj.left.weight"]
    save_file(tensors, out / WEIGHTS)
    with pytest.raises(
        CheckpointError, match=r"1 tensors are missing, first model\.layers\.1\.self_attn\.k_proj\.left\.weight"
    ):
        describe_model(find_model(out))


def test_source_model_is_only_read(model_folder, tmp_path):
    def digests() -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in model_folder.iterdir()}

    before = digests()
    config = lorap.CompressionConfig(sparsity=0.5, num_calibration_samples=8, calibration_seq_len=32)
    model, report = lorap.compress(model_folder, config=config, progress=False)
    lorap.save(model, tmp_path / "out", report=report)
    assert digests() == before
    assert names(tmp_path) == ["model", "out"]
