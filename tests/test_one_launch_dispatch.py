"""Who gets a call on weights of few bits for a handful of tokens: the CUDA kernel, or where it does not take it Triton's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorap.errors import BackendError, ShapeError
from lorap.kernels import cost, packing, reference
from lorap.nn import cuda_limits, dispatch, implementations, native, ops

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

    cuda = SimpleNamespace(quantized_low_rank_linear=SimpleNamespace(default=run("cuda")))
    monkeypatch.setattr(torch.ops, "lorap_cuda", cuda, raising=False)
    monkeypatch.setattr(implementations, "_triton_quantized_low_rank", run("triton in its place"))
    monkeypatch.setitem(implementations.IMPLEMENTATIONS["triton"], OP, run("triton"))
    gpu = SimpleNamespace(shared_memory_per_multiprocessor=106 * 1024, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(cost, "one_launch_pays", lambda *_: True)
    monkeypatch.setattr(dispatch, "choose", lambda *_, without=None: "cuda" if without is None else "triton")
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
