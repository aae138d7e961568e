"""The low-rank decode kernels against float64, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import triton.language as tl
from torch import Tensor

from lorap.kernels import configs, low_rank_linear, reference
from lorap.kernels.low_rank_fused import low_rank_fused, one_launch_wins
from lorap.kernels.low_rank_linear import low_rank_linear_group, low_rank_silu_gated_linear

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCE)
NONE = torch.zeros(0)
pytestmark = pytest.mark.usefixtures("poison")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


class Group:
    """Random layers; ``biased`` and ``pivoted`` name the layers that have a bias, or pivots."""

    def __init__(
        self,
        k: int,
        ranks: Sequence[int],
        outs: Sequence[int],
        *,
        biased: Sequence[int] = (),
        pivoted: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        sizes = list(enumerate(zip(ranks, outs, strict=True)))
        self.right = [torch.randn(rank, k, dtype=dtype) / max(1, k) ** 0.5 for rank in ranks]
        self.left = [torch.randn(n - rank * (i in pivoted), rank, dtype=dtype) / rank**0.5 for i, (rank, n) in sizes]
        self.bias = [torch.randn(n, dtype=dtype) if i in biased else NONE for i, n in enumerate(outs)]
        self.pivots = [torch.randperm(n)[:rank].sort()[0] if i in pivoted else NONE for i, (rank, n) in sizes]
        self.bias = self.bias if biased else []
        self.pivots = self.pivots if pivoted else []

    def check(self, x: Tensor, **options: bool) -> None:
        y = low_rank_linear_group(x, self.right, self.left, self.bias, self.pivots, **options)
        right, left, bias = ([tensor.double() for tensor in part] for part in (self.right, self.left, self.bias))
        check_close(y, reference.low_rank_linear_group(x.double(), right, left, bias, self.pivots), x.dtype)


def check_close(y: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert y.dtype == dtype
    assert y.shape == expected.shape
    limit = TOLERANCE[dtype] * expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(y.double(), expected, rtol=0.0, atol=limit)


@pytest.fixture
def tuned(monkeypatch):
    """``tuned(shrink=..., expand=...)``: settings as from a file for this GPU."""

    def use(**kernels: dict[str, int]) -> None:
        monkeypatch.setattr(configs, "lookup", lambda kernel, *_, **__: kernels.get(kernel))
        low_rank_linear._settings.cache_clear()

    yield use
    low_rank_linear._settings.cache_clear()


@each_dtype
@pytest.mark.parametrize(("k", "rank", "n"), [(63, 17, 100), (100, 63, 1), (128, 1, 63)])
@pytest.mark.parametrize("m", [1, 2, 7, 16, 33])
def test_one_layer(m, k, rank, n, dtype):
    Group(k, [rank], [n], biased=[0] if rank == 17 else [], dtype=dtype).check(torch.randn(m, k, dtype=dtype))


@each_dtype
@pytest.mark.parametrize(
    "group",
    [
        {"ranks": (17, 63), "outs": (100, 63), "biased": [1]},
        {"ranks": (1, 17, 63), "outs": (63, 1, 100), "biased": [0, 2]},
        {"ranks": (17, 63), "outs": (100, 64), "biased": [0], "pivoted": [0, 1]},
        {"ranks": (63, 40, 17), "outs": (100, 40, 130), "biased": [0, 1], "pivoted": [1, 2]},
    ],
    ids=["two", "three", "pivoted", "dense-in-the-middle"],
)
@pytest.mark.parametrize("m", [1, 5])
def test_groups(m, group, dtype):
    """The last group's middle layer is dense: all its rows are pivots, and left is (0, N)."""
    Group(100, **group, dtype=dtype).check(torch.randn(m, 100, dtype=dtype))


@pytest.mark.parametrize("pivots", [[0, 1, 2], [97, 98, 99], [0, 50, 99], [31, 32, 64], [63, 64, 65]])
@pytest.mark.parametrize("m", [1, 2])
def test_pivots_at_edges(m, pivots):
    """At both ends, and where the blocks of expand begin and end."""
    group = Group(40, [3], [100], biased=[0], pivoted=[0])
    group.pivots = [torch.tensor(pivots)]
    group.check(torch.randn(m, 40))


@pytest.mark.parametrize(("m", "pdl"), [(1, False), (1, True), (5, False), (5, True), (33, False)])
def test_several_parts_and_blocks(m, pdl, tuned, monkeypatch):
    """K in four parts, the last not full, and several blocks of the rank; what waits, waits in vain here."""
    monkeypatch.setattr(tl.extra.cuda, "gdc_wait", lambda: None)
    monkeypatch.setattr(tl.extra.cuda, "gdc_launch_dependents", lambda: None)
    tuned(
        shrink={"SPLIT_K": 4, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 1, "num_stages": 1},
        expand={"BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 1, "num_stages": 1},
    )
    x = torch.randn(m, 220)
    group = Group(220, (50, 17), (90, 60), biased=[1], pivoted=[0])
    _, launches = low_rank_linear.group_launches(x, group.right, group.left, group.bias, group.pivots, pdl=pdl)
    assert [launch.grid for launch in launches] == [(4 + 2, 4, -(-m // 32)), (2 + 2 + 2, -(-m // 32))]
    assert launches[1].options["PARTS"] == 4
    group.check(x, pdl=pdl)
    right, left = group.right, [torch.randn(90, 50), torch.randn(90, 17)]
    expected = reference.low_rank_silu_gated_linear(x.double(), [r.double() for r in right], [f.double() for f in left])
    check_close(low_rank_silu_gated_linear(x, right, left, pdl=pdl), expected, x.dtype)


def test_a_tile_as_wide_as_the_rank(monkeypatch):
    """What one token gets from a GPU with dependent launches: no loop, and ranks that do not fill the tile."""
    monkeypatch.setattr(tl.extra.cuda, "gdc_wait", lambda: None)
    monkeypatch.setattr(tl.extra.cuda, "gdc_launch_dependents", lambda: None)
    x, group = torch.randn(1, 100), Group(100, (50, 17, 40), (90, 60, 40), biased=[1], pivoted=[0, 2])
    _, launches = low_rank_linear.group_launches(x, group.right, group.left, group.bias, group.pivots, pdl=True)
    assert launches[1].options["WHOLE"]
    group.check(x, pdl=True)
    right, left = group.right[:2], [torch.randn(90, 50), torch.randn(90, 17)]
    expected = reference.low_rank_silu_gated_linear(x.double(), [r.double() for r in right], [f.double() for f in left])
    check_close(low_rank_silu_gated_linear(x, right, left, pdl=True), expected, x.dtype)


@each_dtype
@pytest.mark.parametrize("biased", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("m", [1, 7])
def test_silu_gated(m, biased, dtype):
    group = Group(63, (17, 40), (100, 100), biased=biased, dtype=dtype)
    x = torch.randn(m, 63, dtype=dtype)
    y = low_rank_silu_gated_linear(x, group.right, group.left, group.bias)
    right, left, bias = ([tensor.double() for tensor in part] for part in (group.right, group.left, group.bias))
    check_close(y, reference.low_rank_silu_gated_linear(x.double(), right, left, bias), dtype)


@each_dtype
@pytest.mark.parametrize(("k", "rank", "n"), [(63, 17, 100), (100, 130, 63), (128, 1, 1)])
@pytest.mark.parametrize("m", [1, 2, 33])
def test_one_launch(m, k, rank, n, dtype):
    group = Group(k, [rank], [n], biased=[0], dtype=dtype)
    x = torch.randn(m, k, dtype=dtype)
    for bias in (None, group.bias[0]):
        y = low_rank_fused(x, group.right[0], group.left[0], bias)
        doubles = (None if tensor is None else tensor.double() for tensor in (x, group.right[0], group.left[0], bias))
        check_close(y, reference.low_rank_linear(*doubles), dtype)


def test_one_launch_wins_for_small_models_only():
    assert one_launch_wins(1, 576, 32, 576)
    assert one_launch_wins(32, 576, 32, 576)
    assert not one_launch_wins(33, 576, 32, 576)
    assert not one_launch_wins(1, 576, 64, 576)
    assert not one_launch_wins(1, 4096, 512, 4096)
    assert not one_launch_wins(1, 576, 32, 50_000)


@pytest.mark.parametrize("m", [1, 7])
def test_same_bytes_twice(m):
    group = Group(100, (17, 63), (100, 63), biased=[0], pivoted=[1])
    x = torch.randn(m, 100)
    once, again = (low_rank_linear_group(x, group.right, group.left, group.bias, group.pivots) for _ in range(2))
    assert torch.equal(once, again)
    once, again = (low_rank_fused(x, group.right[0], group.left[0]) for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("m", [1, 4])
def test_what_is_not_finite_stays_in_its_token(m):
    group = Group(40, [17], [30])
    x = torch.randn(m, 40)
    x[0, 3] = torch.inf
    y = low_rank_linear_group(x, group.right, group.left)
    assert not y[0].isfinite().any()
    group.check(x[1:])
    assert y[1:].isfinite().all()


def test_leading_shapes_and_views():
    group = Group(30, (17, 5), (40, 20), biased=[0])
    group.check(torch.randn(2, 3, 30))
    group.check(torch.randn(30))
    group.check(torch.randn(3, 60)[:, ::2])
    group.check(torch.randn(3, 60)[:, 7:37])
    group.check(torch.randn(30, 3).T)
    group.right[0] = torch.randn(30, 17).T
    group.left[1] = torch.randn(40, 10)[::2, ::2]
    group.check(torch.randn(3, 30))


def test_sizes_of_one():
    Group(1, [1], [1]).check(torch.randn(1, 1))
    Group(1, [1, 1, 1], [1, 1, 1], biased=[0, 1, 2], pivoted=[2]).check(torch.randn(2, 1))


@pytest.mark.parametrize(
    ("m", "k", "outs"), [(0, 8, (5, 4)), (3, 8, (0, 0)), (3, 8, (5, 0)), (2, 0, (5, 4)), (1, 0, (5, 4))]
)
def test_empty(m, k, outs):
    group = Group(k, (3, 2), outs)
    group.check(torch.randn(m, k))
    group.check(torch.randn(2, m, k))


def test_what_does_not_fit_is_refused():
    group = Group(8, (3, 2), (5, 4))
    with pytest.raises(ValueError, match="do not fit together"):
        low_rank_linear_group(torch.randn(2, 9), group.right, group.left)
    with pytest.raises(ValueError, match="equal size"):
        low_rank_silu_gated_linear(torch.randn(2, 8), group.right, group.left)
    with pytest.raises(ValueError, match="got 4 right"):
        low_rank_linear_group(torch.randn(2, 8), group.right * 2, group.left * 2)
    with pytest.raises(TypeError, match="bfloat16"):
        low_rank_linear_group(torch.randn(2, 8).bfloat16(), group.right, group.left)
