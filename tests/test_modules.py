"""``LowRankLinear`` computes x @ (left @ right).T + bias on any batch shape, stored under the documented keys."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorap import FactorizationError, LowRankLinear, ShapeError, factorize
from lorap.nn import ops
from lorap.nn.linear import Linear, is_plain

torch.manual_seed(0)
KEYS = {"right.weight": (3, 5), "left.weight": (7, 3), "left.bias": (7,), "weight": (1,), "needs_import_lorap": (1,)}


def layer(bias: bool = True) -> LowRankLinear:
    torch.manual_seed(0)
    return LowRankLinear(5, 7, 3, bias=bias)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(), (1,), (63,), (2, 3), (0,), (2, 0)], ids=str)
def test_forward(shape: tuple[int, ...], bias: bool) -> None:
    module = layer(bias)
    x = torch.randn(*shape, 5)
    expected = x.double() @ (module.left.weight.double() @ module.right.weight.double()).T
    if bias:
        expected = expected + module.bias.double()
    y = module(x)
    assert y.shape == (*shape, 7)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(5, 63).T,
        torch.randn(63, 10)[:, ::2],
        torch.randn(3, 2, 5).transpose(0, 1),
        torch.randn(5).expand(4, 5),
    ],
    ids=["transposed", "strided", "permuted", "expanded"],
)
def test_forward_of_non_contiguous_input(x: torch.Tensor) -> None:
    assert not x.is_contiguous()
    module = layer()
    torch.testing.assert_close(module(x), x @ module.reconstruct().T + module.bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_from_linear(bias: bool, dtype: torch.dtype) -> None:
    linear = nn.Linear(63, 40, bias=bias, dtype=dtype)
    metric = torch.rand(63) * 10
    module = LowRankLinear.from_linear(linear, 11, metric)
    factors = factorize(linear.weight.data, 11, metric)
    assert (module.in_features, module.out_features, module.rank) == (63, 40, 11)
    assert torch.equal(module.left.weight, factors.left)
    assert torch.equal(module.right.weight, factors.right)
    assert {parameter.dtype for parameter in module.state_dict().values()} == {dtype}
    assert (module.bias is None) == (not bias)
    if bias:
        assert torch.equal(module.bias, linear.bias)
    unweighted = LowRankLinear.from_linear(linear, 11)
    assert not torch.equal(unweighted.right.weight, module.right.weight)


def test_from_linear_of_full_rank_is_the_same_layer() -> None:
    linear = nn.Linear(63, 40)
    x = torch.randn(9, 63)
    torch.testing.assert_close(LowRankLinear.from_linear(linear, 40)(x), linear(x), rtol=1e-4, atol=1e-5)


def test_from_linear_refuses_an_impossible_rank() -> None:
    with pytest.raises(FactorizationError, match=r"rank 6 .*\(7, 5\).*\[1, 5\]"):
        LowRankLinear.from_linear(nn.Linear(5, 7), 6)


def test_from_factors_uses_the_tensors() -> None:
    left, right, bias = torch.randn(7, 3), torch.randn(3, 5), torch.randn(7)
    module = LowRankLinear.from_factors(left, right, bias)
    pointers = [tensor.data_ptr() for tensor in (left, right, bias)]
    assert [p.data_ptr() for p in (module.left.weight, module.right.weight, module.bias)] == pointers
    torch.testing.assert_close(module.reconstruct(), left @ right)
    assert LowRankLinear.from_factors(left, right).bias is None


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_state_dict_and_guard(bias: bool) -> None:
    expected = {key: shape for key, shape in KEYS.items() if bias or key != "left.bias"}
    left, right = torch.randn(7, 3), torch.randn(3, 5)
    for module in (layer(bias), LowRankLinear.from_factors(left, right, torch.zeros(7) if bias else None)):
        assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == expected
        assert module.weight.tolist() == [1.0]
        assert not module.weight.requires_grad
        assert module.weight.device.type == "cpu"
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(5, 7, bias=bias).load_state_dict(module.state_dict(), strict=False)


def test_state_dict_round_trip() -> None:
    source, target = layer(), LowRankLinear(5, 7, 3)
    target.load_state_dict(source.state_dict())
    x = torch.randn(4, 5)
    assert torch.equal(source(x), target(x))


def test_deepcopy_is_independent() -> None:
    module = LowRankLinear.from_linear(nn.Linear(5, 7), 3)
    clone, x = copy.deepcopy(module), torch.randn(4, 5)
    before = module(x)
    assert torch.equal(clone(x), before)
    with torch.no_grad():
        clone.left.weight.zero_()
    assert torch.equal(module(x), before)
    assert torch.equal(clone(x), clone.bias.expand(4, 7))


def test_extra_repr() -> None:
    assert layer().extra_repr().startswith("in_features=5, out_features=7, rank=3, bias=True")
    assert "rank=3, bias=False" in repr(layer(bias=False))


def test_gradients_flow() -> None:
    module = LowRankLinear.from_linear(nn.Linear(5, 7), 3)
    x = torch.randn(4, 5, requires_grad=True)
    module(x).square().sum().backward()
    assert {name for name, _ in module.named_parameters()} == {"left.weight", "left.bias", "right.weight"}
    for tensor in (x, *module.parameters()):
        assert tensor.grad is not None
        assert bool((tensor.grad != 0).any())
    double = module.double()
    inputs = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(double, (inputs,))


# --- pivoted storage -------------------------------------------------------------------------------------------------------


def pivoted(bias: bool = True, dtype: torch.dtype = torch.float32) -> LowRankLinear:
    """63 features through rank 11 to 40 rows, 11 of them pivots."""
    torch.manual_seed(0)
    rows = torch.randperm(40)[:11].sort().values
    left, right = torch.randn(29, 11, dtype=dtype) / 3, torch.randn(11, 63, dtype=dtype) / 8
    return LowRankLinear.from_factors(left, right, torch.randn(40, dtype=dtype) if bias else None, rows)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(), (1,), (17,), (2, 3), (0,)], ids=str)
def test_pivoted_forward_is_that_of_the_reconstructed_weight(shape: tuple[int, ...], bias: bool) -> None:
    module, x = pivoted(bias), torch.randn(*shape, 63)
    assert module.out_features == 40
    expected = nn.functional.linear(x, module.reconstruct(), module.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_pivot_rows_of_the_reconstructed_weight_are_right() -> None:
    module = pivoted()
    others = torch.ones(40, dtype=torch.bool).index_fill(0, module.pivot_rows, False)
    weight = module.reconstruct()
    assert torch.equal(weight[module.pivot_rows], module.right.weight)
    torch.testing.assert_close(weight[others], module.left.weight @ module.right.weight)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_new_pivoted_layer_has_the_documented_parameters(bias: bool) -> None:
    module = LowRankLinear(63, 40, 11, bias=bias, pivoted=True)
    shapes = {"right.weight": (11, 63), "left.weight": (29, 11), "weight": (1,), "pivot_rows": (11,)}
    shapes["needs_import_lorap"] = (1,)
    expected = shapes | ({"output_bias": (40,)} if bias else {})
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == expected
    assert module(torch.randn(2, 63)).shape == (2, 40)
    assert module.extra_repr().startswith(f"in_features=63, out_features=40, rank=11, bias={bias}, pivoted=True")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(40, 63), (63, 40), (100, 7), (12, 100)], ids=str)
def test_from_linear_pivoted_is_the_same_matrix_in_fewer_numbers(
    shape: tuple[int, int], dtype: torch.dtype, bias: bool
) -> None:
    (out_features, in_features), rank = shape, min(shape) - 1
    torch.manual_seed(0)
    linear, metric = nn.Linear(in_features, out_features, bias=bias, dtype=dtype), torch.rand(in_features) * 10
    module = LowRankLinear.from_linear(linear, rank, metric, pivoted=True)
    assert {name: value.dtype for name, value in module.state_dict().items() if name != "pivot_rows"} == dict.fromkeys(
        ["right.weight", "left.weight", "weight", "needs_import_lorap", *(["output_bias"] if bias else [])], dtype
    )
    assert module.right.weight.numel() + module.left.weight.numel() == rank * (out_features + in_features - rank)
    assert (module.bias is None) == (not bias)
    factors = factorize(linear.weight.data.double(), rank, metric)
    expected, tolerance = factors.left @ factors.right, 16 * torch.finfo(dtype).eps
    error = (module.reconstruct(dtype=torch.float64) - expected).norm() / expected.norm()
    assert float(error.detach()) < tolerance
    x = torch.randn(4, in_features, dtype=dtype)
    by_hand = nn.functional.linear(x.double(), expected, None if module.bias is None else module.bias.double())
    assert float(((module(x).double() - by_hand).norm() / by_hand.norm()).detach()) < tolerance


def test_reconstruct_in_another_dtype_multiplies_there() -> None:
    for module in (pivoted(dtype=torch.bfloat16), layer().bfloat16()):
        exact = copy.deepcopy(module).double().reconstruct()
        assert torch.equal(module.reconstruct(dtype=torch.float64), exact)
        assert module.reconstruct().dtype == torch.bfloat16


def test_pivoted_state_dict_round_trip() -> None:
    source, target, x = pivoted(), LowRankLinear(63, 40, 11, pivoted=True), torch.randn(4, 63)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.pivot_rows, source.pivot_rows)
    assert torch.equal(source(x), target(x))
    with pytest.raises(RuntimeError, match="pivot_rows"):
        LowRankLinear(63, 40, 11).load_state_dict(source.state_dict())


def test_pivoted_deepcopy_and_dtype_change_keep_the_rows() -> None:
    module = pivoted()
    clone = copy.deepcopy(module).to(torch.bfloat16)
    assert clone.pivot_rows.dtype == torch.int64
    assert clone.pivot_rows.data_ptr() != module.pivot_rows.data_ptr()
    x = torch.randn(3, 63)
    torch.testing.assert_close(clone(x.bfloat16()).float(), module(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("left", "right", "bias", "rows", "message"),
    [
        ((7, 4), (3, 5), None, None, r"left \(7, 4\) has 4 columns, but the rank \(rows of right\) is 3"),
        ((7, 3), (3, 5), (6,), None, r"bias has shape \(6,\), the output has 7 features"),
        ((4, 3), (3, 5), (4,), (0, 1, 2), r"bias has shape \(4,\), the output has 7 features"),
        ((4, 3), (3, 5), None, (0, 1), r"pivot_rows has shape \(2,\); one row per rank is needed, \(3,\)"),
    ],
)
def test_from_factors_refuses_what_does_not_fit(left: Any, right: Any, bias: Any, rows: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        LowRankLinear.from_factors(
            torch.zeros(left), torch.zeros(right), bias and torch.zeros(bias), rows and torch.tensor(rows)
        )


# --- the children are ordinary linear layers -------------------------------------------------------------------------------


class Doubled(nn.Linear):
    """A subclass, as adapters and quantizers use."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Adapter(nn.Module):
    """A child that an adapter library replaced: it has no weight of its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


MODULES = {
    "plain": layer,
    "plain-no-bias": lambda: layer(bias=False),
    "pivoted": pivoted,
    "pivoted-no-bias": lambda: pivoted(False),
}
modules = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def input_of(module: LowRankLinear, tokens: int = 4) -> Tensor:
    return torch.randn(tokens, module.in_features)


def dense(module: LowRankLinear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, module.reconstruct(), module.bias)


@modules
def test_the_path_through_the_children_equals_the_op(make: Any) -> None:
    module = make()
    for tokens in (1, 4, 40):
        x = input_of(module, tokens)
        torch.testing.assert_close(module._forward_by_children(x), module(x), rtol=1e-5, atol=1e-6)


@modules
@pytest.mark.parametrize("child", ["right", "left"])
def test_hooks_on_a_child_see_and_change_its_output(child: str, make: Any) -> None:
    module = make()
    x, seen = input_of(module), []
    expected = dense(module, x)
    handle = getattr(module, child).register_forward_hook(lambda _module, _args, output: seen.append(output.shape))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert seen == [(4, getattr(module, child).out_features)]
    handle.remove()
    handle = module.right.register_forward_pre_hook(lambda _module, args: (args[0] * 0,))
    torch.testing.assert_close(module(x), dense(module, x * 0))
    handle.remove()
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_a_child_that_an_adapter_replaced_is_called() -> None:
    module = layer()
    x = input_of(module)
    base = module.left
    module.left = Adapter(base)
    shrunk = x @ module.right.weight.T
    expected = base(shrunk) + module.left.up(module.left.down(shrunk))
    torch.testing.assert_close(module._forward_by_children(x), expected)
    torch.testing.assert_close(module(x), expected)


@modules
def test_a_child_of_a_subclass_is_called(make: Any) -> None:
    module = make()
    x = input_of(module)
    expected = dense(module, x * 2)
    if module.bias is not None:
        expected = dense(module, x) * 2 - module.bias
    doubled = Doubled(module.in_features, module.rank, bias=False)
    doubled.weight = module.right.weight
    module.right = doubled
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_a_child_with_a_forward_of_its_own_is_called() -> None:
    """As accelerate's offloading puts there."""
    module, calls = layer(), []
    forward = module.right.forward
    module.right.forward = lambda x: calls.append(1) or forward(x)
    module(input_of(module))
    assert calls == [1]


def test_is_plain_knows_what_means_more_than_a_matmul() -> None:
    assert is_plain(nn.Linear(2, 3))
    hooked, pre_hooked, patched, retyped = (nn.Linear(2, 3) for _ in range(4))
    hooked.register_forward_hook(lambda *_: None)
    pre_hooked.register_forward_pre_hook(lambda *_: None)
    patched.forward = lambda x: x
    retyped.weight = type("Quantized", (nn.Parameter,), {})(torch.zeros(3, 2))
    others = [hooked, pre_hooked, patched, retyped, Doubled(2, 3), Linear(2, 3), nn.Identity()]
    assert not any(is_plain(module) for module in others)


@modules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_the_low_dtype(dtype: torch.dtype, make: Any) -> None:
    module = make()
    x = input_of(module)
    with torch.autocast("cpu", dtype):
        y = module(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), dense(module, x), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert module.right.weight.grad.dtype == torch.float32


# --- training --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_training_gradients_are_those_of_two_linear_layers(tokens: int) -> None:
    module = LowRankLinear.from_linear(nn.Linear(63, 40), 11)
    two = nn.Sequential(copy.deepcopy(module.right), copy.deepcopy(module.left))
    x = torch.randn(tokens, 63)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for model, some in zip((module, two), inputs, strict=True):
        model(some).square().sum().backward()
    pairs = [(module.right, two[0], "weight"), (module.left, two[1], "weight"), (module.left, two[1], "bias")]
    for ours, theirs, name in pairs:
        torch.testing.assert_close(getattr(ours, name).grad, getattr(theirs, name).grad)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def test_pivoted_training_gradients_are_those_of_the_children() -> None:
    by_op, by_children = pivoted().double(), pivoted().double()
    x = torch.randn(4, 63, dtype=torch.float64)
    by_op(x).square().sum().backward()
    by_children._forward_by_children(x).square().sum().backward()
    for ours, theirs in zip(by_op.parameters(), by_children.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_frozen_parameters_get_no_gradient() -> None:
    module = layer()
    module.right.weight.requires_grad_(False)
    module(input_of(module)).sum().backward()
    assert module.right.weight.grad is None
    assert module.left.weight.grad is not None


def reduce_gradients_in_parallel() -> None:
    """Run in a process of its own by the test below."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    plain = pivoted()
    parallel, x = nn.parallel.DistributedDataParallel(copy.deepcopy(plain)), torch.randn(4, 63)
    for module in (plain, parallel):
        for _ in range(2):  # the second pass would find parameters that the first left unreduced
            module(x).square().sum().backward()
    for ours, theirs in zip(plain.parameters(), parallel.module.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_distributed_data_parallel_reduces_every_gradient() -> None:
    """The process ends without taking the group down: gloo now and then waits for a thread that waits for Python."""
    code = "import os, sys, test_modules; test_modules.reduce_gradients_in_parallel(); print('reduced', flush=True); os._exit(0)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "reduced"


# --- lorap.nn.linear.Linear --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(), (1,), (16,), (17,), (2, 3), (0,)], ids=str)
def test_linear_is_nn_linear(shape: tuple[int, ...], bias: bool) -> None:
    dense = nn.Linear(63, 40, bias=bias).eval()
    ours, x = Linear.from_linear(dense), torch.randn(*shape, 63)
    assert ours.weight is dense.weight
    assert ours.bias is dense.bias
    assert not ours.training
    assert repr(ours) == repr(dense)
    assert list(ours.state_dict()) == list(dense.state_dict())
    torch.testing.assert_close(ours(x), dense(x), rtol=1e-5, atol=1e-6)


def test_linear_trains_like_nn_linear() -> None:
    dense = nn.Linear(63, 40)
    ours, x = Linear.from_linear(copy.deepcopy(dense)), torch.randn(4, 63)
    for module in (dense, ours):
        module(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, dense.weight.grad)
    torch.testing.assert_close(ours.bias.grad, dense.bias.grad)


def test_linear_leaves_autocast_and_quantized_weights_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, x = Linear(63, 40), torch.randn(4, 63)
    monkeypatch.setattr(ops, "linear", lambda *_: pytest.fail("called the op"))
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    ours.weight = type("Quantized", (nn.Parameter,), {})(ours.weight.data)
    torch.testing.assert_close(ours(x), nn.functional.linear(x, ours.weight.data, ours.bias))
