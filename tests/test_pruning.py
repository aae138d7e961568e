"""FFN channels leave in the published order: the band above the least important 1 %, the same every run.

How many stay is the plan's business (:func:`lorap.compression.allocation.pruned_positions`), which ones is that of ``keep_best``.
"""

import pytest
import torch
from torch import nn

from lorap.algorithms import pruning
from lorap.algorithms.pruning import channel_importance, removed_shares
from lorap.algorithms.refit import keep_best
from lorap.compression.allocation import pruned_positions
from lorap.nn.linear import keep_outputs, new_linear


def ffn(width: int, hidden: int = 7, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """gate, up, down and the squared norms of their inputs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    gate, up, down = normal(width, hidden), normal(width, hidden), normal(hidden, width)
    return gate, up, down, normal(hidden).square() * 100, normal(width).square() * 10


def loop_norms(gate, up, down, s, t) -> dict[str, list[float]]:
    gate, up, down, s, t = (tensor.double() for tensor in (gate, up, down, s, t))
    norms: dict[str, list[float]] = {"gate_proj": [], "up_proj": [], "down_proj": []}
    for c in range(gate.shape[0]):
        norms["gate_proj"].append(sum(float(gate[c, j] ** 2 * s[j]) for j in range(gate.shape[1])) ** 0.5)
        norms["up_proj"].append(sum(float(up[c, j] ** 2 * s[j]) for j in range(up.shape[1])) ** 0.5)
        norms["down_proj"].append(sum(float(down[i, c] ** 2) for i in range(down.shape[0])) ** 0.5 * float(t[c]) ** 0.5)
    return norms


def select(gate, up, down, s, t, *, sparsity: float, least_important_kept: float) -> torch.Tensor:
    """The channels that stay, as the paper's recipe chooses them."""
    start, stop = pruned_positions(len(gate), sparsity, least_important_kept)
    scores = channel_importance(gate, up, down, s, t)
    return keep_best(scores, len(gate) - (stop - start), least_important_kept=least_important_kept)


def by_importance(order: list[int]) -> tuple[torch.Tensor, ...]:
    """An FFN whose channel order[i] has the i-th lowest importance; all of it in gate."""
    gate = torch.zeros(len(order), 3)
    gate[order, 1] = torch.arange(1.0, len(order) + 1)
    return gate, torch.zeros(len(order), 3), torch.zeros(3, len(order)), torch.ones(3), torch.ones(len(order))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 63, 100])
def test_importance_is_the_sum_of_three_weighted_norms(width: int, dtype: torch.dtype) -> None:
    gate, up, down, s, t = ffn(width)
    gate, up, down = gate.to(dtype), up.to(dtype), down.to(dtype)
    importance = channel_importance(gate, up, down, s, t)
    norms = loop_norms(gate, up, down, s, t)
    expected = torch.tensor([sum(parts) for parts in zip(*norms.values(), strict=True)], dtype=torch.float64)
    assert importance.dtype == torch.float64
    assert importance.shape == (width,)
    torch.testing.assert_close(importance, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("width", "sparsity", "least", "dropped"),
    [
        (1, 0.2, 0.01, range(0)),
        (63, 0.2, 0.01, range(13)),
        (100, 0.2, 0.01, range(1, 21)),
        (100, 0.5, 0.01, range(1, 51)),
        (200, 0.2, 0.01, range(2, 42)),
        (100, 0.2, 0.0, range(20)),
        (100, 0.0, 0.01, range(0)),
    ],
)
def test_the_band_above_the_least_important_goes(width: int, sparsity: float, least: float, dropped: range) -> None:
    order = torch.randperm(width, generator=torch.Generator().manual_seed(1)).tolist()
    kept = select(*by_importance(order), sparsity=sparsity, least_important_kept=least)
    expected = sorted(set(order) - {order[position] for position in dropped})
    assert kept.dtype == torch.int64
    assert kept.tolist() == expected


def test_importance_sees_all_three_matrices_and_both_norms() -> None:
    # Sums of the three norms: channel 0 -> 4, 1 -> 3, 2 -> 2 * sqrt(9) = 6, 3 -> 5; the lowest two go.
    gate = torch.tensor([[1.0, 0.0], [0.0, 1.5], [0.0, 0.0], [2.5, 0.0]])
    up = torch.tensor([[1.0, 0.0], [0.0, 1.5], [0.0, 0.0], [0.0, 0.0]])
    down = torch.tensor([[0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    norms = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 1.0, 9.0, 1.0])
    assert channel_importance(gate, up, down, *norms).tolist() == [4.0, 3.0, 6.0, 5.0]
    kept = select(gate, up, down, *norms, sparsity=0.5, least_important_kept=0.0)
    assert kept.tolist() == [2, 3]


def test_errors_are_the_weighted_share_of_what_left() -> None:
    gate, up, down, s, t = ffn(63)
    kept = select(gate, up, down, s, t, sparsity=0.5, least_important_kept=0.02)
    errors = removed_shares(gate, up, down, s, t, kept)
    keep = torch.zeros(63, dtype=torch.bool)
    keep[kept] = True
    assert int(keep.sum()) == 63 - (int(0.52 * 63) - 1)
    for role, weight, scale in (("gate_proj", gate, s), ("up_proj", up, s), ("down_proj", down.T, None)):
        weighted = weight.double() * (scale.double().sqrt() if scale is not None else t.double().sqrt()[:, None])
        expected = float(weighted[~keep].norm() / weighted.norm())
        assert 0.1 < expected < 0.9
        assert errors[role] == pytest.approx(expected, rel=1e-12)


def test_nothing_dropped_and_nothing_active_cost_nothing() -> None:
    none = {"gate_proj": 0.0, "up_proj": 0.0, "down_proj": 0.0}
    kept = select(*ffn(1), sparsity=0.2, least_important_kept=0.01)
    assert kept.tolist() == [0]
    assert removed_shares(*ffn(1), kept) == none
    gate, up, down, s, t = ffn(63)
    kept = select(gate, up, down, s * 0, t * 0, sparsity=0.2, least_important_kept=0.01)
    assert len(kept) == 50
    assert removed_shares(gate, up, down, s * 0, t * 0, kept) == none


def test_ties_go_by_position() -> None:
    ones = torch.ones(100, 3), torch.ones(100, 3), torch.ones(3, 100), torch.ones(3), torch.ones(100)
    kept = select(*ones, sparsity=0.2, least_important_kept=0.01)
    assert kept.tolist() == [0, *range(21, 100)]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keep_outputs(bias: bool, dtype: torch.dtype) -> None:
    linear = nn.Linear(5, 7, bias=bias, dtype=dtype)
    channels = torch.tensor([0, 2, 3])
    outputs = keep_outputs(linear, channels)
    assert (outputs.in_features, outputs.out_features) == (5, 3)
    assert torch.equal(outputs.weight, linear.weight[[0, 2, 3]])
    assert outputs.weight.is_contiguous()
    if bias:
        assert torch.equal(outputs.bias, linear.bias[[0, 2, 3]])
    else:
        assert outputs.bias is None
    x = torch.randn(4, 5, dtype=dtype)
    torch.testing.assert_close(outputs(x), linear(x)[:, [0, 2, 3]])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_new_linear_takes_its_tensors(bias: bool) -> None:
    weight = torch.randn(3, 5, dtype=torch.bfloat16)
    linear = new_linear(weight, weight[:, 0] if bias else None)
    assert (linear.in_features, linear.out_features) == (5, 3)
    assert linear.weight.data_ptr() == weight.data_ptr()
    assert linear.weight.dtype == torch.bfloat16
    assert (linear.bias is not None) == bias


@pytest.mark.parametrize("at_once", [1, 10, 63])
def test_importance_does_not_depend_on_how_many_channels_are_looked_at(at_once, monkeypatch):
    parts = ffn(63)
    expected = [sum(norms) for norms in zip(*loop_norms(*parts).values(), strict=True)]
    monkeypatch.setattr(pruning, "CHANNELS", at_once)
    torch.testing.assert_close(
        channel_importance(*parts), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0
    )
