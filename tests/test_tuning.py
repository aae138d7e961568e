"""The training: the steps of a plain loop, an end where it should be, and a state that it goes on from exactly."""

from __future__ import annotations

import math
import os
import pickle
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from lorap.calibration.windows import TokenWindows
from lorap.distributed import Processes
from lorap.errors import CalibrationError, CheckpointError, ConfigError
from lorap.recovery import trainer
from lorap.recovery.config import TuningConfig
from lorap.recovery.recover import target_names
from lorap.recovery.state import write_state
from lorap.recovery.trainer import train
from lorap.recovery.training import add_adapters, autocast_dtype, hold_weights

FAST = {"batch_size": 3, "seq_len": 32, "rank": 5, "precision": "float32", "learning_rate": 3e-3}


@pytest.fixture
def windows(tokens):
    """24 windows: 8 real ones, three times."""
    return TokenWindows(tokens.repeat(3, 1), "tokens", "")


@pytest.fixture
def make_tuned(make_model):
    def make(family="llama-gqa", **options):
        model = make_model(family, **options)
        return add_adapters(model, target_names(model), rank=5, seed=0)

    return make


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state.safetensors"


def trained(tuned):
    return {name: p.detach().clone() for name, p in tuned.named_parameters() if p.requires_grad}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_adapters_change_nothing_at_first_and_only_they_are_trained(make_model, tokens):
    model = make_model("llama-gqa")
    before = model(tokens).logits
    tuned = add_adapters(model, ["model.layers.1.mlp.up_proj"], rank=5, seed=0)
    assert torch.equal(tuned(tokens).logits, before)
    shapes = {name: tuple(p.shape) for name, p in trained(tuned).items()}
    prefix = "base_model.model.model.layers.1.mlp.up_proj"
    assert shapes == {f"{prefix}.lora_A.default.weight": (5, 64), f"{prefix}.lora_B.default.weight": (100, 5)}


def plain_loop(model: Any, ids: torch.Tensor, mask: torch.Tensor, config: TuningConfig, teacher: Any) -> list[float]:
    """The training written down literally in float64; returns the losses."""
    model.double().eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(config.steps):
        rows = [(step * config.batch_size + i) % len(ids) for i in range(config.batch_size)]
        counted = mask[rows, 1:] & mask[rows, :-1]
        log_q = model(ids[rows], attention_mask=mask[rows]).logits[:, :-1].log_softmax(-1)
        if teacher is None:
            each = -log_q.gather(-1, ids[rows, 1:, None])[..., 0]
        else:
            log_p = teacher.double()(ids[rows], attention_mask=mask[rows]).logits[:, :-1].log_softmax(-1).detach()
            each = (log_p.exp() * (log_p - log_q)).sum(-1)
        loss = (each * counted).sum() / counted.sum()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            p.grad *= min(1.0, 1.0 / float(norm))
        warm_up = min(1.0, (step + 1) / max(1, min(8, config.steps // 10)))
        optimizer.param_groups[0]["lr"] = config.learning_rate * warm_up * (1 - step / config.steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("learns_from", ["text", "teacher"])
def test_steps_are_those_of_a_plain_loop_in_float64(learns_from, make_model, make_tuned, tokens, state, monkeypatch):
    """Which windows, padding left out, pieces of one window, clipping, the learning rate, the loss; and no dropout."""
    teacher = make_model("llama-mha") if learns_from == "teacher" else None
    config = TuningConfig(steps=20, **(FAST | {"seq_len": 31}))
    ids, mask = tokens[:, :31], torch.ones(8, 31, dtype=torch.bool)
    mask[1, 20:] = mask[4, :3] = False
    monkeypatch.setattr(trainer, "PIECE_TOKENS", 61)
    one, other = (make_tuned(attention_dropout=0.5) for _ in range(2))
    frozen = {name: p.clone() for name, p in one.named_parameters() if not p.requires_grad}
    before = trained(one)
    done = train(one, TokenWindows(ids, "", "", attention_mask=mask), config, state=state, teacher=teacher)
    assert all(torch.equal(p, frozen[name]) for name, p in one.named_parameters() if name in frozen)
    losses = plain_loop(other, ids, mask, config, teacher)
    assert done.losses == pytest.approx(losses, rel=1e-4)
    assert losses[16] < losses[0]  # on the same windows
    for name, expected in trained(other).items():
        moved, off = (expected - before[name]).norm(), (trained(one)[name] - expected).norm()
        assert off < 0.01 * moved, name


def test_going_on_from_a_state_ends_at_the_same_weights(make_tuned, windows, state, tmp_path, monkeypatch):
    config = TuningConfig(steps=7, **FAST)
    whole = make_tuned()
    expected = train(whole, windows, config, state=tmp_path / "whole.safetensors")

    class Killed(Exception):
        pass

    def die_at_fifth(path, parameters, optimizer, done):
        if done.steps == 5:
            raise Killed
        write_state(path, parameters, optimizer, done)

    monkeypatch.setattr(trainer, "write_state", die_at_fifth)
    with pytest.raises(Killed):
        train(make_tuned(), windows, config, state=state, save_seconds=0)
    assert len(load_file(state)["losses"]) == 4
    monkeypatch.setattr(trainer, "write_state", write_state)
    again = make_tuned()
    done = train(again, windows, config, state=state)
    assert done.losses == expected.losses
    assert_same(trained(again), trained(whole))
    finished = make_tuned()  # only read
    assert train(finished, windows, config, state=state).steps == 7
    assert_same(trained(finished), trained(whole))


class Planted:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_pickle_is_read(make_tuned, windows, state, tmp_path):
    config, proof = TuningConfig(steps=2, **FAST), tmp_path / "executed"
    planted = pickle.dumps(Planted(proof))
    pickle.loads(planted)
    proof.unlink()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        folder.mkdir(exist_ok=True)
        (folder / "trainer_state.json").write_text('{"global_step": 1}')
        for name in (
            "optimizer.pt",
            "scheduler.pt",
            "scaler.pt",
            "rng_state.pth",
            "training_args.bin",
            "adapter_model.bin",
        ):
            (folder / name).write_bytes(planted)
    assert train(make_tuned(), windows, config, state=state).steps == 2
    state.write_bytes(planted)
    with pytest.raises(CheckpointError, match="begin anew with --restart"):
        train(make_tuned(), windows, config, state=state)
    assert not proof.exists()


def test_a_damaged_or_foreign_state_is_refused(make_tuned, make_model, windows, state):
    config = TuningConfig(steps=2, **FAST)
    train(make_tuned(), windows, config, state=state)
    raw = state.read_bytes()
    state.write_bytes(raw[:-7])
    with pytest.raises(CheckpointError, match="begin anew with --restart"):
        train(make_tuned(), windows, config, state=state)
    model = make_model("llama-gqa")
    state.write_bytes(raw)
    other = add_adapters(model, target_names(model), rank=6, seed=0)
    with pytest.raises(CheckpointError, match="no state of this training"):
        train(other, windows, config, state=state)


def test_minutes_end_the_training_and_the_learning_rate(make_tuned, windows, state, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *_: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    clock = iter(range(0, 1000, 15))  # a step takes 15 seconds
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    done = train(make_tuned(), windows, TuningConfig(steps=1000, minutes=1.0, **FAST), state=state)
    assert done.steps == 4
    assert done.seconds == 60
    assert rates == pytest.approx(
        [3e-3 * warm * left for warm, left in [(1 / 8, 1), (2 / 8, 0.75), (3 / 8, 0.5), (4 / 8, 0.25)]]
    )


def test_a_loss_that_is_not_finite_ends_it_and_is_not_kept(make_tuned, windows, state):
    tuned = make_tuned()
    with torch.no_grad():
        tuned.get_input_embeddings().weight[:] = math.nan
    with pytest.raises(CalibrationError, match="nan at step 1; lower the learning rate"):
        train(tuned, windows, TuningConfig(steps=2, **FAST), state=state, save_seconds=0)
    assert not state.exists()


def test_nothing_around_the_training_is_changed_or_listened_to(
    make_tuned, windows, state, tmp_path, monkeypatch, capfd
):
    """Left-over variables of launchers and of accelerate; the generators of whoever calls; stdout; other files."""
    expected = make_tuned()
    train(expected, windows, TuningConfig(steps=2, **FAST), state=tmp_path / "other.safetensors")
    left = {"ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "3", "LOCAL_RANK": "1"}
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    drawn = [random.random(), numpy.random.random(), float(torch.rand(()))]
    tuned = make_tuned()
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    train(tuned, windows, TuningConfig(steps=2, **FAST), state=state)
    assert_same(trained(tuned), trained(expected))
    assert [random.random(), numpy.random.random(), float(torch.rand(()))] == drawn
    assert {name: os.environ[name] for name in left} == left
    assert capfd.readouterr().out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.safetensors", "state.safetensors"]


@pytest.mark.parametrize("seed", [2**32, 2**63 - 1])
def test_every_seed_of_a_config_trains(seed, make_tuned, windows, state):
    assert train(make_tuned(), windows, TuningConfig(steps=1, seed=seed, **FAST), state=state).steps == 1


def test_a_step_that_processes_cannot_share_is_refused(make_tuned, windows, state):
    with pytest.raises(ConfigError, match=r"batch_size is 3, and 2 processes .* choose a multiple of 2"):
        train(make_tuned(), windows, TuningConfig(steps=2, **FAST), state=state, processes=Processes(0, 2))


def test_weights_held_in_bfloat16_give_the_same_results(make_model, windows, state, tmp_path):
    config, results, seen = TuningConfig(steps=3, **(FAST | {"precision": "bfloat16"})), [], []
    teacher = make_model("llama-mha")
    teacher.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
    for held in (False, True):
        model = make_model("llama-biases")
        names = target_names(model)
        tuned = add_adapters(model, names, rank=5, seed=0)
        if held:
            hold_weights(model, names, torch.bfloat16)
            assert model.get_submodule(names[3]).base_layer.weight.dtype == torch.bfloat16
        layer = model.get_submodule("model.layers.0.mlp.down_proj.base_layer")
        layer.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
        train(tuned, windows, config, state=tmp_path / f"{held}.safetensors", teacher=teacher)
        results.append(trained(tuned))
    assert_same(*results)
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in results[0].values())


def test_auto_precision_is_what_the_processor_multiplies(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert autocast_dtype("auto", cpu) is None
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert autocast_dtype("auto", cpu) is torch.bfloat16
    assert autocast_dtype("float32", cpu) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"seq_len": 1},
        {"rank": 0},
        {"learning_rate": 0.0},
        {"minutes": 0.0},
        {"precision": "half"},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TuningConfig(**wrong)


@pytest.mark.parametrize("package", ["peft", "accelerate"])
def test_without_a_library_there_is_one_sentence(package, make_model, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"the package `{package}` .*pip install 'lorap\[recover\]'"):
        add_adapters(make_model("llama-gqa"), ["lm_head"], rank=2, seed=0)
