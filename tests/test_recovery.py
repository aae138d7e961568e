"""Tuning after compression: the same checkpoint with other numbers.

Proved here: what is written computes what the adapters computed; shapes, ranks, dtypes, config and parameters stay, in every
storage; the source stays; a killed run ends at the weights of one that was not; other settings are refused; tuned and untuned
are told apart.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorap
from lorap.checkpoint.folders import WEIGHTS, read_tensors
from lorap.checkpoint.load import find_model
from lorap.errors import ArchitectureError, CalibrationError, CheckpointError, ConfigError
from lorap.outputs import work_path
from lorap.recovery import recover as recovery_module
from lorap.recovery import trainer
from lorap.recovery.config import TuningConfig
from lorap.recovery.files import RECOVERY, SETTINGS, merge_into_copy
from lorap.recovery.recover import Recovery, recover, target_names
from lorap.recovery.report import RecoveryReport, dense_evaluation, tuned_card
from lorap.reports.model_card import CARD
from lorap.reports.records import Evaluation, TunedEvaluation, Tuning
from lorap.reports.run import RECOVERY_REPORT, REPORT, CompressionReport

TUNING = {"steps": 6, "batch_size": 3, "seq_len": 32, "rank": 5, "learning_rate": 3e-3, "precision": "float32"}
# What a checkpoint can look like: family, options of the compression.
CHECKPOINTS = {
    "factors": ("llama-gqa", {}),
    "pivoted-with-biases": ("llama-biases", {"storage": "pivoted"}),
    "added-biases": ("mistral", {"recipe": "flap"}),
    "low-rank-ffn": ("llama-mha", {"recipe": "svd-llm"}),
    "free-widths": ("qwen3", {"recipe": "best"}),
}


@pytest.fixture
def compressed(make_model, compress_small, tokenizer, tmp_path):
    """``compressed(kind)``: a folder of that kind in CHECKPOINTS."""

    def make(kind: str = "factors", dtype: torch.dtype = torch.float32, **save_options: Any) -> Path:
        family, options = CHECKPOINTS[kind]
        model, report = compress_small(make_model(family).to(dtype), **options)
        return lorap.save(model, tmp_path / kind, report=report, tokenizer=tokenizer, **save_options)

    return make


def settings(tokens: torch.Tensor, modules: str = "all", teacher: Any = None, **tuning: Any) -> Recovery:
    return Recovery(text=tokens, modules=modules, teacher=teacher, tuning=TuningConfig(**(TUNING | tuning)))


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def quiet_recover(folder: Path, out: Path, *arguments: Any, **options: Any) -> RecoveryReport:
    return recover(folder, out, *arguments, **({"device": "cpu", "progress": False} | options))


# ----------------------------------------------------------------------------------------------------------------------
# What is written


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_the_stored_model_is_the_tuned_one_in_the_old_shapes(kind, compressed, tokens, tmp_path, monkeypatch):
    folder, out, seen = compressed(kind), tmp_path / "new", {}
    before = contents(folder)

    def keep_logits(tuned, *arguments, **options):
        done = train(tuned, *arguments, **options)
        seen["logits"] = tuned(tokens).logits.detach()
        return done

    train = trainer.train
    monkeypatch.setattr(trainer, "train", keep_logits)
    report = quiet_recover(folder, out, settings(tokens))
    assert contents(folder) == before
    old, new = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, out))
    torch.testing.assert_close(new(tokens).logits, seen["logits"], rtol=1e-3, atol=1e-3)
    assert (new(tokens).logits - old(tokens).logits).abs().max() > 0.1
    assert read_tensors(out) == read_tensors(folder)  # names, shapes and dtypes
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert report.params == json.loads((folder / "lorap_report.json").read_text())["params_saved"]
    stored, origin = load_file(out / WEIGHTS), load_file(folder / WEIGHTS)
    changed = {name.removesuffix(".weight") for name in stored if not torch.equal(stored[name], origin[name])}
    assert changed == set(target_names(old))


def test_kinds_are_what_they_are_meant_to_be(compressed):
    stored = {kind: read_tensors(compressed(kind)) for kind in CHECKPOINTS}
    first = "model.layers.0."
    assert f"{first}self_attn.q_proj.pivot_rows" in stored["pivoted-with-biases"]
    assert f"{first}self_attn.q_proj.output_bias" in stored["pivoted-with-biases"]
    assert f"{first}mlp.down_proj.bias" in stored["added-biases"]
    assert f"{first}mlp.down_proj.left.weight" in stored["low-rank-ffn"]
    assert stored["factors"][f"{first}self_attn.q_proj.weight"].is_guard


def test_only_the_modules_asked_for_are_tuned(compressed, tokens, tmp_path):
    folder = compressed()
    quiet_recover(folder, tmp_path / "new", settings(tokens, modules="ffn", steps=2))
    old, new = load_file(folder / WEIGHTS), load_file(tmp_path / "new" / WEIGHTS)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert len(changed) == 6
    assert all(".mlp." in name for name in changed)


def test_a_sharded_bfloat16_checkpoint_stays_one(compressed, tokens, tmp_path):
    folder = compressed(dtype=torch.bfloat16, max_shard_size="40KB")
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert len(shards) > 1
    quiet_recover(folder, tmp_path / "new", settings(tokens))
    assert {path.name for path in (tmp_path / "new").glob("*.safetensors")} == shards
    assert read_tensors(tmp_path / "new") == read_tensors(folder)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert model.dtype == torch.bfloat16


def test_bfloat16_matmuls_leave_a_float32_checkpoint_exact_where_nothing_was_learned(compressed, tokens, tmp_path):
    folder = compressed("pivoted-with-biases")
    tiny = settings(tokens, precision="bfloat16", learning_rate=1e-12, steps=1)
    report = quiet_recover(folder, tmp_path / "new", tiny, evaluation=[tokens])
    old, new = load_file(folder / WEIGHTS), load_file(tmp_path / "new" / WEIGHTS)
    for name in old:
        torch.testing.assert_close(new[name], old[name], rtol=0, atol=1e-9)
    entry = report.evaluations[0]
    assert entry["after"]["nats"] == pytest.approx(entry["before"]["nats"], abs=1e-6)


def test_reports_of_tuned_and_untuned_are_kept_apart(compressed, tokens, tmp_path, model_folder):
    folder, out = compressed(), tmp_path / "new"
    report = quiet_recover(folder, out, settings(tokens, teacher=model_folder, steps=30), evaluation=[tokens])
    plain = json.loads((folder / "lorap_report.json").read_text())
    tuned = json.loads((out / "lorap_report.json").read_text())
    (record,) = tuned.pop("tunings")
    assert tuned == plain
    assert record == {"model": folder.name, "summary": report.summary(), "evaluations": report.evaluations}
    written = json.loads((out / RECOVERY_REPORT).read_text())
    assert written == json.loads(json.dumps(report.to_dict()))
    assert (written["steps"], written["tokens"]) == (30, 30 * 3 * 32)
    assert written["settings"]["teacher"] == model_folder.name
    assert written["text"]["windows"] == 90
    (entry,) = written["evaluations"]
    dense, before, after = (entry[name]["nats"] for name in ("dense", "before", "after"))
    assert after < before
    assert entry["recovered"] == pytest.approx((before - after) / (before - dense))
    card = (out / "README.md").read_text()
    page = (out / "report.html").read_text()
    for text in (card, page):
        assert "othing was trained" not in text
        assert report.summary() in text
    assert "Nothing was trained." in (folder / "README.md").read_text()
    assert f"It was made from {folder.name}." in page
    assert f"{after:.4f}" in page
    assert page.index("Tuned after compression") < page.index("Quality before tuning")
    told = [json.loads(run("info", where, "--json").stdout) for where in (folder, out)]
    assert [about.pop("tuned") for about in told] == [False, True]
    assert {**told[0], "model": ""} == {**told[1], "model": ""}
    (out / "report.html").unlink()
    assert run("report", out).exit_code == 0
    assert (out / "report.html").read_text() == page
    assert card.index("## Tuned after compression") < card.index("## Quality before tuning")
    for fact in ("30 steps", "2,880 tokens", "adapters of rank 5", "learning rate 0.003", f"{after:.4f}"):
        assert fact in card


def test_files_that_another_program_wrote_are_tuned_too(compressed, tokens, tmp_path):
    """Their tensors lie elsewhere in the file; that is no other checkpoint."""
    folder = compressed()
    before, data = read_tensors(folder), (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    padded = data[8 : 8 + size] + b" " * 1024
    (folder / WEIGHTS).write_bytes(len(padded).to_bytes(8, "little") + padded + data[8 + size :])
    assert read_tensors(folder) != before
    quiet_recover(folder, tmp_path / "new", settings(tokens, steps=1))
    assert {name: info.shape for name, info in read_tensors(tmp_path / "new").items()} == {
        name: info.shape for name, info in before.items()
    }


def test_what_is_measured_is_what_is_stored(compressed, tokens, tmp_path, monkeypatch):
    """By a model read anew, when that which was trained has gone."""
    folder, seen = compressed(dtype=torch.bfloat16), []

    def train_and_see(tuned, *arguments, **options):
        seen.append(weakref.ref(tuned))
        return train(tuned, *arguments, **options)

    def merge(*arguments):
        assert seen[0]() is None
        merge_into_copy(*arguments)

    train = trainer.train
    monkeypatch.setattr(trainer, "train", train_and_see)
    monkeypatch.setattr(recovery_module, "merge_into_copy", merge)
    report = quiet_recover(folder, tmp_path / "new", settings(tokens), evaluation=[tokens])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    logits = model(tokens).logits[:, :-1].detach()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert report.evaluations[0]["after"]["nats"] == pytest.approx(float(expected), rel=1e-5)


def test_the_dense_loss_comes_from_the_compression_where_the_text_is_the_same():
    def on(text, nats, tokens=64):
        return Evaluation(text, nats, 1.0, tokens, 32, 0.1)

    compression = CompressionReport("m", lorap.CompressionConfig(), {})
    compression.add_evaluation(on("wiki", 3.0), on("wiki", 5.0))
    compression.add_evaluation(None, on("novel", 5.0))
    tuned = TunedEvaluation("wiki", before=on("wiki", 5.0), after=on("wiki", 4.0), dense=on("wiki", 3.1))
    compression.tunings = [Tuning("m", "", [tuned])]
    assert dense_evaluation(compression, on("wiki", 5.01)) == on("wiki", 3.0)
    assert dense_evaluation(compression, on("wiki", 4.01)) == on("wiki", 3.1)
    for other in (on("wiki", 5.1), on("news", 5.0), on("wiki", 5.0, tokens=96), on("novel", 5.0)):
        assert dense_evaluation(compression, other) is None
    assert dense_evaluation(None, on("wiki", 5.0)) is None


@pytest.mark.parametrize("report", [b"{", b'{"evaluations": [1]}', b'{"tunings": null}', b"\xff\xfe"])
def test_files_for_people_that_are_damaged_do_not_cost_the_training(report, compressed, tokens, tmp_path):
    folder, new = compressed(), tmp_path / "new"
    (folder / REPORT).write_bytes(report)
    (folder / CARD).write_bytes(b"# caf\xe9 de l'int\xe9rieur\n")
    found = quiet_recover(folder, new, settings(tokens, steps=1), evaluation=[tokens])
    (entry,) = found.evaluations
    assert entry["dense"] is None
    assert entry["after"]["tokens"] == tokens.numel()
    assert not (new / REPORT).exists()
    card = (new / CARD).read_text("utf-8")
    assert "# caf\ufffd de" in card
    assert "## Tuned after compression" in card


def test_merged_weights_that_overflow_are_refused(compressed, tmp_path):
    folder, name = compressed(dtype=torch.float16), "model.layers.1.mlp.up_proj"
    rows, columns = read_tensors(folder)[f"{name}.weight"].shape
    prefix = f"base_model.model.{name}.lora"
    a, b = torch.zeros(1, columns), torch.full((rows, 1), 300.0)
    a[0, 5] = 300.0
    trained = {f"{prefix}_A.default.weight": a, f"{prefix}_B.default.weight": b}
    (tmp_path / "stage").mkdir()
    with pytest.raises(
        CheckpointError, match=rf"made {rows} values of {name}\.weight NaN, .*float16; .* --learning-rate"
    ):
        merge_into_copy(trained, [name], folder, tmp_path / "stage")


def test_a_run_without_a_teacher_says_what_it_recovered(model_folder, small_text, tmp_path):
    small = [
        "--num-calibration-samples",
        8,
        "--calibration-seq-len",
        128,
        "--calibration",
        small_text,
        "--device",
        "cpu",
    ]
    options = ["--eval-text", small_text, "--quiet", "--json"]
    made = run("compress", model_folder, tmp_path / "small", "--recipe", "lorap", "--sparsity", 0.5, *small, *options)
    told = json.loads(made.stdout)["evaluations"][0]
    short = ["--text", "default/news", "--steps", 2, "--device", "cpu"]
    result = run("recover", tmp_path / "small", tmp_path / "new", *short, *options)
    (entry,) = json.loads(result.stdout)["evaluations"]
    assert entry["dense"]["nats"] == told["before"]["nats"]
    assert entry["before"]["nats"] == pytest.approx(told["after"]["nats"], rel=1e-5)


@pytest.mark.parametrize("card", ["", "# Something of one's own\n"])
def test_a_card_of_another_kind_gains_the_section_too(card):
    text = {"name": "text", "windows": 1, "seq_len": 8, "tokens": 8, "sha256": ""}
    asked = {
        "teacher": None,
        "modules": "all",
        "rank": 4,
        "learning_rate": 0.1,
        "batch_size": 1,
        "seq_len": 8,
        "seed": 0,
    }
    report = RecoveryReport("small", {**asked, "precision": "float32"}, text, 10)
    report.add_training([3.0, 2.0], 60.0, tokens_per_step=8)
    new = tuned_card(card, report)
    assert card in new
    assert "Tuned after compression on text: 2 steps and 16 tokens in 1.0 minutes" in new


# ----------------------------------------------------------------------------------------------------------------------
# Interruptions


def test_a_killed_run_ends_at_the_weights_of_one_that_was_not(compressed, small_text, tmp_path):
    folder = compressed()
    options = ["--text", small_text, "--steps", 40, "--batch-size", 3, "--seq-len", 32, "--rank", 5]
    options += ["--eval-text", "none", "--device", "cpu", "--quiet"]
    whole = run("recover", folder, tmp_path / "whole", *options)
    assert whole.exit_code == 0, whole.output
    kill_while_tuning(["recover", folder, tmp_path / "killed", *options], work_path(tmp_path / "killed") / RECOVERY)
    assert not (tmp_path / "killed").exists()
    again = run("recover", folder, tmp_path / "killed", *options)
    assert again.exit_code == 0, again.output
    ends = [load_file(tmp_path / name / WEIGHTS) for name in ("whole", "killed")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def kill_while_tuning(arguments: list[Any], work: Path) -> None:
    """Run the command with a state after every step, slowly, and SIGKILL it between the first and the last."""
    slow = (
        "import time, torch, lorap.recovery.trainer as r\n"
        "real = r.train\n"
        "def train(*args, **options):\n"
        "    step = torch.optim.AdamW.step\n"
        "    torch.optim.AdamW.step = lambda self, *_: (time.sleep(0.2), step(self))[1]\n"
        "    return real(*args, **(options | {'save_seconds': 0}))\n"
        "r.train = train\n"
        "from lorap.cli import main\n"
        "main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, *map(str, arguments)], env=os.environ)
    state, deadline = work / "state.safetensors", time.monotonic() + 600
    while not state.exists():
        assert process.poll() is None, "it ended before there was a state"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 1 <= len(load_file(state)["losses"]) < 40


@pytest.mark.slow
def test_two_processes_come_to_the_weights_of_one(compressed, model_folder, tmp_path):
    """And speak with one voice. The first tokens of the second process's windows are not those of the first."""
    folder, tokens = compressed(), tmp_path / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(0, 500, (8, 31)))
    options = [
        "--text",
        tokens,
        "--steps",
        4,
        "--batch-size",
        2,
        "--seq-len",
        31,
        "--rank",
        3,
        "--teacher",
        model_folder,
    ]
    options += ["--eval-text", tokens, "--device", "cpu", "--precision", "float32", "--quiet"]
    alone = run("recover", folder, tmp_path / "1", *options)
    assert alone.exit_code == 0, alone.output
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lorap"]
    command += map(str, ["recover", folder, tmp_path / "2", *options])
    two = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr[-3000:]
    assert two.stdout.count("saved to") == 1
    before, one, other = (load_file(path / WEIGHTS) for path in (folder, tmp_path / "1", tmp_path / "2"))
    for name in before:
        off, moved = (other[name] - one[name]).abs().max(), (one[name] - before[name]).abs().max()
        assert off <= 0.01 * moved, name
    reports = [json.loads((tmp_path / name / RECOVERY_REPORT).read_text()) for name in "12"]
    assert reports[1]["losses"] == pytest.approx(reports[0]["losses"], rel=1e-5)
    assert reports[1]["tokens"] == reports[0]["tokens"] == 4 * 2 * 31


def test_other_settings_are_refused_until_restart(compressed, tokens, tmp_path, monkeypatch):
    folder, out = compressed(), tmp_path / "new"
    with monkeypatch.context() as patch:
        patch.setattr(recovery_module, "merge_into_copy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quiet_recover(folder, out, settings(tokens))
    assert sorted(path.name for path in (work_path(out) / RECOVERY).iterdir()) == [SETTINGS, "state.safetensors"]
    with pytest.raises(ConfigError, match=r"learning_rate was 0.003 and is 0.001.*--restart"):
        quiet_recover(folder, out, settings(tokens, learning_rate=1e-3))
    with pytest.raises(ConfigError, match="tokens was"):
        quiet_recover(folder, out, settings(tokens + 1))
    assert not out.exists()
    report = quiet_recover(folder, out, settings(tokens, learning_rate=1e-3), restart=True)
    assert report.settings["learning_rate"] == 1e-3
    assert not work_path(out).exists()


def test_another_model_under_the_same_name_is_not_gone_on_with(compressed, tokens, tmp_path, monkeypatch):
    folder, out = compressed(), tmp_path / "new"
    with monkeypatch.context() as patch:
        patch.setattr(recovery_module, "merge_into_copy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quiet_recover(folder, out, settings(tokens, steps=1))
    quiet_recover(folder, tmp_path / "other", settings(tokens, steps=1))
    with pytest.raises(ConfigError, match="model_weights was"):
        quiet_recover(tmp_path / "other", out, settings(tokens, steps=1))


def test_a_teacher_is_looked_up_once_and_known_by_its_weights(
    compressed, tokens, make_model, tmp_path, monkeypatch
) -> None:
    """Also where they are in a pickle. Another spelling of the dtype is the same run."""
    folder, out, teacher, looked_up = compressed(), tmp_path / "new", tmp_path / "teacher", []
    dense = make_model("llama-gqa")
    dense.config.save_pretrained(teacher)
    torch.save(dense.state_dict(), teacher / "pytorch_model.bin")
    wanted = settings(tokens, steps=1, teacher=teacher)

    def find(model: Any) -> Any:
        looked_up.append(Path(model).name)
        return find_model(model)

    with monkeypatch.context() as patch:
        patch.setattr(recovery_module, "find_model", find)
        patch.setattr(recovery_module, "merge_into_copy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        for spelling in ("fp32", "float32"):
            with pytest.raises(KeyboardInterrupt):
                quiet_recover(folder, out, replace(wanted, dtype=spelling))
    assert looked_up == ["factors", "teacher"] * 2
    dense.model.norm.weight.data[3] += 1
    torch.save(dense.state_dict(), teacher / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="teacher_weights was"):
        quiet_recover(folder, out, wanted)


def test_all_chat_templates_go_along(compressed, tokens, tmp_path) -> None:
    folder, out = compressed(), tmp_path / "new"
    for place in ("additional_chat_templates", "else"):
        (folder / place).mkdir()
        (folder / place / "tool_use.jinja").write_text("{{ messages }} tools", "utf-8")
    quiet_recover(folder, out, settings(tokens, steps=1))
    assert (out / "additional_chat_templates/tool_use.jinja").read_text("utf-8") == "{{ messages }} tools"
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["additional_chat_templates"]


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("variable", "device", "message"),
    [
        ("ACCELERATE_USE_FSDP", "cpu", "ACCELERATE_USE_FSDP asks for a model in parts.*start with torchrun"),
        ("UNRELATED", "cuda:1", "device is cuda:1, .* give CUDA_VISIBLE_DEVICES=1"),
    ],
)
def test_what_the_trainer_would_do_silently_is_refused(
    variable, device, message, compressed, tokens, tmp_path, monkeypatch
):
    monkeypatch.setenv(variable, "true")
    monkeypatch.setattr(recovery_module, "own_device", torch.device)
    with pytest.raises(ConfigError, match=message):
        quiet_recover(compressed(), tmp_path / "new", settings(tokens), device=device)


def test_without_peft_the_command_says_what_to_install(compressed, tmp_path, monkeypatch):
    folder = compressed()
    monkeypatch.setitem(sys.modules, "peft", None)
    result = run("recover", folder, tmp_path / "new")
    assert result.exit_code == 2
    assert "pip install 'lorap[recover]'" in result.stderr
    assert result.stderr.count("\n") == 1


def test_int8_weights_are_refused_before_the_work(compressed, tokens, tmp_path):
    lorap.quantize(AutoModelForCausalLM.from_pretrained(compressed()), "int8").save_pretrained(tmp_path / "int8")
    with pytest.raises(CheckpointError, match="the weights of int8 are int8, and adapters cannot be merged into them"):
        quiet_recover(tmp_path / "int8", tmp_path / "new", settings(tokens))


def test_mistakes_end_in_one_sentence_and_write_nothing(compressed, tokens, model_folder, make_model, tmp_path):
    folder, out = compressed(), tmp_path / "new"
    with pytest.raises(CheckpointError, match="overlaps the source"):
        quiet_recover(folder, folder / "inside", settings(tokens))
    with pytest.raises(CheckpointError, match="not empty"):
        quiet_recover(folder, model_folder, settings(tokens))
    with pytest.raises(CheckpointError, match="cannot fetch someone/model"):
        quiet_recover("someone/model", out, settings(tokens))
    with pytest.raises(
        CheckpointError, match=r"model is not compressed by lorap, .* compress it first .*, then tune OUT"
    ):
        quiet_recover(model_folder, out, settings(tokens))
    for seed in (-1, 2**63, 0.5):
        with pytest.raises(ConfigError, match=f"seed should be .* and is {seed}"):
            settings(tokens, seed=seed)
    with pytest.raises(ConfigError, match="modules is 'heads'"):
        settings(tokens, modules="heads")
    make_model("llama-gqa", vocab_size=501).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ConfigError, match="has 501 tokens and the model 500"):
        quiet_recover(folder, out, settings(tokens, teacher=tmp_path / "teacher"))
    dense = make_model("llama-gqa")
    dense.model.norm.weight.data[7] = torch.nan
    dense.save_pretrained(tmp_path / "nan")
    with pytest.raises(CheckpointError, match=r"norm\.weight contains 1 values that are NaN"):
        quiet_recover(folder, out, settings(tokens, teacher=tmp_path / "nan"))
    with pytest.raises(CalibrationError, match="only be drawn together with"):
        quiet_recover(folder, out, Recovery(text="self", tuning=TuningConfig(**TUNING)))
    with pytest.raises(ArchitectureError, match="'gpt2'"):
        target_names(SimpleNamespace(config=SimpleNamespace(model_type="gpt2")))
    assert not out.exists()
    assert not work_path(out).exists()


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_reports_what_it_did(compressed, small_text, model_folder, tmp_path):
    arguments = ["--text", f"{small_text}=2", "--text", "default/news", "--teacher", model_folder, "--steps", 20]
    arguments += [
        "--batch-size",
        3,
        "--seq-len",
        32,
        "--rank",
        5,
        "--eval-text",
        small_text,
        "--device",
        "cpu",
        "--quiet",
    ]
    result = run("recover", compressed(), tmp_path / "new", *arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [source["windows"] for source in found["text"]["sources"]] == [40, 20]
    assert found["steps"] == 20
    assert found["evaluations"][0]["dense"]["nats"] > 0
    assert "Tuned after compression on text.txt, default/news, from the predictions of model: 20 steps" in result.stderr
    assert "before and after" in result.stderr
