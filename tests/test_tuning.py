"""The training loop: it learns, counts padding out, ends where it should, and goes on exactly where it was."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch.nn import functional as F

from lorap.calibration.windows import TokenWindows
from lorap.errors import CalibrationError, CheckpointError, ConfigError
from lorap.recovery import training
from lorap.recovery.recover import target_names
from lorap.recovery.training import TuningConfig, add_adapters, autocast_dtype, hold_weights, train

FAST = {"batch_size": 3, "seq_len": 32, "rank": 5, "precision": "float32", "learning_rate": 3e-3}


@pytest.fixture
def windows(tokens):
    """24 windows: 8 real ones, three times."""
    return TokenWindows(tokens.repeat(3, 1), "tokens", "")


@pytest.fixture
def make_tuned(make_model):
    def make(family="llama-gqa", **options):
        model = make_model(family)
        return add_adapters(model, target_names(model), rank=5, seed=0)

    return make


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


def test_training_reduces_the_loss_of_what_it_sees(make_tuned, tokens):
    tuned = make_tuned()
    windows = TokenWindows(tokens[:3], "tokens", "")
    frozen = {name: p.clone() for name, p in tuned.named_parameters() if not p.requires_grad}
    done = train(tuned, windows, TuningConfig(steps=20, **FAST))
    assert done.steps == 20
    assert done.losses[-1] < done.losses[0] - 0.3
    assert all(torch.equal(p, frozen[name]) for name, p in tuned.named_parameters() if name in frozen)


def test_the_first_loss_is_the_mean_over_predicted_tokens_that_are_real(make_tuned, tokens, monkeypatch):
    tuned = make_tuned()
    mask = torch.ones(8, 32, dtype=torch.bool)
    mask[1, 20:] = False
    logits = tuned(tokens[:3]).logits.double()
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:3, 1:], reduction="none").detach()
    counted = mask[:3, 1:]
    expected = float((each * counted).sum() / counted.sum())
    monkeypatch.setattr(training, "PIECE_TOKENS", 64)  # two windows, then one
    done = train(tuned, TokenWindows(tokens, "", "", attention_mask=mask), TuningConfig(steps=1, **FAST))
    assert done.losses[0] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - float(each.mean())) > 1e-3


def test_pieces_give_the_gradients_of_the_whole(make_tuned, windows, monkeypatch):
    results = []
    for piece_tokens in (32, 1024):
        monkeypatch.setattr(training, "PIECE_TOKENS", piece_tokens)
        tuned = make_tuned()
        train(tuned, windows, TuningConfig(steps=2, **(FAST | {"learning_rate": 1e-3})))
        results.append(trained(tuned))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def divergence(teacher, student, ids):
    """Mean over predictions of KL(teacher || student), written down literally."""
    p, q = (model(ids).logits[:, :-1].double().log_softmax(-1) for model in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_teacher_is_what_is_learned(make_model, make_tuned, tokens):
    teacher = make_model("llama-mha")
    tuned = make_tuned()
    expected = divergence(teacher, tuned, tokens[:3])
    done = train(tuned, TokenWindows(tokens[:3], "", ""), TuningConfig(steps=20, **FAST), teacher=teacher)
    assert done.losses[0] == pytest.approx(expected, rel=1e-4)
    assert done.losses[-1] < 0.9 * done.losses[0]


def test_going_on_from_a_state_ends_at_the_same_weights(make_tuned, windows, tmp_path, monkeypatch):
    config = TuningConfig(steps=7, **FAST)
    whole = make_tuned()
    expected = train(whole, windows, config)

    class Killed(Exception):
        pass

    def die_at_fifth(path, parameters, optimizer, done):
        if done.steps == 5:
            raise Killed
        write(path, parameters, optimizer, done)

    write = training.write_state
    state = tmp_path / "state.safetensors"
    monkeypatch.setattr(training, "write_state", die_at_fifth)
    with pytest.raises(Killed):
        train(make_tuned(), windows, config, state=state, save_seconds=0)
    monkeypatch.setattr(training, "write_state", write)
    again = make_tuned()
    done = train(again, windows, config, state=state)
    assert done.losses == expected.losses
    assert_same(trained(again), trained(whole))


def test_a_finished_state_is_only_read(make_tuned, windows, tmp_path):
    config = TuningConfig(steps=2, **FAST)
    first, state = make_tuned(), tmp_path / "state.safetensors"
    train(first, windows, config, state=state)
    again = make_tuned()
    assert train(again, windows, config, state=state).steps == 2
    assert_same(trained(again), trained(first))


def test_a_damaged_or_foreign_state_is_refused(make_tuned, make_model, windows, tmp_path):
    config, state = TuningConfig(steps=2, **FAST), tmp_path / "state.safetensors"
    train(make_tuned(), windows, config, state=state)
    raw = state.read_bytes()
    state.write_bytes(raw[:-7])
    with pytest.raises(CheckpointError, match="begin anew with --restart"):
        train(make_tuned(), windows, config, state=state)
    state.write_bytes(raw)
    model = make_model("llama-gqa")
    other = add_adapters(model, target_names(model), rank=6, seed=0)
    with pytest.raises(CheckpointError, match="no state of this training"):
        train(other, windows, config, state=state)


def test_minutes_end_the_training_and_the_learning_rate(make_tuned, windows, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    clock = iter(range(0, 1000, 15))  # a step takes 15 seconds
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(clock))
    done = train(make_tuned(), windows, TuningConfig(steps=1000, minutes=1.0, **FAST))
    assert done.steps == 4
    assert done.seconds == 60
    assert rates == pytest.approx(
        [3e-3 * warm * left for warm, left in [(1 / 8, 1), (2 / 8, 0.75), (3 / 8, 0.5), (4 / 8, 0.25)]]
    )


def test_the_learning_rate_rises_and_falls(make_tuned, windows, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    train(make_tuned(), windows, TuningConfig(steps=20, **(FAST | {"batch_size": 1})))
    expected = [3e-3 * min(1, (i + 1) / 2) * (1 - i / 20) for i in range(20)]
    assert rates == pytest.approx(expected)


def test_after_the_last_window_comes_the_first(make_tuned, tokens):
    results = []
    for ids in (tokens[:2], tokens[[0, 1, 0, 1, 0, 1]]):
        tuned = make_tuned()
        train(tuned, TokenWindows(ids, "", ""), TuningConfig(steps=2, **FAST))
        results.append(trained(tuned))
    assert_same(*results)


def test_a_loss_that_is_not_finite_ends_it(make_tuned, windows):
    tuned = make_tuned()
    with torch.no_grad():
        tuned.get_input_embeddings().weight[:] = math.nan
    with pytest.raises(CalibrationError, match="nan at step 1"):
        train(tuned, windows, TuningConfig(steps=2, **FAST))


def test_bfloat16_computes_in_bfloat16(make_tuned, windows):
    seen = []
    tuned = make_tuned()
    tuned.get_submodule("base_model.model.model.layers.0.mlp.down_proj.base_layer").register_forward_hook(
        lambda module, args, output: seen.append(output.dtype)
    )
    done = train(tuned, windows, TuningConfig(steps=2, **(FAST | {"precision": "bfloat16"})))
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in trained(tuned).values())
    assert math.isfinite(done.losses[-1])


def test_weights_held_in_bfloat16_give_the_same_results(make_model, windows):
    config, results = TuningConfig(steps=3, **(FAST | {"precision": "bfloat16"})), []
    for held in (False, True):
        model = make_model("llama-biases")
        names = target_names(model)
        tuned = add_adapters(model, names, rank=5, seed=0)
        if held:
            hold_weights(tuned.get_base_model(), names, torch.bfloat16)
            assert model.get_submodule(names[3]).base_layer.weight.dtype == torch.bfloat16
        train(tuned, windows, config)
        results.append(trained(tuned))
    assert_same(*results)


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


def test_without_peft_there_is_one_sentence(make_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'lorap\[recover\]'"):
        add_adapters(make_model("llama-gqa"), ["lm_head"], rank=2, seed=0)
