"""``evaluate`` is the mean next-token loss of a hand-written loop, whatever the batch size and the padding."""

import copy
import math
import statistics

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorap import CalibrationError, evaluate
from lorap.calibration import TokenWindows
from lorap.errors import ConfigError
from lorap.evaluation.perplexity import WindowLosses, compare_predictions, evaluate_windows, paired_difference

VOCAB = 61


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def windows(count: int, seq_len: int, mask: torch.Tensor | None = None) -> TokenWindows:
    ids = torch.randint(VOCAB, (count, seq_len), generator=torch.Generator().manual_seed(1))
    return TokenWindows(ids, "random", "", mask)


@torch.no_grad()
def loop_nats(model: LlamaForCausalLM, tokens: list[list[int]]) -> float:
    losses = []
    for window in tokens:
        log_p = model(input_ids=torch.tensor([window])).logits[0].double().log_softmax(-1)
        losses += [-float(log_p[i, window[i + 1]]) for i in range(len(window) - 1)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("count", "seq_len"), [(1, 2), (1, 63), (7, 2), (13, 17)])
def test_equals_a_loop_over_windows(model: LlamaForCausalLM, count: int, seq_len: int) -> None:
    text = windows(count, seq_len)
    result = evaluate(model, text)
    assert result.nats == pytest.approx(loop_nats(model, text.input_ids.tolist()), rel=1e-5)
    assert abs(result.nats - math.log(VOCAB)) > 0.01
    assert result.perplexity == math.exp(result.nats)
    assert (result.text, result.tokens, result.seq_len) == ("random", count * seq_len, seq_len)
    assert result.seconds > 0


@pytest.mark.parametrize("batch_tokens", [1, 17, 34, 100, 10_000])
def test_batch_size_does_not_matter(model: LlamaForCausalLM, batch_tokens: int) -> None:
    text = windows(13, 17)
    assert evaluate(model, text, batch_tokens=batch_tokens).nats == pytest.approx(evaluate(model, text).nats, rel=1e-6)


def test_padding_does_not_count(model: LlamaForCausalLM) -> None:
    lengths = [17, 9, 2, 1, 16]
    mask = (torch.arange(17) < torch.tensor(lengths)[:, None]).long()
    text = windows(5, 17, mask)
    expected = loop_nats(model, [row[:n].tolist() for row, n in zip(text.input_ids, lengths, strict=True)])
    result = evaluate(model, text)
    assert result.nats == pytest.approx(expected, rel=1e-5)
    assert result.tokens == sum(lengths)
    text.input_ids[mask == 0] = 3
    assert evaluate(model, text).nats == pytest.approx(expected, rel=1e-5)
    assert evaluate(model, TokenWindows(text.input_ids, "all", "")).nats != pytest.approx(expected, rel=1e-3)


def test_all_ones_mask_changes_nothing(model: LlamaForCausalLM) -> None:
    plain, masked = windows(5, 17), windows(5, 17, torch.ones(5, 17, dtype=torch.long))
    assert evaluate(model, masked).nats == pytest.approx(evaluate(model, plain).nats, rel=1e-6)
    assert evaluate(model, masked).tokens == 85


def test_windows_of_one_token_are_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(CalibrationError, match=r"windows of 1 token .* at least 2"):
        evaluate(model, windows(3, 1))


def test_overflow_is_refused(model: LlamaForCausalLM) -> None:
    weight = model.lm_head.weight.data
    kept = weight.clone()
    try:
        weight.fill_(float("nan"))
        with pytest.raises(CalibrationError, match=r"loss on random is nan.*float32"):
            evaluate(model, windows(3, 5))
    finally:
        weight.copy_(kept)


def test_no_gradients_are_kept(model: LlamaForCausalLM) -> None:
    evaluate(model, windows(3, 5))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_to_predict_is_refused(model: LlamaForCausalLM) -> None:
    mask = torch.zeros(3, 8, dtype=torch.long)
    mask[:, 0] = 1
    with pytest.raises(CalibrationError):
        evaluate(model, windows(3, 8, mask))


def test_left_padding_does_not_count(model: LlamaForCausalLM) -> None:
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[:, :3] = 0
    text = windows(3, 8, mask)
    assert evaluate(model, text).nats == pytest.approx(loop_nats(model, text.input_ids[:, 3:].tolist()), rel=1e-4)


def test_a_huge_finite_loss_raises_no_raw_error(model: LlamaForCausalLM) -> None:
    kept = model.lm_head.weight.data.clone()
    try:
        model.lm_head.weight.data.mul_(1e4)
        assert evaluate(model, windows(3, 8)).perplexity == math.inf
    except CalibrationError:
        pass  # refusing is as good
    finally:
        model.lm_head.weight.data.copy_(kept)


# ----------------------------------------------------------------------------------------------------------------------
# Two models on the same windows


def test_losses_by_window_are_those_of_each_window_alone(model: LlamaForCausalLM) -> None:
    mask = (torch.arange(17) < torch.tensor([17, 9, 2, 1, 16])[:, None]).long()
    text = windows(5, 17, mask)
    whole, by_window = evaluate_windows(model, text, batch_tokens=40)
    assert by_window.predicted.tolist() == [16, 8, 1, 0, 15]
    for row in (0, 1, 2, 4):
        alone = evaluate(model, text.rows(torch.tensor([row])))
        assert float(by_window.losses[row] / by_window.predicted[row]) == pytest.approx(alone.nats, rel=1e-6)
    assert by_window.losses[3] == 0
    assert whole.nats == pytest.approx(float(by_window.losses.sum()) / 40, rel=1e-9)


def losses(values: list[float], predicted: list[int], sha256: str = "a") -> WindowLosses:
    return WindowLosses(torch.tensor(values, dtype=torch.float64), torch.tensor(predicted), sha256)


def test_a_paired_difference_and_its_standard_error() -> None:
    theirs = [30.0, 41.0, 17.0, 99.0, 50.0]
    differences = [1.0, 3.0, -2.0, 4.0, 0.5]
    ours = [a + b for a, b in zip(theirs, differences, strict=True)]
    found = paired_difference(losses(ours, [10] * 5), losses(theirs, [10] * 5))
    assert found.nats == pytest.approx(statistics.fmean(differences) / 10)
    assert found.error == pytest.approx(statistics.stdev(differences) / math.sqrt(5) / 10)
    assert found.windows == 5
    # Windows that are equally bad for each of their tokens have no spread, however many tokens they hold.
    even = paired_difference(losses([3.0, 6.0, 1.5], [2, 4, 1]), losses([2.0, 4.0, 1.0], [2, 4, 1]))
    assert even.nats == pytest.approx(0.5)
    assert even.error == pytest.approx(0, abs=1e-12)
    assert math.isnan(paired_difference(losses([3.0], [2]), losses([2.0], [2])).error)


@pytest.mark.parametrize("other", [losses([1.0, 2.0], [3, 4], "b"), losses([1.0, 2.0], [3, 3]), losses([1.0], [3])])
def test_other_windows_are_not_compared(other: WindowLosses) -> None:
    with pytest.raises(ConfigError, match="did not read the same tokens"):
        paired_difference(losses([1.0, 2.0], [3, 4]), other)


@torch.no_grad()
def test_predictions_compared_by_hand(model: LlamaForCausalLM) -> None:
    """In float64, window by window, without what padding predicts or is predicted from."""
    torch.manual_seed(5)
    other = LlamaForCausalLM(model.config).eval()
    mask = torch.ones(5, 13, dtype=torch.int64)
    mask[2, 9:] = 0
    text = windows(5, 13, mask)
    divergences, same = [], []
    for ids, real in zip(text.input_ids, mask, strict=True):
        p, q = (one(ids[None, : real.sum()]).logits[0, :-1].double().log_softmax(-1) for one in (model, other))
        divergences += [float(one) for one in (p.exp() * (p - q)).sum(-1)]
        same += [bool(one) for one in p.argmax(-1) == q.argmax(-1)]
    for batch_tokens in (13, 40, 512):
        found = compare_predictions(other, model, text, batch_tokens=batch_tokens)
        assert found.divergence == pytest.approx(statistics.fmean(divergences), rel=1e-4)
        assert found.same_token == pytest.approx(statistics.fmean(same))
        assert found.predicted == len(same) == 4 * 12 + 8
    itself = compare_predictions(model, model, text)
    assert (itself.divergence, itself.same_token) == (0, 1)
    with pytest.raises(CalibrationError, match="use at least 2"):
        compare_predictions(model, model, windows(3, 1))
    with pytest.raises(CalibrationError, match="leaves nothing to predict"):
        compare_predictions(model, model, windows(2, 5, torch.zeros(2, 5)))
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[3] = torch.nan
    with pytest.raises(CalibrationError, match="are not finite"):
        compare_predictions(broken, model, text)
