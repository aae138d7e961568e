"""What reaches a GPU: launches counted on fake tensors, which know the device of a GPU and compute nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lorap.kernels import reference
from lorap.nn import implementations

# What writes no memory: views, and memory that is made.
FREE = {"view", "reshape", "t", "transpose", "permute", "slice", "split", "split_with_sizes", "empty", "new_empty"}


class Launches(TorchDispatchMode):
    """Names of the operators that run, without those that launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        if name.lstrip("_").removeprefix("unsafe_") not in FREE and not name.startswith("prim::"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def launches(call: Callable[[], Any]) -> list[str]:
    with Launches() as found:
        call()
    return found.names


@pytest.fixture
def fake() -> Iterator[Callable[..., Tensor]]:
    with FakeTensorMode():
        yield lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype, device="cuda")


def layer(fake: Any, rank: int, n: int, *, pivoted: bool, k: int = 96) -> tuple[Tensor, Tensor, Any]:
    right, left = fake(rank, k), fake(n - rank * pivoted, rank)
    return right, left, fake(rank, dtype=torch.int64) if pivoted else None


@pytest.mark.parametrize("leading", [(100,), (2, 50)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_layer_is_two_matmuls_and_pivots_are_put_in_order_by_one_more(fake, biased, leading):
    run = implementations.implementation("low_rank_linear", "reference")
    x, bias = fake(*leading, 96), fake(80) if biased else None
    plain, pivoted = layer(fake, 24, 80, pivoted=False), layer(fake, 24, 80, pivoted=True)
    assert len(launches(lambda: run(x, plain[0], plain[1], bias))) == 2
    first, again = (launches(lambda: run(x, *pivoted[:2], bias, pivoted[2])) for _ in range(2))
    assert again == ["mm", "mm", "index_select", *(["add_"] if biased else [])]
    assert len(first) > len(again)  # the order is found once
    pivoted[2].add_(0)
    assert launches(lambda: run(x, *pivoted[:2], bias, pivoted[2])) == first


def test_a_layer_of_nothing_but_pivots_is_one_matmul(fake):
    right, rows = fake(80, 96), fake(80, dtype=torch.int64)
    for bias in (None, fake(80)):
        run = implementations.implementation("low_rank_linear", "reference")
        assert len(launches(lambda: run(fake(100, 96), right, fake(0, 80), bias, rows))) == 1  # noqa: B023
        assert len(launches(lambda: reference.low_rank_linear(fake(100, 96), right, fake(0, 80), bias, rows))) == 1  # noqa: B023


def test_a_group_writes_each_layer_where_it_belongs(fake):
    """q is pivoted, k dense and v plain: their outputs are never copied side by side."""
    run = implementations.implementation("low_rank_linear_group", "reference")
    q, v = layer(fake, 24, 80, pivoted=True), layer(fake, 16, 40, pivoted=False)
    arguments = [q[0], fake(40, 96), v[0]], [q[1], fake(0, 40), v[1]]
    pivots = [q[2], fake(40, dtype=torch.int64), fake(0, dtype=torch.int64)]
    call = lambda: run(fake(100, 96), *arguments, [], pivots)  # noqa: E731
    assert call().shape == (100, 160)
    assert launches(call) == ["mm", "mm", "index_select", "mm", "mm", "mm"]


def test_a_second_moment_is_added_up_every_8192_tokens(fake):
    """In float64 that takes a GPU longer than multiplying 1,024 tokens in 16 bits."""
    run = implementations.implementation("second_moment", "reference")
    assert launches(lambda: run(fake(16384, 64))).count("mm") == 2
    assert launches(lambda: run(fake(16385, 64), fake(16385, dtype=torch.bool))).count("mm") == 3


# --- the same on tensors that compute: a CPU stands in ----------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: True))


def pivots(rank: int, n: int) -> Tensor:
    return torch.randperm(n)[:rank].sort().values


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("leading", [(), (7,), (3, 5), (0,)])
def test_values(leading: Sequence[int], biased: bool) -> None:
    torch.manual_seed(0)
    x, right, left = torch.randn(*leading, 33), torch.randn(17, 33), torch.randn(40 - 17, 17)
    bias, rows = torch.randn(40) if biased else None, pivots(17, 40)
    run = implementations.implementation("low_rank_linear", "reference")
    expected = reference.low_rank_linear(x, right, left, bias, rows)
    for _ in range(2):
        torch.testing.assert_close(run(x, right, left, bias, rows), expected)
    rows.copy_(pivots(17, 40))  # a checkpoint is loaded into the same tensor
    torch.testing.assert_close(run(x, right, left, bias, rows), reference.low_rank_linear(x, right, left, bias, rows))
    none, whole = torch.zeros(0), torch.randn(40, 33)
    group = [right, whole, right], [left, torch.zeros(0, 40), torch.randn(9, 17)]
    some = [none, torch.randn(40), torch.randn(9)] if biased else []
    pivot_rows = [rows, torch.arange(40), torch.zeros(0, dtype=torch.int64)]
    run = implementations.implementation("low_rank_linear_group", "reference")
    expected = reference.low_rank_linear_group(x, *group, some, pivot_rows)
    torch.testing.assert_close(run(x, *group, some, pivot_rows), expected)
