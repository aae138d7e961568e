"""torch.ops.lorap: every backend against float64, and everything torch does with an op.

Values are held against the same formula in float64. The tolerance of each output is a few roundings of its size without
cancellation: the op on the absolute values of its arguments (``magnitude``), so that it is as sharp for 63 features as for 576.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lorap import ShapeError
from lorap.kernels import reference
from lorap.nn import dispatch, implementations, native, ops

OPS = list(ops.SCHEMAS)
STATISTICS = ["channel_sq_norm", "second_moment"]
MATMULS = list(implementations.LINEAR_OPS)
BACKENDS = ["reference", *(["cpu"] if native.HAS_CPU else [])]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS, FEATURES, RANKS, OUTPUTS = (1, 2, 3, 5, 16, 17, 37), (1, 63, 100, 576), (1, 17, 64), (1, 63, 100)
CPU = torch.device("cpu")

needs_cpu_kernels = pytest.mark.skipif(not native.HAS_CPU, reason="lorap/_native.so is not built")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, scaled so that products over the last axis stay near 1."""
    return torch.randn(*size).mul(size[-1] ** -0.5 if size and size[-1] else 1.0).to(dtype)


def pivots(rank: int, others: int) -> Tensor:
    return torch.randperm(rank + others)[:rank].sort().values


def to_double(arguments: Any, change: Callable[[Tensor], Tensor] = lambda t: t) -> Any:
    """The floating-point tensors in float64, optionally changed on the way; everything else as it is."""

    def convert(leaf: Any) -> Any:
        return change(leaf.double()) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree_map(convert, arguments)


def magnitude(op: str, arguments: Any) -> Tensor:
    """Sizes of the outputs without cancellation; for the gated ops without SiLU, which never enlarges by more than 1.1."""
    absolute = to_double(arguments, torch.abs)
    if op == "silu_gated_linear":
        x, gate, up, *biases = absolute
        gate_bias, up_bias = (*biases, None, None)[:2]
        return reference.linear(x, gate, gate_bias) * reference.linear(x, up, up_bias)
    if op == "low_rank_silu_gated_linear":
        gate, up = reference.low_rank_linear_group(*absolute).chunk(2, dim=-1)
        return gate * up
    return getattr(reference, op)(*absolute)


def assert_close_to_float64(op: str, y: Tensor, arguments: Any) -> None:
    exact = getattr(reference, op)(*to_double(arguments))
    assert y.shape == exact.shape
    assert y.dtype == arguments[0].dtype
    info = torch.finfo(y.dtype)
    limit = 8 * info.eps * magnitude(op, arguments) + info.tiny * info.eps
    excess = (y.double() - exact).abs() / limit
    assert bool((excess <= 1).all()), f"{float(excess.max()):.3g} times the tolerance, x {tuple(arguments[0].shape)}"


def arguments_of(op: str, m: int, k: int, r: int, n: int, dtype: torch.dtype, bias: bool) -> list[tuple[Any, ...]]:
    """Arguments of an op for these sizes: one tuple for each storage of the weights."""

    def new(*size: int) -> Tensor:
        return random(*size, dtype=dtype)

    def some_bias(size: int) -> Tensor:
        return torch.randn(size).to(dtype)

    x, none = new(m, k), torch.empty(0, dtype=dtype)
    if op == "linear":
        return [(x, new(n, k), some_bias(n) if bias else None)]
    if op == "silu_gated_linear":
        return [(x, new(n, k), new(n, k), *((some_bias(n), some_bias(n)) if bias else (None, None)))]
    if op == "low_rank_linear":
        plain = (x, new(r, k), new(n, r), some_bias(n) if bias else None, None)
        return [plain, (x, new(r, k), new(n, r), some_bias(n + r) if bias else None, pivots(r, n))]
    right, left = [new(r, k), new(r + 2, k)], [new(n, r), new(n, r + 2)]
    if op == "low_rank_silu_gated_linear":
        return [(x, right, left, [some_bias(n), some_bias(n)] if bias else [])]
    plain = (x, right, left, [some_bias(n), some_bias(n)] if bias else [], [])
    # A low-rank layer, a pivoted one with bias in any case, and a dense one: all its rows are pivots.
    right, left = [*right, new(n, k)], [*left, new(0, n)]
    some_pivots = [torch.empty(0, dtype=torch.int64), pivots(r + 2, n), torch.arange(n)]
    biases = [some_bias(n) if bias else none, some_bias(n + r + 2), none]
    return [plain, (x, right, left, biases, some_pivots)]


# --- values ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", MATMULS)
def test_values_equal_float64_for_odd_shapes(op: str, backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    run = implementations.implementation(op, backend)
    ranks = RANKS if "low_rank" in op else RANKS[:1]
    for index, (m, k, r, n) in enumerate(
        (m, k, r, n) for m in TOKENS for k in FEATURES for r in ranks for n in OUTPUTS
    ):
        for arguments in arguments_of(op, m, k, r, n, dtype, bias=index % 2 == 0):
            assert_close_to_float64(op, run(*arguments), arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", MATMULS)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 5), (0,), (2, 0)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...], op: str, backend: str) -> None:
    _, *weights = implementations.example(op, CPU, torch.float32)
    x = random(*shape, 176)
    if 0 not in shape:
        assert_close_to_float64(op, implementations.implementation(op, backend)(x, *weights), (x, *weights))
    y = getattr(ops, op)(x, *weights)  # with the choice of the backend, which keeps an empty batch from the kernels
    assert_close_to_float64(op, y, (x, *weights))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", MATMULS)
def test_non_contiguous_x_and_weights(op: str, backend: str) -> None:
    """Transposed, sliced along either axis, and expanded."""
    torch.manual_seed(0)
    run = implementations.implementation(op, backend)
    for arguments in arguments_of(op, 5, 100, 17, 63, torch.float32, bias=False):
        for change in (_transposed, _sliced_rows, _sliced_columns, _wide_rows):
            changed = tree_map(lambda t, change=change: change(t) if _is_matrix(t) else t, arguments)
            assert_close_to_float64(op, run(*changed), arguments)
        x = random(1, 100).expand(5, 100)
        assert_close_to_float64(op, run(x, *arguments[1:]), (x, *arguments[1:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("op", MATMULS)
def test_what_lies_between_the_rows_of_x_has_no_influence(op: str, grad: bool, dtype: torch.dtype) -> None:
    """With AMX, torch multiplies it by 0, which leaves NaN; more than 16 tokens, and K that is no multiple of 32."""
    torch.manual_seed(0)
    for m, k in ((17, 33), (33, 100), (64, 63)):
        for arguments in arguments_of(op, m, k, 17, 63, dtype, bias=True):
            for change in (_wide_rows, _every_second_row):
                x = change(arguments[0])
                assert x.stride(0) > k
                y = getattr(ops, op)(x.requires_grad_(grad), *arguments[1:])
                assert_close_to_float64(op, y.detach(), arguments)


def _every_second_row(matrix: Tensor) -> Tensor:
    return torch.stack((matrix, torch.full_like(matrix, torch.inf)), dim=1)[:, 0]


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.T.contiguous().T


def _sliced_rows(matrix: Tensor) -> Tensor:
    return matrix.repeat_interleave(2, dim=0)[::2]


def _sliced_columns(matrix: Tensor) -> Tensor:
    return matrix.repeat_interleave(3, dim=1)[:, ::3]


def _wide_rows(matrix: Tensor) -> Tensor:
    return torch.cat((torch.full_like(matrix, torch.nan), matrix), dim=1)[:, matrix.shape[1] :]


@pytest.mark.parametrize(
    "backend",
    [
        "reference",
        pytest.param(
            "cpu",
            marks=[needs_cpu_kernels],
        ),
    ],
)
@pytest.mark.parametrize("op", MATMULS)
def test_non_contiguous_bias(op: str, backend: str) -> None:
    torch.manual_seed(0)
    for arguments in arguments_of(op, 3, 100, 17, 63, torch.float32, bias=True):
        strided = tree_map(
            lambda t: t.repeat_interleave(2)[::2] if isinstance(t, Tensor) and t.dim() == 1 and t.numel() > 1 else t,
            arguments,
        )
        assert_close_to_float64(op, implementations.implementation(op, backend)(*strided), arguments)


@given(
    layers=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.booleans()), min_size=1, max_size=4
    ),
    m=st.integers(1, 20),
    k=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_group_is_each_layer_alone(
    layers: list[tuple[int, int, bool, bool]], m: int, k: int, dtype: torch.dtype, backend: str, seed: int
) -> None:
    torch.manual_seed(seed)
    x = random(m, k, dtype=dtype)
    each = []
    for rank, n, pivoted, bias in layers:
        rows = pivots(rank, n) if pivoted else torch.empty(0, dtype=torch.int64)
        some_bias = random(n + len(rows) if bias else 0, dtype=dtype)
        each.append((random(rank, k, dtype=dtype), random(n, rank, dtype=dtype), some_bias, rows))
    y = implementations.implementation("low_rank_linear_group", backend)(x, *map(list, zip(*each, strict=True)))
    alone = implementations.implementation("low_rank_linear", backend)
    expected = [alone(x, right, left, *(t if t.numel() else None for t in rest)) for right, left, *rest in each]
    torch.testing.assert_close(y, torch.cat(expected, dim=-1), rtol=0, atol=0)


@given(
    rank=st.integers(1, 40),
    others=st.integers(0, 40),
    m=st.integers(1, 20),
    k=st.integers(1, 70),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_pivoted_layer_is_the_layer_of_its_reconstructed_weight(
    rank: int, others: int, m: int, k: int, backend: str, seed: int
) -> None:
    torch.manual_seed(seed)
    x, right, left, rows = random(m, k), random(rank, k), random(others, rank), pivots(rank, others)
    bias = torch.randn(rank + others)
    weight = torch.empty(rank + others, k, dtype=torch.float64)
    weight[rows] = right.double()
    weight[torch.ones(rank + others, dtype=torch.bool).index_fill(0, rows, False)] = left.double() @ right.double()
    y = implementations.implementation("low_rank_linear", backend)(x, right, left, bias, rows)
    torch.testing.assert_close(y.double(), x.double() @ weight.T + bias.double(), rtol=1e-4, atol=1e-5)


# --- statistics ------------------------------------------------------------------------------------------------------------


def run_statistic(op: str, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    total, count = getattr(ops, op)(x, mask)
    assert (total.dtype, count.dtype, count.shape) == (torch.float64, torch.int64, ())
    return total, count


def exact_statistic(op: str, x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1]).double()
    return x.square().sum(0) if op == "channel_sq_norm" else x.T @ x


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 63), (3, 5, 100), (2100, 17), (0, 7), (2, 0, 7), (9,)], ids=str)
@pytest.mark.parametrize("op", STATISTICS)
def test_statistics_equal_float64_for_any_shape(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    total, count = run_statistic(op, x)
    assert int(count) == x.numel() // shape[-1]
    torch.testing.assert_close(total, exact_statistic(op, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("op", STATISTICS)
def test_masked_tokens_do_not_count_even_if_nan(op: str, mask_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(3, 700, 9), torch.rand(3, 700) > 0.3
    expected = exact_statistic(op, x[mask])
    x[~mask] = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(3)
    total, count = run_statistic(op, x, mask.to(mask_dtype))
    assert int(count) == int(mask.sum())
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", STATISTICS)
def test_a_mask_without_tokens_gives_zeros(op: str) -> None:
    total, count = run_statistic(op, torch.full((4, 5), torch.nan), torch.zeros(4, dtype=torch.bool))
    assert int(count) == 0
    assert not total.any()


@pytest.mark.parametrize("op", STATISTICS)
def test_nan_of_a_counted_token_is_seen(op: str) -> None:
    x = torch.ones(4, 5)
    x[2, 3] = torch.nan
    total, _ = run_statistic(op, x, torch.ones(4))
    assert int(total.isnan().sum()) == (1 if op == "channel_sq_norm" else 9)


def test_second_moment_keeps_what_float32_products_lose() -> None:
    """Two channels that agree in five digits have a difference whose size only float64 products hold."""
    x = torch.randn(500, 1) + 1000
    x = torch.cat((x, x * (1 + 2**-18)), dim=1)
    total, _ = ops.second_moment(x)
    difference = torch.tensor([1.0, -1.0], dtype=torch.float64)
    expected = (x.double() @ difference).square().sum()
    assert expected > 0
    torch.testing.assert_close(difference @ total @ difference, expected, rtol=1e-3, atol=0)


# --- torch around the ops --------------------------------------------------------------------------------------------------


def require_grad(arguments: Any) -> Any:
    def convert(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.detach().clone().requires_grad_() if floating else leaf

    return tree_map(convert, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("op", "grad"),
    [*((op, False) for op in OPS), *((op, True) for op in MATMULS)],
    ids=lambda v: v if isinstance(v, str) else f"grad={v}",
)
def test_opcheck(op: str, dtype: torch.dtype, grad: bool) -> None:
    arguments = implementations.example(op, CPU, dtype)
    torch.library.opcheck(getattr(torch.ops.lorap, op).default, require_grad(arguments) if grad else arguments)


@pytest.mark.parametrize("op", MATMULS)
def test_opcheck_with_pivots_and_biases(op: str) -> None:
    for arguments in arguments_of(op, 3, 20, 4, 6, torch.float32, bias=True):
        torch.library.opcheck(getattr(torch.ops.lorap, op).default, require_grad(arguments))


@pytest.mark.parametrize("op", MATMULS)
def test_gradcheck_in_float64(op: str) -> None:
    torch.manual_seed(0)
    for arguments in arguments_of(op, 2, 5, 3, 4, torch.float64, bias=True):
        leaves, structure = tree_flatten(require_grad(arguments))

        def run(*some: Any, structure: Any = structure) -> Tensor:
            return getattr(ops, op)(*tree_unflatten(list(some), structure))

        assert torch.autograd.gradcheck(run, tuple(leaves))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", MATMULS)
def test_gradients_are_those_of_the_reference(op: str, dtype: torch.dtype) -> None:
    arguments = implementations.example(op, CPU, dtype)
    found, expected = require_grad(arguments), require_grad(arguments)
    getattr(ops, op)(*found).float().square().sum().backward()
    getattr(reference, op)(*expected).float().square().sum().backward()
    for got, want in zip(*(tree_leaves(side) for side in (found, expected)), strict=True):
        scale = float(want.grad.float().abs().max())
        torch.testing.assert_close(got.grad / scale, want.grad / scale, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("op", MATMULS)
def test_second_derivatives_in_float64(op: str) -> None:
    torch.manual_seed(0)
    arguments = arguments_of(op, 2, 3, 2, 3, torch.float64, bias=True)[0]
    leaves, structure = tree_flatten(require_grad(arguments))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def run(*some: Tensor) -> Tensor:
        remaining = iter(some)
        filled = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return getattr(ops, op)(*tree_unflatten(filled, structure))

    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize("op", MATMULS)
def test_forward_mode_derivatives(op: str) -> None:
    x, *weights = implementations.example(op, CPU, torch.float32)
    tangent = torch.randn_like(x)
    _, expected = torch.func.jvp(lambda x: getattr(reference, op)(x, *weights), (x,), (tangent,))
    _, found = torch.func.jvp(lambda x: getattr(ops, op)(x, *weights), (x,), (tangent,))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("op", MATMULS)
def test_only_the_tensors_that_want_gradients_get_them(op: str) -> None:
    x, *weights = implementations.example(op, CPU, torch.float32)
    x = x.clone().requires_grad_()
    getattr(ops, op)(x, *weights).sum().backward()
    assert x.grad is not None
    assert all(leaf.grad is None for leaf in tree_leaves(weights))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("op", OPS)
def test_compiles_into_one_graph(op: str, grad: bool) -> None:
    arguments = implementations.example(op, CPU, torch.float32)
    if grad:
        arguments = require_grad(arguments)
    compiled = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")
    with nullcontext() if grad and op in MATMULS else torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), getattr(ops, op)(*arguments))
    if grad and op in MATMULS:
        compiled(*arguments).sum().backward()
        assert all(leaf.grad is not None for leaf in tree_leaves(arguments))


@pytest.mark.parametrize("op", MATMULS)
def test_one_dynamic_graph_serves_every_number_of_tokens(op: str) -> None:
    """Also where the kernel of this machine serves up to 16 tokens and torch the others."""
    _, *weights = implementations.example(op, CPU, torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(getattr(ops, op), fullgraph=True, backend=counter, dynamic=True)
    for tokens in (3, 16, 17, 40):
        x = random(tokens, 176)
        torch.testing.assert_close(compiled(x, *weights), getattr(ops, op)(x, *weights))
    assert counter.frame_count == 1


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors_of_a_gpu_that_is_not_there(op: str) -> None:
    real = getattr(ops, op)(*implementations.example(op, CPU, torch.bfloat16))
    with FakeTensorMode():
        arguments = tree_map(
            lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda") if isinstance(t, Tensor) else t,
            implementations.example(op, CPU, torch.bfloat16),
        )
        fake = getattr(ops, op)(*arguments)
    pairs = zip(fake, real, strict=True) if isinstance(real, tuple) else [(fake, real)]
    for got, want in pairs:
        assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, "cuda")


@pytest.mark.parametrize("op", MATMULS)
def test_direct_call_and_dispatched_call_agree(op: str) -> None:
    arguments = implementations.example(op, CPU, torch.bfloat16)
    assert torch.equal(getattr(ops, op)(*arguments), getattr(torch.ops.lorap, op)(*arguments))


def test_parameters_and_inference_mode() -> None:
    x, right, left = random(3, 8), torch.nn.Parameter(random(2, 8)), torch.nn.Parameter(random(5, 2))
    expected = ops.low_rank_linear(x, right, left)
    assert expected.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(ops.low_rank_linear(x, right, left), expected.detach())


# --- shapes ----------------------------------------------------------------------------------------------------------------


def zeros(*size: int) -> Tensor:
    return torch.zeros(size)


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


X, SCALAR = (3, 8), ()
# op, shape of x, other arguments, message
WRONG: list[tuple[str, tuple[int, ...], list[Any], str]] = [
    ("linear", SCALAR, [zeros(5, 8)], "x is a scalar"),
    ("linear", X, [zeros(5)], "weight has shape (5,); it must have 2 dimensions"),
    ("linear", X, [zeros(5, 7)], "weight (5, 7) has 7 columns, but the last axis of x is 8"),
    ("linear", X, [zeros(5, 8), zeros(4)], "bias has shape (4,), the output has 5 features"),
    ("low_rank_linear", SCALAR, [zeros(2, 8), zeros(5, 2)], "x is a scalar"),
    ("low_rank_linear", X, [zeros(2, 7), zeros(5, 2)], "right (2, 7) has 7 columns, but the last axis of x is 8"),
    ("low_rank_linear", X, [zeros(8), zeros(5, 2)], "right has shape (8,); it must have 2 dimensions"),
    ("low_rank_linear", X, [zeros(2, 8), zeros(5, 3)], "left (5, 3) has 3 columns, but the rank (rows of right) is 2"),
    ("low_rank_linear", X, [zeros(2, 8), zeros(5, 2, 1)], "left has shape (5, 2, 1); it must have 2 dimensions"),
    ("low_rank_linear", X, [zeros(2, 8), zeros(5, 2), zeros(6)], "bias has shape (6,), the output has 5 features"),
    ("low_rank_linear", X, [zeros(2, 8), zeros(5, 2), zeros(5), ints(0, 3)], "bias has shape (5,), the output has 7"),
    ("low_rank_linear", X, [zeros(2, 8), zeros(5, 2), None, ints(0)], "pivot_rows has shape (1,); one row per rank"),
    ("low_rank_linear", X, [zeros(2, 8), zeros(5, 2), None, zeros(2)], "pivot_rows is torch.float32, not int64"),
    ("low_rank_linear_group", X, [[], [], [], []], "got 0 right, 0 left, 0 bias, 0 pivot_rows"),
    ("low_rank_linear_group", X, [[zeros(2, 8)], [zeros(5, 2)] * 2, [], []], "got 1 right, 2 left, 0 bias"),
    ("low_rank_linear_group", X, [[zeros(2, 8)], [zeros(5, 2)], [zeros(5)] * 2, []], "1 right, 1 left, 2 bias"),
    ("low_rank_linear_group", X, [[zeros(2, 8)], [zeros(5, 2)], [], [ints(0, 1)] * 2], "0 bias, 2 pivot_rows"),
    ("low_rank_linear_group", X, [[zeros(2, 8), zeros(2, 9)], [zeros(5, 2)] * 2, [], []], "right (2, 9) has 9 columns"),
    ("silu_gated_linear", X, [zeros(5, 8), zeros(6, 8)], "gate has shape (5, 8), up has (6, 8)"),
    ("silu_gated_linear", X, [zeros(5, 7), zeros(5, 7)], "weight (5, 7) has 7 columns, but the last axis of x is 8"),
    ("silu_gated_linear", X, [zeros(5, 8), zeros(5, 8), zeros(5), zeros(4)], "bias has shape (4,), the output has 5"),
    ("low_rank_silu_gated_linear", X, [[zeros(2, 8)], [zeros(5, 2)], []], "gate and up are two layers, got 1"),
    (
        "low_rank_silu_gated_linear",
        X,
        [[zeros(2, 8)] * 2, [zeros(5, 2), zeros(6, 2)], []],
        "gate has width 5, up 6",
    ),
    ("channel_sq_norm", SCALAR, [], "x is a scalar"),
    ("channel_sq_norm", X, [zeros(4)], "mask (4,) does not have one element per token of x (3, 8)"),
    ("second_moment", X, [zeros(3, 8)], "mask (3, 8) does not have one element per token of x (3, 8)"),
]
IDS = [f"{op}-{message}" for op, _, _, message in WRONG]


def assert_refused(call: Callable[..., Any], x: Tensor, rest: list[Any], message: str) -> None:
    with pytest.raises(ShapeError, match=re.escape(message)):
        call(x, *rest)


@pytest.mark.parametrize(("op", "shape", "rest", "message"), WRONG, ids=IDS)
def test_wrong_shapes_are_named(op: str, shape: tuple[int, ...], rest: list[Any], message: str) -> None:
    for call in (getattr(ops, op), getattr(torch.ops.lorap, op)):
        with dispatch.use("reference"):
            assert_refused(call, zeros(*shape), rest, message)
        if shape == X and op in MATMULS:  # more tokens than the CPU kernels serve
            assert_refused(call, zeros(30, 8), rest, message)


@pytest.mark.parametrize(("op", "shape", "rest", "message"), WRONG, ids=IDS)
def test_wrong_shapes_are_named_by_fake_tensors(op: str, shape: tuple[int, ...], rest: list[Any], message: str) -> None:
    with FakeTensorMode() as mode:
        fake = tree_map(lambda t: mode.from_tensor(t) if isinstance(t, Tensor) else t, rest)
        for call in (getattr(ops, op), getattr(torch.ops.lorap, op)):
            assert_refused(call, torch.zeros(shape), fake, message)


for_matmuls = pytest.mark.parametrize(
    ("op", "shape", "rest", "message"),
    [pytest.param(*case, id=name) for name, case in zip(IDS, WRONG, strict=True) if case[0] in MATMULS],
)
for_matmuls_of_matrices = pytest.mark.parametrize(
    ("op", "shape", "rest", "message"),
    [
        pytest.param(*case, id=name)
        for name, case in zip(IDS, WRONG, strict=True)
        if case[0] in MATMULS and case[1] == X
    ],
)


@needs_cpu_kernels
@for_matmuls_of_matrices
def test_wrong_shapes_are_named_where_the_cpu_kernels_run(
    op: str, shape: tuple[int, ...], rest: list[Any], message: str
) -> None:
    assert dispatch.choose(op, zeros(*shape), shape[0]) == "cpu"
    assert_refused(getattr(ops, op), zeros(*shape), rest, message)


@needs_cpu_kernels
@for_matmuls
def test_the_cpu_kernels_never_read_past_tensors_of_wrong_shape(
    op: str, shape: tuple[int, ...], rest: list[Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match="lorap_cpu"):
        implementations.implementation(op, "cpu")(zeros(*shape), *rest)


@needs_cpu_kernels
@pytest.mark.parametrize("rows", [(0, 0), (1, 0), (-1, 3), (0, 7)], ids=str)
def test_the_cpu_kernels_refuse_pivot_rows_that_do_not_ascend_within_the_output(rows: tuple[int, int]) -> None:
    with pytest.raises(RuntimeError, match=re.escape("pivot_rows must ascend within [0, 7)")):
        ops.low_rank_linear(zeros(*X), zeros(2, 8), zeros(5, 2), None, ints(*rows))


@pytest.mark.parametrize("op", MATMULS)
def test_mixed_dtypes_are_refused(op: str) -> None:
    x, *weights = implementations.example(op, CPU, torch.float32)
    for tokens in (1, 20):
        with pytest.raises(RuntimeError, match="dtype"):
            getattr(ops, op)(random(tokens, x.shape[-1], dtype=torch.bfloat16), *weights)
