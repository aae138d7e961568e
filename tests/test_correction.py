"""Steps against the gradient: which way, how far, from which windows, and that they help on text that was not seen."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from corrections import corrected
from torch import Tensor, nn
from whole_model import divergence_of

from lorap.algorithms.step_schedule import RATE, schedule
from lorap.architectures import ARCHITECTURES
from lorap.calibration import TokenWindows
from lorap.calibration.context import DecoderContext
from lorap.calibration.offload import IN_MEMORY
from lorap.calibration.stream import CalibrationStream
from lorap.compression.correction import Correction, best_fraction, step_windows
from lorap.compression.distillation import _ExactWeights, _Gradients, agree, divergences
from lorap.distributed import Processes
from lorap.errors import CalibrationError
from lorap.reports.run import CorrectionReport, correction_lines


def another(model: Any) -> Any:
    """A model with the same embedding, norms and head, that predicts something else."""
    other = copy.deepcopy(model)
    for module in linears(other).values():
        module.weight.data += 0.3 * module.weight.data.std() * torch.randn_like(module.weight.data)
    return other


def linears(model: Any) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{name}"
    }


def signs_by_autograd(
    model: Any, dense: Any, ids: Tensor, folds: Tensor, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """1 and -1 where both folds agree, 0 elsewhere, from autograd on the weights of the whole model."""
    weights = {name: module.weight for name, module in linears(model).items()}
    found = []
    for fold in folds.unique():
        rows = folds == fold
        for weight in weights.values():
            weight.requires_grad_(True)
        loss = divergence_of(model, dense, ids[rows], None if mask is None else mask[rows])
        found.append([gradient.sign() for gradient in torch.autograd.grad(loss, list(weights.values()))])
        for weight in weights.values():
            weight.requires_grad_(False)
    agreed = [torch.where(one == two, one, 0.0) for one, two in zip(found[0], found[-1], strict=True)]
    return dict(zip(weights, agreed, strict=True))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("two_folds", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "llama-biases"])
def test_a_step_goes_against_the_gradient(
    make_model: Callable[..., Any],
    compress_small: Callable[..., Any],
    tokens: Tensor,
    family: str,
    compressed: bool,
    two_folds: bool,
    padded: bool,
) -> None:
    model = make_model(family)
    dense = another(model).double()
    if compressed:
        model, _ = compress_small(model, storage="pivoted")
    model = model.double()
    folds = torch.arange(len(tokens)) % 3 == 1 if two_folds else torch.zeros(len(tokens), dtype=torch.bool)
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, 20:] = mask[2, 5:] = 0
    before = {name: module.weight.data.clone() for name, module in linears(model).items()}
    expected = signs_by_autograd(model, dense, tokens, folds, mask if padded else None)
    corrected(model, dense, tokens, folds, mask=mask if padded else None)
    for name, module in linears(model).items():
        size = RATE * before[name].square().mean().sqrt() / before[name].shape[1] ** 0.5
        moved = (before[name] - module.weight.data) / size
        # Gradients next to 0 may have either sign in float32.
        assert float((moved - expected[name]).abs().gt(1e-3).double().mean()) < 2e-3, name
        assert two_folds or float(moved.abs().mean()) > 0.5


def test_only_what_is_asked_for_moves(make_model: Callable[..., Any], tokens: Tensor) -> None:
    model = make_model("llama-gqa")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    corrected(model, another(model), tokens, torch.zeros(8, dtype=torch.bool), roles=("q_proj", "down_proj"))
    for name, tensor in model.state_dict().items():
        asked = ("q_proj" in name or "down_proj" in name) and name.endswith("weight")
        assert torch.equal(tensor, before[name]) != asked, name


@pytest.mark.usefixtures("short_steps")
def test_later_steps_are_smaller(make_model: Callable[..., Any], tokens: Tensor) -> None:
    model = make_model("llama-gqa")
    module = next(iter(linears(model).values()))
    size = float(RATE * module.weight.data.square().mean().sqrt() / module.in_features**0.5)
    largest, previous = [], module.weight.data.clone()

    def keep(step: int, index: int, layer: Any) -> None:
        nonlocal previous
        if index == 0:
            largest.append(float((module.weight.data - previous).abs().max()) / size)
            previous = module.weight.data.clone()

    corrected(model, another(model), tokens, torch.arange(8) >= 4, steps=4, keep=keep)
    # Eight steps begin at the full size; four as the last four of eight.
    assert largest == pytest.approx([4 / 8, 3 / 8, 2 / 8, 1 / 8], rel=0.01)


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_follow_exact_weights(make_model: Callable[..., Any], tokens: Tensor, dtype: torch.dtype) -> None:
    model = make_model("llama-gqa").to(dtype)
    before = {name: module.weight.data.clone() for name, module in linears(model).items()}
    corrected(model, another(model), tokens, torch.zeros(8, dtype=torch.bool), steps=4)
    moved = [float((module.weight.data != before[name]).float().mean()) for name, module in linears(model).items()]
    assert min(moved) > 0.3
    assert all(module.weight.dtype == dtype for module in linears(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_steps_too_small_for_the_dtype_add_up(dtype: torch.dtype) -> None:
    """Each is a 10,000th of the weight: rounded one by one, all of them would be lost in 16 bits."""
    linear = nn.Linear(4, 3, bias=False).to(dtype)
    linear.weight.data.fill_(1.0)
    exact = _ExactWeights(IN_MEMORY)
    for _ in range(100):
        exact.move(0, "up", linear, linear, torch.ones(3, 4), rate=2e-4)
    expected = torch.full((3, 4), (1 - 1e-4) ** 100, dtype=torch.float64)
    torch.testing.assert_close(linear.weight.data, expected.to(dtype), rtol=2e-6 if dtype.itemsize > 2 else 0, atol=0)


def test_gradients_that_are_not_finite_are_told(make_model: Callable[..., Any], tokens: Tensor) -> None:
    model = make_model("llama-gqa")
    model.model.norm.weight.data.fill_(1e38)
    with pytest.raises(
        CalibrationError,
        match=r"the gradients at self_attn\.q_proj of layer 1 are not finite in torch\.float32.*--correction-steps 0",
    ):
        corrected(model, model, tokens, torch.zeros(8, dtype=torch.bool))
    gradients = _Gradients(1)
    gradients.add("up", torch.full((1, 2, 3), torch.nan), torch.ones(1, 2, 4), None, 0)
    assert gradients.agreed_signs("up") is None


@pytest.mark.parametrize(
    ("count", "seq_len", "asked", "sizes", "first"),
    [
        (128, 128, 8, [12, 13], 1),  # four fifths of the windows are enough
        (96, 128, 8, [12], 1),
        (95, 128, 8, [13, 14], 7 / 8),
        (128, 128, 16, [12, 13], 1),
        (63, 100, 4, [15, 16], 4 / 8),
        (63, 100, 2, [16], 2 / 8),
        (24, 128, 8, [12], 2 / 8),
        (7, 128, 8, [7], 1 / 8 * (7 / 12) ** 0.5),
        (1, 128, 8, [1], 1 / 8 * (1 / 12) ** 0.5),
        (6, 2048, 8, [2], 3 / 8),  # two windows, however long
    ],
)
def test_windows_of_each_step(count: int, seq_len: int, asked: int, sizes: list[int], first: float) -> None:
    ids = torch.arange(count)[:, None].expand(count, seq_len)
    mask = (torch.arange(seq_len) <= torch.arange(count)[:, None]).long()
    folds = torch.arange(count) % 3 == 1
    plan = schedule(count, seq_len, asked)
    assert plan.rates[0] == pytest.approx(RATE * first)
    assert [rate / plan.rates[0] for rate in plan.rates] == pytest.approx(
        [1 - at / plan.steps for at in range(plan.steps)]
    )
    assert schedule(plan.enough, seq_len, asked).steps == asked > schedule(plan.enough - 1, seq_len, asked).steps
    windows = TokenWindows(ids, "tokens", "", mask)
    found = list(step_windows(windows, folds, plan))
    assert len(found) == plan.steps
    assert sorted({len(part.input_ids) for part, _ in found}) == sizes
    used = [row for part, _ in found for row in part.input_ids[:, 0].tolist()]
    assert len(set(used)) == len(used)
    for fold in (False, True):
        count_of = [int((folds[part.input_ids[:, 0]] == fold).sum()) for part, _ in found]
        assert max(count_of) - min(count_of) <= 1
    for part, halves in found:
        rows = part.input_ids[:, 0]
        torch.testing.assert_close(part.attention_mask, mask[rows])
        assert (halves is None and len(set(folds[rows].tolist())) == 1) or torch.equal(halves, folds[rows])
    # From the whole range, not from its beginning.
    assert max(used) - min(used) >= 0.7 * (count - 1)


@pytest.mark.usefixtures("short_steps")
def test_steps_bring_the_predictions_closer(
    make_model: Callable[..., Any], compress_small: Callable[..., Any], tokens: Tensor
) -> None:
    dense = make_model("llama-gqa")
    model, _ = compress_small(copy.deepcopy(dense), sparsity=0.5)
    unseen = torch.randint(3, 500, (8, 32), generator=torch.Generator().manual_seed(1))
    before = [divergence_of(model, dense, ids).item() for ids in (tokens, unseen)]
    corrected(model, dense, tokens, torch.arange(8) >= 4, steps=4)
    after = [divergence_of(model, dense, ids).item() for ids in (tokens, unseen)]
    assert after[0] < 0.97 * before[0]
    assert after[1] < before[1]


def test_a_model_that_predicts_the_same_stays(make_model: Callable[..., Any], tokens: Tensor) -> None:
    """The dense model has nothing to learn from itself, whatever the text."""
    model = make_model("llama-gqa")
    before = {name: module.weight.data.clone() for name, module in linears(model).items()}
    corrected(model, copy.deepcopy(model), tokens, torch.arange(8) >= 4)
    assert all(torch.equal(module.weight.data, before[name]) for name, module in linears(model).items())


def test_nothing_to_correct_at_sparsity_0(make_model: Callable[..., Any], compress_small: Callable[..., Any]) -> None:
    model = make_model("llama-gqa")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model, report = compress_small(model, sparsity=0.0, correction_steps=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "correct" not in report.seconds


@pytest.mark.parametrize("padded", [False, True])
def test_the_divergence_is_that_of_the_whole_model(
    make_model: Callable[..., Any], tokens: Tensor, padded: bool
) -> None:
    """Of each fold by itself, over real tokens, whoever of three processes has which batch."""
    model = make_model("llama-gqa")
    dense, folds, mask = another(model), torch.arange(len(tokens)) % 3 == 1, torch.ones_like(tokens)
    if padded:
        mask[1, 20:] = mask[2, 5:] = 0
    expected = [
        divergence_of(model, dense, tokens[rows], mask[rows]).item() / int(mask[rows].sum()) for rows in (~folds, folds)
    ]
    found = [_divergences(model, dense, tokens, folds, mask if padded else None, count) for count in (1, 3)]
    assert found[0] == pytest.approx(expected, rel=1e-4)
    assert found[1] == found[0]


def _divergences(
    model: Any, dense: Any, tokens: Tensor, folds: Tensor, mask: Tensor | None, count: int
) -> tuple[float, ...]:
    """As the first of ``count`` processes finds them, two windows to a batch; the others' parts are made beforehand."""
    windows, gathered = TokenWindows(tokens, "tokens", "", mask), []

    class Shared(Processes):
        def all_gather(self, value: Any) -> list[Any]:
            gathered.append(value)
            return gathered if self.rank == 0 else [value]

    for rank in reversed(range(count)):
        streams = []
        for each in (dense, model):
            context = DecoderContext(
                each,
                ARCHITECTURES["llama"],
                tuple(each.model.layers),
                torch.device("cpu"),
                processes=Shared(rank, count),
            )
            streams.append(CalibrationStream.from_windows(context, windows, fold_of=folds, batch_tokens=64))
            for index, layer in enumerate(context.layers):
                streams[-1].advance(index, layer)
        found = divergences(context, *reversed(streams))
    return found


def test_folds_have_to_agree() -> None:
    assert agree((2.0, 1.0), (1.9, 0.9))
    for after in ((1.9, 1.0), (1.9, 1.1), (2.1, 0.5), (1.9, math.nan), (math.inf, 0.5)):
        assert not agree((2.0, 1.0), after)
    assert not agree((math.nan,), (1.0,))
    assert agree((2.0, 1.0), (1.98, 0.99), 0.005)
    assert not agree((2.0, 1.0), (1.98, 0.999), 0.005)
    assert not agree((0.0,), (0.0,))


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_that_hurt_unseen_windows_are_undone(
    make_model: Callable[..., Any],
    compress_small: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
) -> None:
    """To the bit; and the same steps of a sensible size stay."""
    dense = make_model("llama-gqa").to(getattr(torch, dtype))
    options = {"calibration": torch.randint(3, 500, (12, 32), generator=torch.Generator().manual_seed(0))}
    taken, report = compress_small(copy.deepcopy(dense), correction_steps=3, **options)
    assert (report.correction.taken, report.correction.tried, report.correction.asked) == (3, 3, 3)
    assert report.correction.unseen_tokens == 64
    assert len(report.correction.before) == 2
    assert agree(report.correction.before, report.correction.after)
    monkeypatch.setattr("lorap.compression.correction.distill", lambda *_, **__: None)
    plain, _ = compress_small(copy.deepcopy(dense), correction_steps=3, **options)
    assert not same(taken, plain)
    monkeypatch.undo()
    monkeypatch.setattr("lorap.algorithms.step_schedule.STEP_TOKENS", 64)
    monkeypatch.setattr("lorap.algorithms.step_schedule.RATE", 30.0)
    undone, report = compress_small(copy.deepcopy(dense), correction_steps=3, **options)
    assert (report.correction.taken, report.correction.tried) == (0, 3)
    assert not agree(report.correction.before, report.correction.after)
    assert same(undone, plain)


def test_the_best_fraction_of_the_way() -> None:
    before = (2.0, 1.0)
    after = {1.0: (2.1, 0.2), 0.75: (1.875, 0.875), 0.5: (1.75, 0.75), 0.25: (1.875, 0.625)}
    assert best_fraction(before, after, lambda _: 3.0) == 0.5  # as close as at 0.25, and farther
    assert (
        best_fraction(before, after, lambda fraction: 3.0 - fraction) == 0.75
    )  # never 1: the first fold is not closer there
    assert best_fraction(before, {1.0: (math.nan, 0.1), 0.5: (2.0, 0.5)}, lambda _: pytest.fail("asked")) == 0.0
    assert best_fraction((2.0,), {1.0: (1.9,), 0.5: (1.95,)}, lambda _: 3.0) == 1.0
    assert best_fraction((2.0,), {1.0: (1.995,), 0.5: (1.98,)}, lambda fraction: 3.0 - fraction) == 1.0
    assert (
        best_fraction((2.0,), {1.0: (1.995,), 0.5: (1.998,)}, lambda _: pytest.fail("asked")) == 0.0
    )  # within the noise


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_lie_where_the_judges_say(
    make_model: Callable[..., Any], compress_small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Between those before the steps and those behind them, and the report's divergence is of these weights."""
    dense = make_model("llama-gqa").to(getattr(torch, dtype))
    options = {"calibration": torch.randint(3, 500, (12, 32), generator=torch.Generator().manual_seed(0))}
    found, divergence = {}, {}
    for fraction in (0.0, 0.25, 1.0):
        monkeypatch.setattr("lorap.compression.correction.best_fraction", lambda *_, chosen=fraction: chosen)
        model, report = compress_small(copy.deepcopy(dense), correction_steps=3, **options)
        assert (report.correction.fraction, report.correction.taken) == (fraction, 3 if fraction else 0)
        found[fraction], divergence[fraction] = model.state_dict(), report.correction.after
    assert divergence[0.25] != divergence[1.0] == divergence[0.0]
    moved = 0
    for name, start in found[0.0].items():
        expected = torch.lerp(start.double(), found[1.0][name].double(), 0.25) if start.is_floating_point() else start
        tolerance = 1e-6 if dtype == "float32" else 8e-3
        torch.testing.assert_close(found[0.25][name].to(expected.dtype), expected, rtol=tolerance, atol=tolerance / 100)
        moved += not torch.equal(found[0.25][name], start)
    assert moved > 10


def test_windows_that_judge_are_not_calibrated_on(
    make_model: Callable[..., Any], compress_small: Callable[..., Any]
) -> None:
    """Of a stream there are others; of a matrix of windows some are set aside where it has five times as many; else no step."""
    dense = make_model("llama-gqa")
    stream = torch.randint(3, 500, (32 * 100,), generator=torch.Generator().manual_seed(0))
    options = {"calibration_seq_len": 32, "correction_steps": 8}
    _, report = compress_small(copy.deepcopy(dense), stream, num_calibration_samples=7, **options)
    assert (report.correction.tried, report.correction.windows, report.correction.enough) == (1, 7, 8 * 48)
    assert (report.calibration["windows"], report.correction.unseen_tokens) == (7, 48 * 32)
    matrix = stream[: 32 * 7].view(7, 32)
    found, report = compress_small(copy.deepcopy(dense), matrix, **options)
    assert report.correction == CorrectionReport(8, 0, 0, windows=7)
    assert "none is left" in correction_lines(report.correction)[0]
    assert same(found, compress_small(copy.deepcopy(dense), matrix, **(options | {"correction_steps": 0}))[0])


def test_judges_are_set_aside_of_many_windows(
    make_model: Callable[..., Any], compress_small: Callable[..., Any]
) -> None:
    matrix = torch.randint(3, 500, (240, 32), generator=torch.Generator().manual_seed(0))
    seen: dict[str, Tensor] = {}

    def note(*given: Any) -> Correction:
        seen.update(calibrated=given[2].input_ids, held=given[3].input_ids)
        return Correction(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorap.compression.pipeline.Correction", note)
        _, report = compress_small(make_model("llama-gqa"), matrix, correction_steps=1)
    rows = [{tuple(row) for row in ids.tolist()} for ids in seen.values()]
    assert (len(rows[0]), len(rows[1])) == (192, 48)
    assert rows[0] | rows[1] == {tuple(row) for row in matrix.tolist()}
    assert report.calibration["windows"] == report.correction.windows == 192
    assert report.calibration["sources"][0]["windows"] == 192


def same(one: Any, other: Any) -> bool:
    found, expected = one.state_dict(), other.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
