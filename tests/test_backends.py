"""Which implementation runs: the table, forcing a backend, self-checks, and life without the native library."""

from __future__ import annotations

import contextvars
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lorap
from lorap import BackendError, ShapeError
from lorap.evaluation.environment import describe_environment
from lorap.kernels import cost, reference, trellis
from lorap.nn import dispatch, graphs, implementations, native, ops

ROOT = Path(__file__).parents[1]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CPU_OPS = (*implementations.LINEAR_OPS, *implementations.QUANTIZED_OPS)

needs_cpu_kernels = pytest.mark.skipif(not native.HAS_CPU, reason="lorap/_native.so is not built")


@pytest.fixture(autouse=True)
def fresh_verdicts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "_verdicts", {})
    dispatch._best.cache_clear()
    yield
    dispatch._best.cache_clear()


def some_x(tokens: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(tokens, 8, dtype=dtype)


def python(code: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "LORAP_BACKEND"}
    environment |= {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


# --- choosing --------------------------------------------------------------------------------------------------------------


@needs_cpu_kernels
def test_the_cpu_kernel_searches_trellises() -> None:
    assert dispatch.choose("trellis_search", some_x(), 1) == "cpu"
    assert dispatch.choose("trellis_search", some_x(dtype=torch.float64), 1) == "reference"


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", [*CPU_OPS, "trellis_linear"])
def test_the_cpu_kernels_serve_few_tokens_and_every_number_where_torch_lacks_hardware(
    op: str, dtype: torch.dtype
) -> None:
    fast_in_torch = {
        torch.float32: True,
        torch.bfloat16: native.cpu_isa(torch.bfloat16) == "avx512_bf16",
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    tiles = dtype == torch.bfloat16 and fast_in_torch[dtype] and torch.cpu._is_amx_tile_supported()
    most = 8 if tiles else 32
    if op not in implementations.LINEAR_OPS:
        place = int(op == "trellis_linear")
        single = (128, 128) if native.quantized_cpu_isa().startswith("avx512") else (12, 12)
        most = {torch.float32: single, torch.bfloat16: (96, 160), torch.float16: (32, 32)}[dtype][place]
        most = (16, 32)[place] if tiles else most
    chosen = [dispatch.choose(op, some_x(tokens, dtype), tokens) for tokens in (0, most, most + 1, 500)]
    many = "reference" if fast_in_torch[dtype] else "cpu"
    assert chosen == ["reference", "cpu", many, many]


def test_other_dtypes_and_other_ops_run_the_reference() -> None:
    assert dispatch.choose("linear", some_x(dtype=torch.float64), 1) == "reference"
    assert dispatch.choose("channel_sq_norm", some_x(), 1) == "reference"
    assert dispatch.choose("second_moment", some_x(), 1) == "reference"


@needs_cpu_kernels
def test_the_forced_cpu_kernels_serve_any_number_of_tokens() -> None:
    with dispatch.use("cpu"):
        assert dispatch.choose("linear", some_x(500), 500) == "cpu"
        assert dispatch.choose("linear", some_x(0), 0) == "reference"


@needs_cpu_kernels
def test_what_is_chosen_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for name in ("cpu", "reference"):
        monkeypatch.setitem(
            implementations.IMPLEMENTATIONS[name], "linear", lambda x, *_, name=name: ran.append(name) or x
        )
    weight = torch.zeros(4, 8)
    ops.linear(some_x(1), weight)
    ops.linear(some_x(33), weight)
    torch.ops.lorap.linear(some_x(32), weight)
    with dispatch.use("reference"):
        ops.linear(some_x(1), weight)
    assert ran == ["cpu", "reference", "cpu", "reference"]


@needs_cpu_kernels
def test_served_says_where_a_kernel_of_ours_runs() -> None:
    assert ops.served("linear", torch.zeros(2, 16, 4)) is not None
    assert ops.served("linear", torch.zeros(2, 17, 4)) is None
    assert ops.served("linear", torch.zeros(2, 0, 4)) is None
    assert ops.served("linear", torch.zeros(())) is None


def test_every_row_has_a_reason_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MISSING", "not built; do this")
    rows = describe_environment()["kernels"]
    assert [(row["backend"], row["ops"]) for row in rows] == [(rule.backend, list(rule.ops)) for rule in dispatch.RULES]
    assert all(row["reason"] for row in rows)
    assert {row["missing"] for row in rows if row["backend"] == "cpu"} == {"not built; do this"}


def test_current_is_what_is_forced() -> None:
    with dispatch.use("reference"):
        assert dispatch.current() == "reference"
        with dispatch.use("auto"):
            assert dispatch.current() == "auto"


# --- forcing ---------------------------------------------------------------------------------------------------------------


def test_use_refuses_an_unknown_name() -> None:
    with (
        pytest.raises(BackendError, match="backend 'fpga' is none of auto, reference, cpu, triton, cuda"),
        dispatch.use("fpga"),
    ):
        pass


def test_use_nests_and_ends_with_its_block() -> None:
    before = dispatch.choose("linear", some_x(), 1)
    with dispatch.use("reference"):
        with dispatch.use("auto"):
            assert dispatch.choose("linear", some_x(), 1) == before
        assert dispatch.choose("linear", some_x(), 1) == "reference"
        with pytest.raises(ZeroDivisionError), dispatch.use("auto"):
            _ = 1 / 0
        assert dispatch.choose("linear", some_x(), 1) == "reference"
    assert dispatch.choose("linear", some_x(), 1) == before


@needs_cpu_kernels
def test_use_holds_in_its_own_thread_only() -> None:
    seen = {}

    def look(name: str) -> None:
        seen[name] = dispatch.choose("linear", some_x(), 1)

    with dispatch.use("reference"):
        copied = contextvars.copy_context()
        threads = [
            threading.Thread(target=look, args=["plain"]),
            threading.Thread(target=copied.run, args=[look, "with the context"]),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == {"plain": "cpu", "with the context": "reference"}


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_gpu_backend_refuses_cpu_tensors(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(native, "HAS_CUDA", True)
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    with (
        dispatch.use(backend),
        pytest.raises(
            BackendError, match=f"LORAP_BACKEND={backend} cannot run linear on cpu in torch.float32; use auto"
        ),
    ):
        ops.linear(some_x(), torch.zeros(4, 8))


def test_a_forced_backend_that_is_missing_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "HAS_CUDA", False)
    monkeypatch.setattr(native, "MISSING", None)
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    with dispatch.use("triton"), pytest.raises(BackendError, match="LORAP_BACKEND=triton: triton is not installed"):
        dispatch.choose("linear", some_x(), 1)
    with dispatch.use("cuda"), pytest.raises(BackendError, match="LORAP_BACKEND=cuda: this build has no CUDA part"):
        dispatch.choose("linear", some_x(), 1)
    monkeypatch.setattr(native, "MISSING", "not built; do this")
    with dispatch.use("cpu"), pytest.raises(BackendError, match="LORAP_BACKEND=cpu: not built; do this"):
        dispatch.choose("linear", some_x(), 1)


@needs_cpu_kernels
def test_the_forced_cpu_kernels_refuse_what_they_cannot_do() -> None:
    with dispatch.use("cpu"):
        with pytest.raises(BackendError, match=r"cannot run second_moment on cpu in torch.float32; use auto"):
            ops.second_moment(some_x())
        with pytest.raises(BackendError, match=r"cannot run linear on cpu in torch.float64; use auto"):
            ops.linear(some_x(dtype=torch.float64), torch.zeros(4, 8, dtype=torch.float64))


def test_environment_forces_a_backend(tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from lorap.nn import dispatch\n"
        "x = torch.zeros(1, 8)\n"
        "print(dispatch.choose('linear', x, 1))\n"
        "with dispatch.use('auto'): print(dispatch.choose('linear', x, 1))\n"
    )
    run = python(code, tmp_path, LORAP_BACKEND="reference")
    assert run.stdout.split() == ["reference", "cpu" if native.HAS_CPU else "reference"], run.stderr


def test_an_unknown_backend_in_the_environment_stops_what_needs_kernels(tmp_path: Path) -> None:
    run = python("import lorap; lorap.LowRankLinear", tmp_path, LORAP_BACKEND="fpga")
    assert run.returncode != 0
    assert "backend 'fpga' is none of auto, reference, cpu, triton, cuda (LORAP_BACKEND)" in run.stderr


# --- self-checks -----------------------------------------------------------------------------------------------------------


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", [*CPU_OPS, "trellis_linear"])
def test_the_cpu_kernels_pass_their_self_check(op: str, dtype: torch.dtype) -> None:
    assert dispatch.self_check(op, "cpu", torch.device("cpu"), dtype) is None


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", list(ops.SCHEMAS))
def test_the_reference_passes_its_self_check(op: str, dtype: torch.dtype) -> None:
    assert dispatch.self_check(op, "reference", torch.device("cpu"), dtype) is None


def broken(monkeypatch: pytest.MonkeyPatch, implementation: Any) -> str:
    monkeypatch.setitem(implementations.IMPLEMENTATIONS["triton"], "linear", implementation)
    problem = dispatch.self_check("linear", "triton", torch.device("cpu"), torch.float32)
    assert problem is not None
    return problem


def test_self_check_names_the_error_of_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = broken(monkeypatch, lambda x, weight: x @ weight.T * 1.25)
    assert problem == "relative error 0.25 with 3 tokens of 176 features, more than 1e-05"


def test_self_check_tries_one_token_and_a_long_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernels serve by other code than several tokens."""
    problem = broken(monkeypatch, lambda x, weight: x @ weight.T * (1.5 if len(x) == 1 else 1))
    assert problem.startswith("relative error 0.5 with 1 tokens of 176 features")
    problem = broken(monkeypatch, lambda x, weight: x[:, :8000] @ weight[:, :8000].T)
    assert problem.endswith("with 1 tokens of 8208 features, more than 1e-05")


def test_self_check_of_a_form_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    run = implementations.implementation("low_rank_linear", "reference")
    monkeypatch.setitem(
        implementations.IMPLEMENTATIONS["triton"],
        "low_rank_linear",
        lambda x, *rest: seen.append(len(x)) or run(x, *rest),
    )
    for tokens, expected in ((1, {1}), (5, {2, 3, 7, 11, 13}), (30, {20}), (None, {1, 2, 3, 7, 11, 13, 20})):
        seen.clear()
        assert (
            dispatch.self_check("low_rank_linear", "triton", torch.device("cpu"), torch.float32, tokens=tokens) is None
        )
        assert set(seen) == expected


def test_self_check_refuses_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = broken(monkeypatch, lambda x, weight: (x @ weight.T).index_fill(0, torch.tensor(0), torch.nan))
    assert problem.startswith("relative error nan")


def test_self_check_names_what_a_kernel_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no such instruction")

    assert broken(monkeypatch, fail) == "ValueError: no such instruction"


@pytest.fixture
def gpu_x(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands for a tensor on a GPU, of which ``choose`` reads no more than this."""
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with graphs.warming():
        yield SimpleNamespace(is_cpu=False, device=torch.device("cuda", 0), dtype=torch.bfloat16)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """``checks["problem"]`` is what self_check answers, ``checks["calls"]`` what it was asked."""
    state: dict[str, Any] = {"problem": None, "calls": []}

    def self_check(*key: Any, tokens: int) -> str | None:
        state["calls"].append((*key, tokens))
        return state["problem"]

    monkeypatch.setattr(dispatch, "self_check", self_check)
    return state


def test_a_gpu_kernel_is_checked_once_per_device_and_dtype(gpu_x: Any, checks: dict[str, Any]) -> None:
    for _ in range(3):
        assert dispatch.choose("low_rank_linear", gpu_x, 1) == "triton"
    assert checks["calls"] == [("low_rank_linear", "triton", gpu_x.device, torch.bfloat16, 1)]
    assert [dispatch.choose("low_rank_linear", gpu_x, tokens) for tokens in (2, 16, 9, 17, 32)] == ["triton"] * 5
    assert [call[-1] for call in checks["calls"]] == [1, 2, 17]  # each form of the kernels by itself
    gpu_x.device = torch.device("cuda", 1)
    assert dispatch.choose("low_rank_linear", gpu_x, 1) == "triton"
    assert len(checks["calls"]) == 4


def test_a_gpu_kernel_that_fails_is_never_used_and_warned_of_once(gpu_x: Any, checks: dict[str, Any]) -> None:
    checks["problem"] = "relative error 2"
    message = (
        r"lorap's triton kernel low_rank_linear is not used on cuda:0 in torch.bfloat16: relative error 2; torch does"
    )
    with pytest.warns(RuntimeWarning, match=message):
        assert dispatch.choose("low_rank_linear", gpu_x, 1) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("low_rank_linear", gpu_x, 1) == "reference"
    assert len(checks["calls"]) == 1


def test_a_forced_gpu_kernel_that_fails_raises(gpu_x: Any, checks: dict[str, Any]) -> None:
    checks["problem"] = "relative error 2"
    with (
        dispatch.use("triton"),
        pytest.raises(BackendError, match=r"kernel low_rank_linear is not used.*relative error 2"),
    ):
        dispatch.choose("low_rank_linear", gpu_x, 1)


@pytest.mark.filterwarnings("ignore:lorap's triton kernel")
def test_a_forced_gpu_kernel_that_failed_before_raises_again(gpu_x: Any, checks: dict[str, Any]) -> None:
    checks["problem"] = "relative error 2"
    assert dispatch.choose("low_rank_linear", gpu_x, 1) == "reference"
    with dispatch.use("triton"), pytest.raises(BackendError):
        dispatch.choose("low_rank_linear", gpu_x, 1)


def test_no_gpu_kernel_is_checked_while_a_graph_is_captured(
    gpu_x: Any, checks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert dispatch.choose("low_rank_linear", gpu_x, 1) == "reference"
    assert not checks["calls"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert dispatch.choose("low_rank_linear", gpu_x, 1) == "triton"


def test_a_call_of_a_gpu_kernel_is_computed_alike_each_time_and_compiled_only_when_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eager calls are torch's from the first on; a capture takes a kernel that was warmed, for tensors aligned as then."""
    monkeypatch.setattr(graphs, "_warm", set())
    x, weight, odd = torch.zeros(1, 8), torch.zeros(4, 8), torch.zeros(9)[1:].view(1, 8)
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    monkeypatch.setattr(graphs, "worth", lambda op, x, rest: rest[0].shape[0] != 7)

    def left(x: torch.Tensor, weight: torch.Tensor, op: str = "low_rank_linear") -> bool:
        return graphs.left_to_torch(op, x, weight, [weight], None)

    assert [left(x, weight) for _ in range(3)] == [True] * 3
    assert not left(x, weight, op="channel_sq_norm")
    capturing = True
    assert left(x, weight)  # nothing is compiled inside a capture
    capturing = False
    with graphs.warming():
        assert not left(x, weight)
        assert left(odd, weight)
        assert left(x, torch.zeros(7, 8))  # torch is as fast
    assert [left(x, weight) for _ in range(2)] == [True] * 2  # eager calls stay as they were
    capturing = True
    assert not left(x, weight)
    assert not left(x.view(1, 1, 8), weight)
    assert left(x, torch.zeros(5, 8))
    assert left(x, torch.zeros(7, 8))
    assert left(torch.zeros(2, 8), weight)
    assert left(odd, weight)
    assert left(torch.zeros(2, 16)[:, ::2], weight)


def test_outside_a_graph_nothing_is_compiled_or_checked(
    checks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who never capture a graph do not wait for kernels that they will not use; activation norms always pay."""
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x: Any = SimpleNamespace(is_cpu=False, device=torch.device("cuda", 0), dtype=torch.bfloat16)
    assert [dispatch.choose(op, x, 1) for op in graphs.OPS] == ["reference"] * 4
    assert not checks["calls"]
    assert dispatch.choose("channel_sq_norm", x, 1) == "triton"
    with dispatch.use("triton"):
        assert dispatch.choose("low_rank_linear", x, 1) == "triton"


@pytest.mark.parametrize("op", implementations.FEW_BITS_OPS)
def test_weights_of_few_bits_get_their_gpu_kernel_outside_of_graphs_too(
    op: str, checks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x: Any = SimpleNamespace(is_cpu=False, device=torch.device("cuda", 0), dtype=torch.bfloat16)
    tokens = (1, 5, 16, 17, 128, 129, 4000)
    assert [dispatch.choose(op, x, count, without="cuda") for count in tokens] == ["triton"] * len(tokens)
    assert [call[-1] for call in checks["calls"]] == [1, 5, 17, 129]  # each form of the kernels by itself
    x.dtype = torch.float32
    assert dispatch.choose(op, x, 1) == "reference"
    with dispatch.use("triton"):
        assert dispatch.choose(op, x, 1) == "triton"


def test_a_capture_takes_kernels_on_few_bits_that_ran_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_warm", set())
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    x, *weight = implementations.example("quantized_linear", torch.device("cpu"), torch.float32)

    def left(x: torch.Tensor, *rest: Any) -> bool:
        return graphs.left_to_torch("quantized_linear", x, *rest)

    assert left(x, *weight)
    capturing = False
    assert not left(x, *weight)
    assert not left(torch.zeros(7, 177)[:, 1:], *weight)  # a plain call runs the kernel on whatever it gets
    capturing = True
    assert not left(x, *weight)
    assert left(torch.zeros(7, 177)[:, 1:], *weight)  # rows that begin elsewhere are another machine code
    assert left(x, *weight[:-1], 64)
    assert left(x[:2], *weight)


def test_a_kernel_that_cannot_be_prepared_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_warm", set())
    monkeypatch.setattr(graphs, "worth", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x, weight = torch.zeros(1, 8), torch.zeros(4, 8)
    with graphs.warming():
        graphs.left_to_torch("silu_gated_linear", x, weight, weight)

    def fail() -> None:
        with graphs.warming():
            graphs.left_to_torch("low_rank_linear", x, weight, weight)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [key[0] for key in graphs._warm] == ["silu_gated_linear"]


@pytest.mark.parametrize(
    ("op", "tokens", "ranks", "rows", "pivots", "worth"),
    [
        ("low_rank_linear", 1, (512,), (4096,), None, True),
        ("low_rank_linear", 1, (1632,), (4096,), None, True),
        ("low_rank_linear", 1, (1632,), (4096 - 1632,), (1632,), True),
        ("low_rank_linear", 1, (512,), (1024,), None, False),  # k of LLaMA-3-8B: two launches for so few bytes
        ("low_rank_linear", 16, (1024,), (4096,), None, False),
        ("low_rank_linear", 32, (1632,), (4096,), None, False),
        ("low_rank_linear_group", 1, (512, 4096, 1536), (4096, 0, 4096), (0, 4096, 0), True),
        ("silu_gated_linear", 1, (), (5504, 5504), None, True),
    ],
)
def test_a_shape_goes_to_a_kernel_where_the_model_has_it_faster(
    op: str, tokens: int, ranks: tuple[int, ...], rows: tuple[int, ...], pivots: Any, worth: bool
) -> None:
    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    right, left = [meta(rank, 4096) for rank in ranks], [meta(*pair) for pair in zip(rows, ranks, strict=False)]
    chosen = [torch.empty(count, dtype=torch.int64, device="meta") for count in pivots or ()]
    if op == "low_rank_linear":
        rest: tuple[Any, ...] = (right[0], left[0], None, chosen[0] if chosen else None)
    elif op == "low_rank_linear_group":
        rest = (right, left, [], chosen)
    else:
        rest = (meta(rows[0], 4096), meta(rows[1], 4096))
    assert graphs.worth(op, meta(tokens, 4096), rest) == worth


def test_unaligned_x_does_not_reach_the_cuda_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loads of 16 bytes would fault; a forced backend must not stop a model either."""
    monkeypatch.setattr(torch.ops, "lorap_cuda", SimpleNamespace(), raising=False)
    right, left = torch.randn(8, 16).bfloat16(), torch.randn(24, 8).bfloat16()
    x = torch.randn(17).bfloat16()[1:].view(1, 16)
    y = implementations.implementation("low_rank_linear", "cuda")(x, right, left)
    torch.testing.assert_close(y, x @ right.T @ left.T)


@pytest.fixture
def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """(tokens, layers, pivoted) of the calls that reach the CUDA kernels, on a GPU whose SMs have 106 KB of shared memory."""
    calls: list[tuple[int, int, bool]] = []

    def run(x: torch.Tensor, right: torch.Tensor, left: torch.Tensor, bias: Any, rows: Any) -> torch.Tensor:
        calls.append((implementations.tokens_of(x), 1, rows is not None))
        return reference.low_rank_linear(x, right, left, bias, rows)

    def run_group(x: torch.Tensor, right: Any, left: Any, bias: Any, rows: Any) -> torch.Tensor:
        calls.append((implementations.tokens_of(x), len(right), bool(rows)))
        return reference.low_rank_linear_group(x, right, left, bias, rows)

    op = SimpleNamespace(
        low_rank_linear=SimpleNamespace(default=run), low_rank_linear_group=SimpleNamespace(default=run_group)
    )
    monkeypatch.setattr(torch.ops, "lorap_cuda", op, raising=False)
    gpu = SimpleNamespace(shared_memory_per_multiprocessor=106 * 1024, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    return calls


def test_more_tokens_than_8_reach_the_cuda_kernel_where_its_shared_memory_is(cuda_kernels: list[Any]) -> None:
    run = implementations.implementation("low_rank_linear", "cuda")
    for tokens in (8, 9, 16, 17):
        layer = torch.zeros(tokens, 64), torch.zeros(136, 64), torch.zeros(24, 136)
        run(*layer)
        run(*layer, None, torch.arange(136))  # takes 8 bytes a pivot, which is too much from 9 tokens on
    assert cuda_kernels == [(8, 1, False), (8, 1, True), (9, 1, False), (16, 1, False)]


def test_q_k_and_v_reach_one_launch_where_it_can_serve_them(cuda_kernels: list[Any]) -> None:
    """A member of nothing but pivots keeps neither these nor what it shrinks to; what does not fit goes to torch."""
    run = implementations.implementation("low_rank_linear_group", "cuda")
    gap, no_rows = torch.zeros(0, 800), torch.empty(0, dtype=torch.int64)

    def call(tokens: int, *, ranks: tuple[int, ...] = (136, 24, 8), dense: bool = False, pivoted: bool = False) -> None:
        x, right = torch.randn(tokens, 64), [torch.randn(rank, 64) for rank in ranks]
        left = [torch.randn(40, rank) for rank in ranks]
        rows = [torch.arange(rank) for rank in ranks] if pivoted else []
        if dense:
            right, left = [torch.randn(800, 64), *right[1:]], [gap, *left[1:]]
            rows = [torch.arange(800), *(rows or [no_rows] * 3)[1:]]
        exact = reference.low_rank_linear_group(x, right, left, [], rows)
        torch.testing.assert_close(run(x, right, left, [], rows), exact)

    for tokens in (1, 8, 16, 17):
        call(tokens)
    call(16, dense=True)
    assert cuda_kernels == [(1, 3, False), (8, 3, False), (16, 3, False), (16, 3, True)]
    cuda_kernels.clear()
    call(16, pivoted=True)  # 168 pivots
    call(8, ranks=(3200, 104, 8))  # 8 x 3312 floats are 103.5 KB
    call(8, ranks=(3200, 200, 8))  # 106.5
    call(8, ranks=(136, 20, 8))
    call(8, ranks=(8, 8, 8, 8))
    assert cuda_kernels == [(8, 3, False)]


def test_a_group_that_does_not_fit_together_is_named(cuda_kernels: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "choose", lambda *_: "cuda")
    x, right, left = torch.zeros(2, 64), torch.zeros(8, 64), torch.zeros(40, 8)
    with pytest.raises(ShapeError, match="2 right, 1 left"):
        ops.low_rank_linear_group(x, [right] * 2, [left])
    assert not cuda_kernels


@pytest.mark.parametrize("op", ["low_rank_linear", "low_rank_linear_group"])
def test_the_self_check_runs_the_cuda_kernel_for_many_tokens(op: str, cuda_kernels: list[Any]) -> None:
    assert dispatch.self_check(op, "cuda", torch.device("cpu"), torch.bfloat16, tokens=16) is None
    found = {(tokens > 8, pivoted) for tokens, _, pivoted in cuda_kernels}
    assert found == {(many, pivoted) for many in (False, True) for pivoted in (False, True)}
    assert {layers for _, layers, _ in cuda_kernels} == {3 if op.endswith("group") else 1}


def test_a_gpu_rule_for_a_modelled_kernel_asks_the_model() -> None:
    """No row gives calls to kernels that were never timed, unless the model has them 5 % faster than torch in both ways."""
    unmeasured = [rule for rule in dispatch.RULES if rule.device == "cuda" and rule.ops != ("channel_sq_norm",)]
    assert unmeasured
    for rule in unmeasured:
        one_launch = rule.ops == ("quantized_low_rank_linear",)
        assert rule.backend == ("cuda" if one_launch else "triton")
        assert set(rule.ops) <= set(graphs.OPS) or rule.ops == implementations.FEW_BITS_OPS or one_launch
        assert "modelled, not measured" in rule.reason
    for name, (k, ranks, rows, pivots) in MODELLED_GROUPS.items():
        outputs = [count + more for count, more in zip(rows, pivots, strict=True)]
        for m in range(1, 33):
            two = cost.two_gemms_seconds(m, k, ranks, rows) + cost.LAUNCH * sum(map(bool, pivots))
            least = min(two, cost.dense_seconds(m, k, outputs))
            gains = 1.05 * cost.pair_seconds(m, k, ranks, rows) <= least
            assert cost.worth("low_rank_linear_group", m, k, ranks, rows, pivots) == gains, (name, m)


def test_weights_of_few_bits_are_modelled_faster_than_torch_for_any_number_of_tokens() -> None:
    """Which is why their kernels need no graph: torch writes the matrix in 16 bits first, and moves it several times."""
    for k, n in ((4096, 4096), (4096, 1024), (11008, 4096), (576, 576)):
        for bits in (4, 8):
            for m in (1, 2, 16, 17, 64, 65, 128, 129, 2048):
                fused = m <= cost.FUSED_TOKENS
                ours = cost.quantized_seconds(m, k, n, bits, 64) if fused else cost.dequantized_seconds(m, k, n, bits)
                assert 1.05 * ours <= cost.torch_quantized_seconds(m, k, n, bits), (k, n, bits, m)
    for bits in (4, 8):  # where one way ends and the other begins
        fused = [cost.quantized_seconds(m, 4096, 4096, bits, 64) for m in (64, cost.FUSED_TOKENS, 512)]
        written = [cost.dequantized_seconds(m, 4096, 4096, bits) for m in (64, cost.FUSED_TOKENS, 512)]
        assert [one < other for one, other in zip(fused, written, strict=True)] == [True, True, False]
    assert cost.quantized_seconds(1, 4096, 4096, 4, 64) < cost.dense_seconds(1, 4096, [4096]) / 2
    for k, n in ((4096, 4096), (4096, 1024), (11008, 4096), (576, 576)):  # on a trellis
        for bits, m in ((bits, m) for bits in trellis.BITS for m in (1, 16, 17, 64, 65, 128, 129, 2048)):
            fused = m <= cost.FUSED_TOKENS
            ours = cost.trellis_seconds(m, k, n, bits, 256) if fused else cost.dequantized_seconds(m, k, n, bits)
            assert 1.05 * ours <= cost.torch_trellis_seconds(m, k, n), (k, n, bits, m)
    for bits in trellis.BITS:
        fused = [cost.trellis_seconds(m, 4096, 4096, bits, 256) for m in (1, cost.FUSED_TOKENS)]
        written = [cost.dequantized_seconds(m, 4096, 4096, bits) for m in (1, cost.FUSED_TOKENS)]
        assert fused < written


MODELLED_GROUPS = {
    "wide": (4096, (512, 512, 1536), (4096, 4096, 4096), (0, 0, 0)),
    "wide, pivoted": (4096, (512, 512, 1536), (3584, 3584, 2560), (512, 512, 1536)),
    "few heads": (4096, (1024, 512, 768), (4096, 1024, 1024), (0, 0, 0)),
    "one": (4096, (512,), (1024,), (0,)),
}


# --- without the native library --------------------------------------------------------------------------------------------


def test_a_damaged_library_is_a_reason_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "_native.so"
    damaged.write_bytes(b"not a library")
    monkeypatch.setattr(native, "LIBRARY", damaged)
    reason = native._load()
    assert reason is not None
    assert reason.startswith(f"_native.so cannot be opened by torch {torch.__version__}: ")


def test_a_library_of_an_older_version_is_a_reason_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "LIBRARY", Path(__file__))
    monkeypatch.setattr(torch.ops, "load_library", lambda _path: None)
    monkeypatch.setattr(torch.ops, "lorap_cpu", SimpleNamespace(linear=None))
    reason = native._load()
    assert reason is not None
    assert "is older than this code; build it again" in reason


def test_cpu_isa_names_what_this_processor_runs() -> None:
    known = {"scalar", "avx2", "avx512", "avx512_bf16"} if native.HAS_CPU else {"none"}
    assert {native.cpu_isa(dtype) for dtype in FLOATS} <= known
    assert native.quantized_cpu_isa() in known - {"avx512_bf16"} | ({"avx512_vnni"} if native.HAS_CPU else set())


WITHOUT_LIBRARY = """
import torch, lorap
from lorap.nn import dispatch, graphs, implementations, native, ops
assert lorap.__file__.startswith(sys.argv[1]), lorap.__file__
assert native.MISSING.startswith("not built; install with"), native.MISSING
assert not native.HAS_CPU and not native.HAS_CUDA and native.cpu_isa(torch.float32) == "none"
x, right, left = torch.randn(2, 8), torch.randn(3, 8), torch.randn(5, 3)
torch.testing.assert_close(ops.low_rank_linear(x, right, left), x @ right.T @ left.T)
for op in ops.SCHEMAS:
    arguments = implementations.example(op, x.device, x.dtype)
    assert dispatch.choose(op, x, 2) == "reference"
    getattr(ops, op)(*arguments)
layer = lorap.LowRankLinear.from_factors(left, right)
torch.testing.assert_close(layer(x), x @ right.T @ left.T)
layer(x).sum().backward()
try:
    with dispatch.use("cpu"):
        ops.linear(x, right)
except lorap.BackendError as error:
    print(error)
"""


def test_without_the_library_everything_runs_through_torch(tmp_path: Path) -> None:
    package, ignore = tmp_path / "lorap", shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(lorap.__file__).parent, package, ignore=ignore)
    shutil.copytree(ROOT / "kernels/triton", package / "kernels", ignore=ignore, dirs_exist_ok=True)
    code = WITHOUT_LIBRARY.replace("sys.argv[1]", repr(str(tmp_path)))
    run = python(code, tmp_path, PYTHONPATH=str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("LORAP_BACKEND=cpu: not built; install with pip install --no-build-isolation")
