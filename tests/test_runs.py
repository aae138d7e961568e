"""Compression from folder to folder: the same bytes as in memory, after interruptions, on broken disks, and by several processes.

What changes under a run (options, texts, weights) is refused; nothing that was finished is lost; the source is only ever read.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lorap
from lorap import CheckpointError, CompressionConfig, ConfigError, JournalError
from lorap.calibration.offload import HiddenStateStore
from lorap.checkpoint.folders import read_tensors
from lorap.checkpoint.load import find_model, load_model
from lorap.checkpoint.paging import in_memory, in_memory_throughout, offloaded_tensors, paged_model
from lorap.compression.runs.journal import Journal, open_journal
from lorap.compression.runs.run import RunOptions, compress_to_folder
from lorap.outputs import work_path

CRASHING = Path(__file__).parent / "crashing.py"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
CPU = torch.device("cpu")


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, 500, (16, 32)))
    return path


@pytest.fixture
def source(make_model: Any, tmp_path: Path) -> Path:
    """Three layers with grouped queries and tied embeddings, in several files."""
    folder = tmp_path / "model"
    make_model("llama-gqa", num_hidden_layers=3).save_pretrained(folder, max_shard_size="100KB")
    return folder


def small(**options: Any) -> CompressionConfig:
    return CompressionConfig(**{"sparsity": 0.4, "num_calibration_samples": 12, "calibration_seq_len": 32, **options})


def options(tokens: Path, **more: Any) -> RunOptions:
    return RunOptions(calibration=str(tokens), evaluation=[str(tokens)], progress=False, device="cpu", **more)


def files(folder: Path) -> dict[str, bytes]:
    """All but the reports, which tell times."""
    told = ("lorap_report.json", "report.html")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in told}


# One recipe for each family, and one family for each recipe; the rest is slow.
QUICK = {
    ("llama-gqa", "best"),
    ("qwen2", "stock"),
    ("qwen3", "lorap"),
    ("llama-biases", "svd-llm"),
    ("qwen2", "aa-svd"),
    ("llama-gqa", "flap"),
    ("qwen3", "corrected"),
}
PAIRS = [
    pytest.param(family, recipe, marks=[] if (family, recipe) in QUICK else [pytest.mark.slow])
    for family in ("llama-gqa", "qwen2", "qwen3", "llama-biases")
    for recipe in ("best", "lorap", "svd-llm", "aa-svd", "flap", "stock", "corrected")
]


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize(("family", "recipe"), PAIRS)
def test_same_bytes_as_in_memory(family: str, recipe: str, make_model: Any, tokens: Path, tmp_path: Path) -> None:
    make_model(family).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    more = {"stock": {"target": "stock"}, "corrected": {"correction_steps": 3}}
    config = small(**more.get(recipe, {"recipe": recipe}))
    model, report = lorap.compress(
        tmp_path / "model",
        calibration=str(tokens),
        evaluation=[str(tokens)],
        config=config,
        progress=False,
        device="cpu",
    )
    lorap.save(model, tmp_path / "in memory", report=report)
    streamed = compress_to_folder(tmp_path / "model", tmp_path / "out", config, options(tokens))
    assert files(tmp_path / "out") == files(tmp_path / "in memory")
    assert streamed.projections == report.projections
    assert [entry["after"]["nats"] for entry in streamed.evaluations] == [
        entry["after"]["nats"] for entry in report.evaluations
    ]
    assert not work_path(tmp_path / "out").exists()


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize("steps", [0, 3])
def test_another_dtype_is_cast_on_the_way(steps: int, source: Path, tokens: Path, tmp_path: Path) -> None:
    config = small(recipe="lorap", correction_steps=steps)
    compress_to_folder(source, tmp_path / "out", config, options(tokens, dtype="bfloat16"))
    assert {info.dtype for info in read_tensors(tmp_path / "out").values()} == {"BF16"}
    model = lorap.compress(source, calibration=str(tokens), config=config, dtype="bfloat16", device="cpu")[0]
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=0)


def test_shards_are_as_small_as_asked_and_load(source: Path, tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = compress_to_folder(source, out, small(), options(tokens, max_shard_size="100KB"))
    weights = sorted(out.glob("*.safetensors"))
    assert len(weights) > 2
    assert weights[0].name == f"model-00001-of-{len(weights):05}.safetensors"
    found = lorap.checkpoint.load.load_model(find_model(out))
    assert sum(parameter.numel() for parameter in found.parameters()) == report.params_saved
    with pytest.raises(ConfigError, match="'small' is no size"):
        compress_to_folder(source, tmp_path / "other", small(), options(tokens, max_shard_size="small"))


@pytest.mark.usefixtures("short_steps")
def test_one_layer_is_in_memory_at_a_time(source: Path, tokens: Path, tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[int] = []
    advance = lorap.calibration.stream.CalibrationStream.advance
    opened: list[Any] = []

    def opens(*args: Any, **kwargs: Any) -> Any:
        opened.append(paged_model(*args, **kwargs))
        return opened[-1]

    def watching(self: Any, index: int, layer: Any) -> None:
        present = [not next(one.parameters()).is_meta for one in opened[0].model.layers]
        assert present[index]
        seen.append(sum(present))
        advance(self, index, layer)

    monkeypatch.setattr("lorap.checkpoint.load.paged_model", opens)
    monkeypatch.setattr(lorap.calibration.stream.CalibrationStream, "advance", watching)
    compress_to_folder(source, tmp_path / "out", small(correction_steps=2), options(tokens))
    assert set(seen) == {1}
    assert len(seen) >= 9


@pytest.mark.parametrize("limit", [0, None], ids=["paged", "whole"])
def test_a_paged_model_runs_as_a_whole(limit: int | None, source: Path, tokens: Path) -> None:
    ids = torch.from_numpy(np.load(tokens))[:2]
    dense = lorap.checkpoint.load.load_model(find_model(source))
    paged = load_model(find_model(source), paged=True)
    layers = list(paged.model.layers)
    told = pytest.warns(RuntimeWarning, match=r"holds 0.0 GB .* --calibration FILE") if limit == 0 else nullcontext()
    with torch.no_grad(), told, in_memory_throughout(paged, layers, limit_bytes=limit):
        assert layers[0].self_attn.q_proj.weight.is_meta == (limit == 0)
        assert torch.equal(paged(input_ids=ids).logits, dense(input_ids=ids).logits)
    assert all(parameter.is_meta for parameter in layers[1].parameters())
    assert offloaded_tensors(paged.model.norm) is None
    assert not paged.model.norm.weight.is_meta


def test_what_is_to_stay_stays(source: Path, monkeypatch: Any) -> None:
    """As on a GPU with room for all."""
    monkeypatch.setattr("lorap.checkpoint.paging._fits_as_resident", lambda device, nbytes: True)
    paged = load_model(find_model(source), paged=True)
    layer = paged.model.layers[1]
    for _ in range(2):
        with in_memory(layer):
            weight = layer.mlp.up_proj.weight
        assert layer.mlp.up_proj.weight is weight
        assert not weight.is_meta


def test_hidden_states_beyond_the_budget_are_on_disk(source: Path, tokens: Path, tmp_path: Path) -> None:
    compress_to_folder(source, tmp_path / "plain", small(), options(tokens))
    compress_to_folder(source, tmp_path / "out", small(), options(tokens, max_memory_bytes=1))
    assert files(tmp_path / "out") == files(tmp_path / "plain")
    store = HiddenStateStore(budget_bytes=100, folder=tmp_path / "hidden")
    tensors = [torch.arange(size, dtype=torch.bfloat16).view(1, size) for size in (20, 63, 100, 30)]
    held = [store.put(tensor) for tensor in tensors]
    assert store.used_bytes == 100
    assert store.spilled_bytes == 326
    assert all(torch.equal(one.get(), tensor) for one, tensor in zip(held, tensors, strict=True))
    assert len(list((tmp_path / "hidden").iterdir())) == 2
    del held
    assert store.used_bytes == 0
    assert not list((tmp_path / "hidden").iterdir())


STEPS = ["windows", "before", "plan", "layer-00000", "layer-00002", "corrected", "complete"]
OFTEN = ("plan", "layer-00000", "corrected")


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize("paged", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["paged", "in memory"])
@pytest.mark.parametrize("at", [1, pytest.param(3, marks=pytest.mark.slow), 5])
def test_a_correction_that_was_interrupted_begins_again(
    at: int, paged: bool, source: Path, tokens: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    if not paged:
        monkeypatch.setattr("lorap.checkpoint.load.paged_model", lambda *args, **kwargs: None)
    config = small(correction_steps=2)
    compress_to_folder(source, tmp_path / "whole", config, options(tokens))
    keep, kept = Journal.keep_tensors, itertools.count(1)

    def stops(self: Journal, name: str, *args: Any, **kwargs: Any) -> None:
        keep(self, name, *args, **kwargs)
        if name.startswith("corrected") and next(kept) == at:
            raise KeyboardInterrupt

    # Three layers are kept, twice where they leave memory after each step.
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "keep_tensors", stops)
        if not paged and at > 3:
            compress_to_folder(source, tmp_path / "out", config, options(tokens))
            return
        with pytest.raises(KeyboardInterrupt):
            compress_to_folder(source, tmp_path / "out", config, options(tokens))
    compress_to_folder(source, tmp_path / "out", config, options(tokens))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize(
    "step", [step if step in OFTEN else pytest.param(step, marks=pytest.mark.slow) for step in STEPS]
)
def test_goes_on_behind_the_last_step(step: str, source: Path, tokens: Path, tmp_path: Path, monkeypatch: Any) -> None:
    config = small(correction_steps=2)
    compress_to_folder(source, tmp_path / "whole", config, options(tokens))
    keep = Journal.keep_alone
    done: list[str] = []

    def stops(self: Journal, name: str, *args: Any, **kwargs: Any) -> None:
        keep(self, name, *args, **kwargs)
        done.append(name)
        if name == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "keep_alone", stops)
    with pytest.raises(KeyboardInterrupt):
        compress_to_folder(source, tmp_path / "out", config, options(tokens))
    assert not (tmp_path / "out").exists()
    assert work_path(tmp_path / "out").is_dir()
    first, done[:], step = list(done), [], "never"
    report = compress_to_folder(source, tmp_path / "out", config, options(tokens))
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not set(first) & set(done)  # nothing is done twice
    assert report.seconds["load"] > 0
    assert json.loads((tmp_path / "out" / "lorap_report.json").read_text())["seconds"]


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize(
    "held", ["paged", *(pytest.param(one, marks=pytest.mark.slow) for one in ("stays", "in memory"))]
)
@pytest.mark.parametrize(("fraction", "taken"), [(1.0, 2), (0.5, 2), (0.0, 0)])
def test_a_judgement_that_was_interrupted_comes_out_the_same(
    fraction: float, taken: int, held: str, source: Path, tokens: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Before it was written down, and right behind that."""
    np.save(tokens, np.random.default_rng(0).integers(0, 500, 40 * 32))  # more than is calibrated on
    monkeypatch.setattr("lorap.compression.correction.best_fraction", lambda *_: fraction)
    monkeypatch.setattr("lorap.checkpoint.paging._fits_as_resident", lambda device, nbytes: held == "stays")
    if held == "in memory":
        monkeypatch.setattr("lorap.checkpoint.load.paged_model", lambda *args, **kwargs: None)
    config = small(correction_steps=2)
    whole = compress_to_folder(source, tmp_path / "whole", config, options(tokens))
    assert whole.correction is not None
    assert whole.correction.taken == taken
    compress_to_folder(source, tmp_path / "none", small(correction_steps=0), options(tokens))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "none")]
    assert (weights[0] == weights[1]) == (not taken)
    keep = Journal.keep_alone
    for behind in (False, True):

        def stops(self: Journal, name: str, *args: Any, behind: bool = behind, **kwargs: Any) -> None:
            if name != "corrected" or behind:
                keep(self, name, *args, **kwargs)
            if name == "corrected":
                raise KeyboardInterrupt

        out = tmp_path / f"out-{behind}"
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "keep_alone", stops)
            with pytest.raises(KeyboardInterrupt):
                compress_to_folder(source, out, config, options(tokens))
        assert compress_to_folder(source, out, config, options(tokens)).correction == whole.correction
        assert files(out) == files(tmp_path / "whole")


def unfinished(source: Path, tokens: Path, out: Path, monkeypatch: Any) -> None:
    """A run that stopped behind its first layer."""
    keep = Journal.keep_alone

    def stops(self: Journal, name: str, *args: Any, **kwargs: Any) -> None:
        keep(self, name, *args, **kwargs)
        if name == "layer-00000":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "keep_alone", stops)
        with pytest.raises(KeyboardInterrupt):
            compress_to_folder(source, out, small(), options(tokens))


def test_another_run_to_the_same_output_is_refused(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "out"
    unfinished(source, tokens, out, monkeypatch)
    with pytest.raises(JournalError, match=r"option sparsity was 0\.4 and is 0\.3.*--restart"):
        compress_to_folder(source, out, small(sparsity=0.3), options(tokens))
    saved = np.load(tokens)
    np.save(tokens, saved[::-1])
    with pytest.raises(JournalError, match=r"calibration tokens\.npy x 1 was .* evaluation tokens\.npy was"):
        compress_to_folder(source, out, small(), options(tokens))
    np.save(tokens, saved)
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config + "\n")
    with pytest.raises(JournalError, match=r"model config\.json was"):
        compress_to_folder(source, out, small(), options(tokens))
    (source / "config.json").write_text(config)
    compress_to_folder(source, out, small(), options(tokens))
    assert not work_path(out).exists()


def test_other_weights_are_refused_and_a_copy_is_not(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "out"
    unfinished(source, tokens, out, monkeypatch)
    weights = max(source.glob("*.safetensors"))
    data = weights.read_bytes()
    flipped = bytearray(data)
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    with pytest.raises(JournalError, match=f"{weights.name} is not the file that this run began with"):
        compress_to_folder(source, out, small(), options(tokens))
    weights.write_bytes(data)  # the same again, at another time
    compress_to_folder(source, out, small(), options(tokens))
    assert (out / "model.safetensors").is_file()


def test_restart_throws_away_what_was_done(source: Path, tokens: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "out"
    unfinished(source, tokens, out, monkeypatch)
    compress_to_folder(source, out, small(sparsity=0.3), options(tokens, restart=True))
    compress_to_folder(source, tmp_path / "whole", small(sparsity=0.3), options(tokens))
    assert files(out) == files(tmp_path / "whole")


def test_a_second_process_is_refused(source: Path, tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_journal(out), pytest.raises(JournalError, match=f"process {os.getpid()} is writing .* already"):
        compress_to_folder(source, out, small(), options(tokens, restart=True))
    assert not work_path(out).exists()


@pytest.mark.parametrize("mistake", ["text", "nan", "sparsity"])
def test_mistakes_before_the_work_leave_nothing(mistake: str, source: Path, tokens: Path, tmp_path: Path) -> None:
    config, given = small(), options(tokens)
    if mistake == "text":
        given = options(tmp_path / "absent.txt")
    if mistake == "sparsity":
        config = small(recipe="lorap", sparsity=0.9999)
    if mistake == "nan":
        path = max(source.glob("*.safetensors"))
        offset = max(info.offset for info in lorap.checkpoint.folders.read_header(path).values())
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(np.float32(np.nan).tobytes())
    with pytest.raises(lorap.LoRAPError) as caught:
        compress_to_folder(source, tmp_path / "out", config, given)
    if mistake == "nan":
        assert caught.type is CheckpointError
        assert "contains 1 values that are NaN" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not work_path(tmp_path / "out").exists()


def test_a_file_cut_off_during_the_run(source: Path, tokens: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A clear error, the finished layers are kept, and the run goes on once the file is whole again."""
    weights = next(
        path for path in source.glob("*.safetensors") if "model.layers.2.mlp.up_proj.weight" in load_file(path)
    )
    whole, out = weights.read_bytes(), tmp_path / "out"
    keep = Journal.keep_alone

    def cuts(self: Journal, name: str, *args: Any, **kwargs: Any) -> None:
        keep(self, name, *args, **kwargs)
        if name == "layer-00001":
            os.truncate(weights, len(whole) // 2)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "keep_alone", cuts)
        with pytest.raises(CheckpointError, match=f"{weights.name} was changed while it was in use"):
            compress_to_folder(source, out, small(), options(tokens))
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        compress_to_folder(source, out, small(), options(tokens))
    assert (work_path(out) / "layer-00001.json").is_file()
    weights.write_bytes(whole)
    compress_to_folder(source, out, small(), options(tokens))
    compress_to_folder(source, tmp_path / "undisturbed", small(), options(tokens))
    assert files(out) == files(tmp_path / "undisturbed")


def test_a_step_whose_tensors_were_not_written_is_not_done(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lorap.compression.runs.journal.write_tensors", full)
    with open_journal(tmp_path / "out") as journal:
        with pytest.raises(CheckpointError, match="disk is full"):
            journal.keep("layer-00001", {"rank": 7}, {"weight": torch.ones(3, 5)})
        assert not journal.has("layer-00001")


def crash(kind: str, source: Path, tokens: Path, folder: Path, stride: int, last: int) -> list[dict[str, Any]]:
    command = [sys.executable, str(CRASHING), kind, *map(str, (source, tokens, folder, stride, last))]
    run = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()][1:]


@pytest.mark.parametrize(
    ("kind", "stride", "last"),
    [
        ("kill", 997, 3),
        *(pytest.param(kind, 71, 12, marks=pytest.mark.slow) for kind in ("kill", "full", "eio", "short")),
    ],
)
def test_a_broken_disk_loses_nothing(
    kind: str, stride: int, last: int, source: Path, tokens: Path, tmp_path: Path
) -> None:
    """Killed, full or failing at points all over the run, the last renames among them; then the same bytes as undisturbed."""
    found = crash(kind, source, tokens, tmp_path / "runs", stride, last)
    assert len(found) >= (1 if kind == "short" else last)
    for one in found:
        assert (one["resumed"], one["same"], one["source"], one["left"]) == (0, True, True, []), one
        if kind == "kill":
            assert one["broken"] == 9, one
            assert one["between"] in ("old", "gone", "new"), one
        elif kind == "short":
            assert one["broken"] == 0, one
        else:
            assert one["broken"] == 3, one
            # Where not even names can be changed, neither forth nor back, the message says where the new folder is.
            assert one["between"] in ("old", "new") or "it is whole in" in one["message"], one
            expected = ("disk is full", "No space left") if kind == "full" else ("Input/output error",)
            assert any(text in one["message"] for text in expected), one


@pytest.mark.skipif(
    os.getuid() != 0 or not Path("/proc/mounts").exists(), reason="mounting a small disk needs root on Linux"
)
def test_a_small_disk(source: Path, tokens: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine does not let one mount a tmpfs")
    try:
        with pytest.raises(CheckpointError, match=r"the disk is full .*run the same command again"):
            compress_to_folder(source, disk / "out", small(), options(tokens))
        subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
        compress_to_folder(source, disk / "out", small(), options(tokens))
        compress_to_folder(source, tmp_path / "whole", small(), options(tokens))
        assert files(disk / "out") == files(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def torchrun(
    count: int, source: Path, tokens: Path, out: Path, *more: str, **env: str
) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        "-m",
        "lorap",
    ]
    command += ["compress", str(source), str(out), "--calibration", str(tokens), "--eval-text", str(tokens), "--quiet"]
    command += [
        "--sparsity",
        "0.4",
        "--num-calibration-samples",
        "12",
        "--calibration-seq-len",
        "32",
        "--device",
        "cpu",
        *more,
    ]
    return subprocess.run(command, env=ENV | env, capture_output=True, text=True, timeout=300)


def reconstructed(folder: Path) -> dict[str, torch.Tensor]:
    model = lorap.checkpoint.load.load_model(find_model(folder))
    return {
        name: module.reconstruct(dtype=torch.float64).detach()
        if hasattr(module, "reconstruct")
        else module.weight.data.double()
        for name, module in model.named_modules()
        if name.endswith("_proj")
    }


# Gradients next to 0 may have another sign in another order of summation.
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("steps", "difference"), [pytest.param(0, 1e-6, marks=pytest.mark.slow), (2, 1e-4)])
def test_the_result_does_not_depend_on_the_number_of_processes(
    steps: int, difference: float, count: int, source: Path, tmp_path: Path
) -> None:
    tokens, windows = tmp_path / "tokens.npy", 64  # enough for a step
    np.save(tokens, np.random.default_rng(0).integers(0, 500, (windows, 32)))
    config = small(correction_steps=steps, num_calibration_samples=windows)
    compress_to_folder(source, tmp_path / "1", config, options(tokens))
    more = ["--correction-steps", str(steps), "--num-calibration-samples", str(windows)]
    alone = reconstructed(tmp_path / "1")
    run = torchrun(count, source, tokens, tmp_path / str(count), *more)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("saved to") == 1
    for name, weight in reconstructed(tmp_path / str(count)).items():
        assert float((weight - alone[name]).norm() / alone[name].norm()) < difference, name
    one, many = (json.loads((tmp_path / name / "lorap_report.json").read_text()) for name in ("1", str(count)))
    assert many["evaluations"][0]["after"]["nats"] == pytest.approx(
        one["evaluations"][0]["after"]["nats"], rel=difference
    )
    assert many["params_saved"] == one["params_saved"]
    assert (many["correction"] is None) == (steps == 0)
    for name, value in (one["correction"] or {}).items():
        assert many["correction"][name] == (
            pytest.approx(value, rel=difference) if name in ("before", "after") else value
        )


@pytest.mark.slow
def test_processes_undo_together_what_hurts(source: Path, tokens: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    lines = ("import lorap.algorithms.step_schedule as them", "them.RATE, them.STEP_TOKENS = 30.0, 64")
    (site / "sitecustomize.py").write_text("\n".join(lines))
    np.save(tokens, np.random.default_rng(0).integers(0, 500, 40 * 32))  # windows enough to judge by
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    run = torchrun(2, source, tokens, tmp_path / "out", "--correction-steps", "8", PYTHONPATH=path)
    assert run.returncode == 0, run.stderr[-3000:]
    plain = torchrun(2, source, tokens, tmp_path / "plain", "--correction-steps", "0")
    assert plain.returncode == 0, plain.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "lorap_report.json").read_text())["correction"]
    assert (found["taken"], found["tried"]) == (0, 6)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "plain")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_and_another_number_goes_on(
    source: Path, tokens: Path, tmp_path: Path
) -> None:
    """The second of two dies when the second layer is to be compressed; three finish."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1' and os.environ.get('DIE'):\n"
        "    import builtins\n"
        "    original = builtins.__import__\n"
        "    def patched(name, *args, **kwargs):\n"
        "        module = original(name, *args, **kwargs)\n"
        "        if name == 'lorap.compression.layer' and not hasattr(patched, 'done'):\n"
        "            patched.done = True\n"
        "            compressor = __import__('sys').modules['lorap.compression.layer'].LayerCompressor\n"
        "            compress = compressor.compress\n"
        "            def dies(self, index, *rest, **options):\n"
        "                if index == 1:\n"
        "                    open(os.environ['DIE'], 'x').close()\n"
        "                    os.kill(os.getpid(), 9)\n"
        "                return compress(self, index, *rest, **options)\n"
        "            compressor.compress = dies\n"
        "        return module\n"
        "    builtins.__import__ = patched\n"
    )
    out, died = tmp_path / "out", tmp_path / "died"
    run = torchrun(2, source, tokens, out, PYTHONPATH=str(site), DIE=str(died))
    assert run.returncode != 0
    assert died.exists(), run.stderr[-3000:]  # there, and not of a mistake before
    assert not out.exists()
    assert (
        "lorap: another process of this run is gone" in run.stderr
        or "lorap: interrupted; what is finished" in run.stderr
    )
    assert (work_path(out) / "layer-00000.json").is_file()
    again = torchrun(3, source, tokens, out)
    assert again.returncode == 0, again.stderr[-3000:]
    compress_to_folder(source, tmp_path / "alone", small(), options(tokens))
    alone = reconstructed(tmp_path / "alone")
    for name, weight in reconstructed(out).items():
        assert float((weight - alone[name]).norm() / alone[name].norm()) < 1e-6, name
