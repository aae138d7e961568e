"""What goes wrong is known before the work where that can be, and a corrected command is never held up by the one before it.

Proved here: sizes in every usual spelling, a published generation config, a tokenizer and a full disk are tried first; what
shapes can tell is refused at once, by `lorap plan` in the same words; only a finished layer makes a run refuse another command.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from commands import run

import lorap
from lorap import CheckpointError, CompressionConfig, ConfigError, JournalError, distributed
from lorap.checkpoint.save import try_settings
from lorap.checkpoint.write import GENERATION_CONFIG
from lorap.cli.common import as_options
from lorap.compression.runs.journal import COMPLETE, Journal
from lorap.compression.runs.run import RunOptions, compress_to_folder
from lorap.errors import CalibrationError, ProcessError
from lorap.outputs import work_path
from lorap.system import parse_bytes


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, 500, (12, 32)))
    return path


def small(**options: Any) -> CompressionConfig:
    return CompressionConfig(
        **{"recipe": "lorap", "sparsity": 0.4, "num_calibration_samples": 4, "calibration_seq_len": 32, **options}
    )


def options(tokens: Path, **more: Any) -> RunOptions:
    return RunOptions(**{"calibration": str(tokens), "progress": False, "device": "cpu", **more})


def stops_after(step: str, monkeypatch: Any) -> None:
    keep = Journal.keep_alone

    def stops(self: Journal, name: str, *args: Any, **kwargs: Any) -> None:
        keep(self, name, *args, **kwargs)
        if name == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "keep_alone", stops)


def interrupted(step: str, monkeypatch: Any, *arguments: Any) -> None:
    with monkeypatch.context() as patch:
        stops_after(step, patch)
        with pytest.raises(KeyboardInterrupt):
            compress_to_folder(*arguments)


# ----------------------------------------------------------------------------------------------------------------------
# Tried before the work


def test_sizes_in_every_usual_spelling() -> None:
    for text, nbytes in {
        "5GiB": 5 * 2**30,
        "500M": 5 * 10**8,
        "500MB": 5 * 10**8,
        "5gb": 5 * 10**9,
        "1e9": 10**9,
        "1.5e3KB": 1_500_000,
        "123456": 123456,
        123456: 123456,
        "2 gib": 2 * 2**30,
    }.items():
        assert parse_bytes(text) == nbytes, text
    for wrong in ("0", "0.2", "-1", "five", "1e999", "5GBs", "", 0, -3):
        with pytest.raises(ConfigError, match="is no size"):
            parse_bytes(wrong)


def test_a_published_generation_config_is_kept_by_every_writer(
    model_folder: Path, tokens: Path, tmp_path: Path
) -> None:
    """Vicuna's: transformers opens it, and refuses to save it."""
    change = {"temperature": 0.9, "top_p": 0.6}
    path = model_folder / GENERATION_CONFIG
    published = json.loads(path.read_text()) | change
    path.write_text(json.dumps(published))
    compress_to_folder(model_folder, tmp_path / "run", small(), options(tokens))
    model, report = lorap.compress(model_folder, calibration=str(tokens), config=small(), progress=False, device="cpu")
    lorap.save(model, tmp_path / "saved", report=report)
    lorap.export_stock(model, tmp_path / "stock")
    for name in ("run", "saved", "stock"):
        kept = json.loads((tmp_path / name / GENERATION_CONFIG).read_text())
        assert {key: kept[key] for key in change} == change, name
    opened = transformers.GenerationConfig.from_pretrained(tmp_path / "run")
    assert {key: getattr(opened, key) for key in change} == change


def test_a_generation_config_that_nothing_can_run_is_refused_at_once(
    model_folder: Path, tokens: Path, tmp_path: Path
) -> None:
    path = model_folder / GENERATION_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_return_sequences": 4}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json.*num_return_sequences"):
        compress_to_folder(model_folder, tmp_path / "out", small(), options(tokens))
    assert not work_path(tmp_path / "out").exists()


def test_a_tokenizer_that_cannot_be_saved_is_named_before_the_work(
    make_model: Any, tokenizer: Any, model_folder: Path, tokens: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def fails(folder: Path) -> None:
        raise NotImplementedError("this one has no files")

    with pytest.raises(
        CheckpointError, match="the tokenizer of this model cannot be saved: NotImplementedError: this one has"
    ):
        try_settings(make_model("llama-gqa"), SimpleNamespace(save_pretrained=fails), tmp_path / "trial")
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda self, folder: fails(folder))
    monkeypatch.setattr("lorap.compression.runs.run.check_weights", lambda *_, **__: pytest.fail("the work has begun"))
    with pytest.raises(CheckpointError, match="the tokenizer of this model cannot be saved"):
        compress_to_folder(model_folder, tmp_path / "out", small(), options(tokens))
    assert not work_path(tmp_path / "out").exists()


def test_a_disk_without_room_for_the_result_is_named_before_the_work(
    model_folder: Path, tokens: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    monkeypatch.setattr("lorap.compression.runs.run.check_weights", lambda *_, **__: pytest.fail("the work has begun"))
    with pytest.raises(CheckpointError, match=r"has 0 MB free and about 0 MB are needed"):
        compress_to_folder(model_folder, tmp_path / "out", small(), options(tokens))


def test_another_packaging_of_a_complete_run_is_packed_anew(
    model_folder: Path, tokens: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "out"
    arguments = (model_folder, out, small())
    interrupted(COMPLETE, monkeypatch, *arguments, options(tokens))
    monkeypatch.setattr(
        "lorap.compression.layer.LayerCompressor.compress", lambda *_: pytest.fail("a layer was done again")
    )
    compress_to_folder(*arguments, options(tokens, max_shard_size="100KB"))
    assert len(list(out.glob("*.safetensors"))) > 1
    assert not work_path(out).exists()


# ----------------------------------------------------------------------------------------------------------------------
# Refused at once, and forgotten


TOO_MUCH = {
    "lorap": ({"recipe": "lorap"}, "leaves rank 0 for"),
    "svd-llm": ({"recipe": "svd-llm"}, "leaves rank 0 for"),
    "best": (
        {"recipe": "best", "correction_steps": 0},
        "the smallest ranks and widths need .* and the sparsity leaves",
    ),
    "flap": ({"recipe": "flap"}, "FFN channels would have to go"),
    "stock": ({"target": "stock"}, "cannot come from the FFNs alone"),
}


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_what_shapes_can_tell_is_refused_before_anything_is_read(
    kind: str, model_folder: Path, tokens: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    more, sentence = TOO_MUCH[kind]
    out, config = tmp_path / "out", small(**{**more, "sparsity": 0.999})
    with monkeypatch.context() as patch:
        patch.setattr("lorap.compression.runs.run.check_weights", lambda *_, **__: pytest.fail("weights were read"))
        with pytest.raises(ConfigError, match=sentence) as refused:
            compress_to_folder(model_folder, out, config, options(tmp_path / "tokens.npy"))
        patch.setattr("lorap.compression.pipeline.read_windows", lambda *_, **__: pytest.fail("texts were read"))
        with pytest.raises(ConfigError, match=sentence):
            lorap.compress(model_folder, calibration=str(tokens), config=config, progress=False)
    assert not work_path(out).exists()
    recipe = ["--target", "stock"] if kind == "stock" else ["--recipe", kind]
    planned = run("plan", str(model_folder), "--sparsity", "0.999", *recipe)
    assert planned.exit_code == 2
    assert re.sub(r"\s+", " ", planned.stderr).strip() == f"lorap: {as_options(str(refused.value))}"


@pytest.mark.parametrize("step", ["windows", "plan"])
def test_a_run_without_a_finished_layer_holds_up_nobody(
    step: str, model_folder: Path, tokens: Path, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    out = tmp_path / "out"
    interrupted(step, monkeypatch, model_folder, out, small(), options(tokens))
    report = compress_to_folder(model_folder, out, small(sparsity=0.3), options(tokens))
    assert report.config.sparsity == 0.3
    assert "no finished layer; what it had prepared is thrown away" in caplog.text
    interrupted("layer-00000", monkeypatch, model_folder, tmp_path / "other", small(), options(tokens))
    with pytest.raises(JournalError, match=r"sparsity was 0\.4 and is 0\.3"):
        compress_to_folder(model_folder, tmp_path / "other", small(sparsity=0.3), options(tokens))


def test_a_refusal_after_the_windows_leaves_nothing_unless_a_layer_is_finished(
    model_folder: Path, tokens: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out, arguments = tmp_path / "out", (model_folder, tmp_path / "out", small(), options(tokens))

    def refuses(*_: Any, **__: Any) -> None:
        raise CalibrationError("these activations are not finite")

    with monkeypatch.context() as patch:
        patch.setattr("lorap.compression.pipeline.make_plan", refuses)
        with pytest.raises(CalibrationError):
            compress_to_folder(*arguments)
    assert not work_path(out).exists()
    interrupted("layer-00000", monkeypatch, *arguments)
    with monkeypatch.context() as patch:
        patch.setattr("lorap.compression.layer.LayerCompressor.compress", refuses)
        with pytest.raises(CalibrationError):
            compress_to_folder(*arguments)
    assert (work_path(out) / "layer-00000.json").is_file()


def test_another_number_of_threads_is_told(
    model_folder: Path, tokens: Path, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    arguments = (model_folder, tmp_path / "out", small(), options(tokens))
    interrupted("layer-00000", monkeypatch, *arguments)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    compress_to_folder(*arguments)
    assert f"begun with {threads} threads and going on with {threads + 1}" in caplog.text


# ----------------------------------------------------------------------------------------------------------------------
# Left-over variables of torchrun and others

FULL = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RUN_ID": "none",
}


@pytest.mark.parametrize(
    "left",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "", "RANK": ""},
        {"WORLD_SIZE": "two", "RANK": "first"},
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node", "MASTER_PORT": "29500", "LOCAL_RANK": "1"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "OMPI_COMM_WORLD_SIZE": "4", "WORLD_SIZE": "4"},
        {**FULL, "MASTER_ADDR": " "},
        {**FULL, "WORLD_SIZE": "1"},
    ],
    ids=["one", "empty", "words", "all but torchrun's own", "slurm and mpi", "blank", "torchrun with one"],
)
def test_less_than_torchruns_full_set_is_left_over(left: dict[str, str], monkeypatch: Any) -> None:
    for name in FULL:
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert distributed.is_main_process()
    with distributed.joined() as found:
        assert (found.rank, found.count) == (0, 1)


def test_torchruns_set_with_words_in_it_is_refused(monkeypatch: Any) -> None:
    for name, value in {**FULL, "RANK": "first"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessError, match="RANK is 'first', which is no number"):
        distributed.is_main_process()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_waiting_for_others_says_for_whom_and_ends_at_once(
    sent: int, model_folder: Path, tokens: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "lorap", "compress", str(model_folder), str(tmp_path / "out")]
    command += ["--calibration", str(tokens), "--eval-text", "none"]
    env = os.environ | FULL | {"RANK": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # A shell starts what runs behind it deaf to SIGINT.
    deaf = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        signal.signal(signal.SIGINT, deaf)
        assert process.stderr is not None
        line = ""
        while "waits for" not in line:
            line = process.stderr.readline()
            assert line or process.poll() is None
        assert "process 2 of 2 waits for the others at 127.0.0.1:1, for 10 minutes at most" in line
        begun = time.monotonic()
        process.send_signal(sent)
        rest = process.stderr.readline()
        while process.poll() is None:  # `timeout` sends two, and people are impatient
            process.terminate()
            time.sleep(0.05)
        rest += process.stderr.read()
        assert process.wait(timeout=60) == 128 + sent, rest
    assert rest.splitlines() == ["lorap: interrupted; nothing was written"]
    assert time.monotonic() - begun < 45  # of which Python's own end takes most, on a busy machine
