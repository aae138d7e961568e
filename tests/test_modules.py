"""``LowRankLinear`` computes x @ (left @ right).T + bias on any batch shape, stored under the documented keys."""

import copy

import pytest
import torch
from torch import nn

from lorap import FactorizationError, LowRankLinear, factorize

torch.manual_seed(0)
KEYS = {"right.weight": (3, 5), "left.weight": (7, 3), "left.bias": (7,), "weight": (1,)}


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
    assert layer().extra_repr() == "in_features=5, out_features=7, rank=3, bias=True"
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
