"""Who gets a call on weights of few bits for a handful of tokens: the CUDA kernel, or where it does not take it Triton's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorap.errors import BackendError, ShapeError
from lorap.kernels import cost, packing, reference
from lorap.nn import cuda_limits, dispatch, graphs, implementations, native, ops
from lorap.nn.fused import SharedInput
from lorap.nn.linear import LowRankLinear
from lorap.nn.quantized import QuantizedLinear

OP = "quantized_low_rank_linear"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which kernel each call reached, on a GPU of 132 SMs with 106 KB of shared memory each, where one launch always pays."""
    reached: list[str] = []

    def run(kind: str) -> Any:
        def call(x: Tensor, *rest: Any) -> Tensor:
            reached.append(kind)
            return reference.quantized_low_rank_linear(x, *rest)

        return call

    def run_group(x: Tensor, *lists: Any) -> Tensor:
        *factors, bias, bits, group, pivots = lists
        reached.append("cuda, together")
        some = [[one if one.numel() else None for one in tensors] for tensors in (bias, pivots)]
        layers = zip(*factors, some[0], bits, group, some[1], strict=True)
        return torch.cat([reference.quantized_low_rank_linear(x, *one) for one in layers], dim=-1)

    cuda = SimpleNamespace(
        quantized_low_rank_linear=SimpleNamespace(default=run("cuda")),
        quantized_low_rank_linear_group=SimpleNamespace(default=run_group),
    )
    monkeypatch.setattr(torch.ops, "lorap_cuda", cuda, raising=False)
    monkeypatch.setattr(implementations, "_triton_quantized_low_rank", run("triton in its place"))
    monkeypatch.setitem(implementations.IMPLEMENTATIONS["triton"], OP, run("triton"))
    gpu = SimpleNamespace(shared_memory_per_multiprocessor=106 * 1024, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(cost, "one_launch_pays", lambda *_: True)
    rows = {None: "cuda", "cuda": "triton"}
    monkeypatch.setattr(dispatch, "choose", lambda op, *_, without=None: rows[without] if op == OP else "reference")
    return reached


def layer(
    k: int = 192, rank: int = 96, n: int = 112, bits: int = 4, group: int = 64, *, pivoted: bool = False
) -> tuple[Any, ...]:
    def weight(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        numbers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns))
        return packing.pack(numbers, bits), torch.rand(rows, -(-columns // group)).bfloat16()

    pivots = torch.arange(rank) if pivoted else None
    return *weight(n, rank), *weight(rank, k), None, bits, group, pivots


def call(tokens: int, arguments: tuple[Any, ...], *, k: int = 192) -> Tensor:
    return ops.quantized_low_rank_linear(torch.randn(tokens, k).bfloat16(), *arguments)


def test_a_handful_of_tokens_reaches_one_launch_and_the_rest_triton(launches: list[str]) -> None:
    with torch.no_grad():
        for tokens in (1, 4, 8, 9, 130):
            call(tokens, layer(bits=8))
        assert launches == ["cuda", "cuda", "cuda", "triton", "triton"]
        launches.clear()
        for arguments, k in (
            (layer(), 192),
            (layer(pivoted=True, bits=8), 192),
            (layer(k=176, rank=48, bits=8), 176),  # multiples of 16
            (layer(k=176, rank=96), 176),
            (layer(rank=48), 192),
            (layer(rank=40, bits=8), 192),
            (layer(rank=14336, n=32), 192),  # 2 x 14,336 floats
        ):
            call(2, arguments, k=k)
    assert launches == ["cuda"] * 3 + ["triton"] * 4


def test_tensors_that_loads_of_16_bytes_do_not_fit_reach_triton(launches: list[str]) -> None:
    arguments = layer(bits=8)
    with torch.no_grad():
        for place in range(4):
            tensor = arguments[place]
            moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)
            gaps = torch.cat((tensor, tensor), dim=1)[:, : tensor.shape[1]]
            for other in (moved, gaps):
                call(1, (*arguments[:place], other, *arguments[place + 1 :]))
        call(1, (arguments[0], arguments[1].float(), *arguments[2:]))  # which Triton's call converts
        ops.quantized_low_rank_linear(torch.randn(193).bfloat16()[1:].view(1, 192), *arguments)
        assert launches == ["triton"] * 10
        ops.quantized_low_rank_linear(torch.randn(192, 2).bfloat16().T, *arguments)
    assert launches[10:] == ["cuda"]


def test_a_forced_backend_leaves_to_triton_what_it_cannot_take(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "one_launch_pays", lambda *_: False)
    with torch.no_grad():
        call(1, layer())
        with dispatch.use("cuda"):
            call(1, layer())
            call(1, layer(rank=48))
            call(9, layer())
    assert launches == ["triton", "cuda", "triton in its place", "triton in its place"]


def test_what_does_not_fit_together_is_named(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise RuntimeError("lorap_cuda: right_packed must have other rows")

    monkeypatch.setattr(torch.ops.lorap_cuda.quantized_low_rank_linear, "default", refuse)
    monkeypatch.setitem(implementations.IMPLEMENTATIONS["triton"], OP, refuse)
    packed, scales, *rest = layer()
    with torch.no_grad():
        with pytest.raises(ShapeError, match=r"left_packed: shape \(112, 6\)"):
            call(1, (packed[:, :6].contiguous(), scales, *rest))
        with pytest.raises(ShapeError, match="numbers of 6 bits"):
            call(1, (packed, scales, *rest[:3], 6, *rest[4:]))
        with pytest.raises(ShapeError, match="groups of 0"):
            call(1, (packed, scales, *rest[:4], 0, rest[5]))


def test_the_self_check_runs_the_kernel_in_both_bits_for_each_number_of_tokens(launches: list[str]) -> None:
    seen = set()
    for tokens, k, pivoted in implementations.examples_of(OP):
        launches.clear()
        arguments = implementations.example(OP, torch.device("cpu"), torch.bfloat16, tokens, k, pivoted)
        implementations.implementation(OP, "cuda")(*arguments)
        seen |= {(1 << (tokens - 1).bit_length(), arguments[6])} if launches == ["cuda"] else set()
    assert seen == {(tokens, bits) for tokens in (1, 2, 4, 8) for bits in (4, 8)}
    assert dispatch.self_check(OP, "cuda", torch.device("cpu"), torch.bfloat16) is None


def packed_projection(n: int, rank: int, bits: int, group: int, *, bias: bool, pivoted: bool) -> LowRankLinear:
    left_rows = n - rank if pivoted else n
    rows = torch.arange(rank) * 2 if pivoted else None
    some = torch.randn(n).bfloat16() if bias else None
    dense = LowRankLinear.from_factors(torch.zeros(left_rows, rank), torch.zeros(rank, 192), some, rows)
    for name, shape in (("right", (rank, 192)), ("left", (left_rows, rank))):
        numbers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
        scales = torch.rand(shape[0], -(-shape[1] // group)).mul(2.0**-bits).bfloat16()
        own = getattr(dense, name).bias
        setattr(dense, name, QuantizedLinear.from_numbers(numbers, scales, bits=bits, group_size=group, bias=own))
    return dense


def test_q_k_and_v_of_different_bits_run_in_one_launch(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [
        packed_projection(112, 96, 4, 64, bias=True, pivoted=False),
        packed_projection(80, 32, 8, 32, bias=True, pivoted=True),
        packed_projection(63, 64, 4, 128, bias=False, pivoted=False),
    ]
    x = torch.randn(2, 192).bfloat16()
    with torch.no_grad():
        exact = [layer._forward_by_children(x) for layer in layers]
        SharedInput(layers)
        outputs = [layer(x) for layer in layers]
        assert launches == ["cuda"] * 3  # x is on the CPU
        for found, wanted in zip(outputs, exact, strict=True):
            torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
        launches.clear()
        monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True))
        monkeypatch.setattr(ops, "served", lambda *_: None)
        monkeypatch.setattr(graphs, "left_to_torch", lambda *_: False)
        outputs = [layer(x) for layer in layers]
        assert launches == ["cuda, together"]
        for found, wanted in zip(outputs, exact, strict=True):
            torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
        launches.clear()
        many = torch.randn(9, 192).bfloat16()
        for layer in layers:
            layer(many)
        assert launches == ["triton"] * 3
        launches.clear()
        hook = layers[0].left.register_forward_hook(lambda *_: None)
        for layer in layers:
            layer(x.clone())
        assert launches == ["cuda"] * 2  # the first calls its factors
        hook.remove()
        launches.clear()
        with dispatch.use("reference"):
            layers[0](x.clone())
        assert launches == ["cuda"]  # as the stub of `choose` has it, but by itself


def on_gpu(dtype: torch.dtype = torch.bfloat16) -> Any:
    return SimpleNamespace(is_cpu=False, is_cuda=True, device=SimpleNamespace(type="cuda"), dtype=dtype)


def test_a_kernel_that_fails_its_self_check_leaves_its_calls_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "HAS_CUDA", True)
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    dispatch._best.cache_clear()
    wrong: set[str] = set()
    monkeypatch.setattr(dispatch, "_trusted", lambda _op, backend, *_: backend not in wrong)
    assert [dispatch.choose(OP, on_gpu(), tokens) for tokens in (1, 8, 9, 500)] == ["cuda", "cuda", "triton", "triton"]
    assert dispatch.choose(OP, on_gpu(torch.float32), 1) == "reference"
    assert dispatch.choose("quantized_linear", on_gpu(), 1) == "triton"
    assert dispatch.choose(OP, on_gpu(), 1, without="cuda") == "triton"
    wrong.add("cuda")
    assert dispatch.choose(OP, on_gpu(), 1) == "triton"
    with dispatch.use("cuda"):
        assert dispatch.choose(OP, on_gpu(), 1) == "reference"  # in a capture; elsewhere it has raised
    wrong.add("triton")
    assert dispatch.choose(OP, on_gpu(), 1) == "reference"
    monkeypatch.setattr(native, "HAS_CUDA", False)
    dispatch._best.cache_clear()
    wrong.clear()
    assert dispatch.choose(OP, on_gpu(), 1) == "triton"
    with dispatch.use("cuda"), pytest.raises(BackendError, match="this build has no CUDA part"):
        dispatch.choose(OP, on_gpu(), 1)
    dispatch._best.cache_clear()


def test_the_row_says_who_else_serves_and_that_nothing_was_measured() -> None:
    rows = [rule for rule in dispatch.RULES if rule.device == "cuda" and OP in rule.ops]
    assert [rule.backend for rule in rows] == ["cuda", "triton"]
    assert rows[0].max_tokens == cuda_limits.FMA_TOKENS
    for word in ("modelled, not measured", "32", "16", "shared memory", "next row"):
        assert word in rows[0].reason


def test_the_model_of_one_launch_is_the_bytes_or_the_instructions() -> None:
    """Never faster than a launch and its bytes; one launch for q, k and v saves launches; a wide layer at 8 tokens computes."""

    def seconds(m: int, k: int, ranks: tuple[int, ...], rows: tuple[int, ...], bits: int) -> tuple[float, float]:
        count = len(ranks)
        ours = cost.quantized_one_launch_seconds(m, k, ranks, rows, (bits,) * count, (64,) * count)
        layers = zip(ranks, rows, strict=True)
        return ours, sum(cost.quantized_pair_seconds(m, k, rank, n, bits, 64) for rank, n in layers)

    for bits in (4, 8):
        for m in range(1, 9):
            ours, pair = seconds(m, 4096, (512, 512, 1536), (4096,) * 3, bits)
            nbytes = 2560 * 8192 * bits / 8
            assert cost.LAUNCH + cost.MEMORY_LATENCY + nbytes / cost.MEMORY_BANDWIDTH < ours < pair
            wins = cost.one_launch_pays(m, 4096, (1472,), (11008,), (bits,), (64,))
            one, two = seconds(m, 4096, (1472,), (11008,), bits)
            assert wins == (1.05 * one <= two)
        assert seconds(1, 4096, (1024,), (4096,), bits)[0] < seconds(8, 4096, (1024,), (4096,), bits)[0]
    assert not cost.one_launch_pays(8, 4096, (1472,), (11008,), (4,), (64,))
    assert cost.one_launch_pays(1, 4096, (0,), (4096,), (4,), (64,))  # nothing but a bias
