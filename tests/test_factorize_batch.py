"""``factorize_batch`` gives what ``factorize`` gives one by one, within a memory budget; methods and fallbacks are told."""

import math
from typing import Any

import pytest
import torch
from allocations import peak_bytes
from torch import Tensor

import lorap
from lorap import Factorization, FactorizationError, factorize, factorize_batch
from lorap.algorithms.factorization import eigen, solvers
from lorap.algorithms.factorization.memory import Footprint, working_bytes
from lorap.algorithms.factorization.tasks import Task, grouped, uploaded

METHODS = ["eigh", "mixed", "subspace", "svd"]
CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second_moment(features: int, seed: int = 1) -> Tensor:
    x = normal(2 * features, features, seed=seed) * torch.logspace(-1, 1, features, dtype=torch.float64)
    return x.T @ x


def product(factors: Factorization) -> Tensor:
    return factors.left.double() @ factors.right.double()


def metric_of(kind: str, features: int) -> Tensor | None:
    moment = second_moment(features)
    return {"none": None, "vector": moment.diagonal().clone(), "matrix": moment}[kind]


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("kind", ["none", "vector", "matrix"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "rank"), [((100, 163), 25), ((163, 100), 25), ((63, 63), 1), ((100, 40), 40)])
def test_every_method_finds_the_same_product(
    shape: tuple[int, int], rank: int, method: str, kind: str, two_sided: bool
) -> None:
    w, c = normal(*shape), metric_of(kind, shape[1])
    a = second_moment(shape[0], seed=5) if two_sided else None
    exact = factorize(w, rank, c, output_metric=a, method="eigh")
    found = factorize(w, rank, c, output_metric=a, method=method, tolerance=1e-6)
    assert found.method == method
    assert found.missed == ()
    assert found.error == pytest.approx(exact.error, rel=2e-6, abs=1e-7)
    assert found.excess <= 1e-6
    # The distance is a root of the excess: 1e-6 of error is 1e-3 of the product.
    assert (product(found) - product(exact)).norm() <= 3e-3 * w.norm()
    torch.testing.assert_close(
        found.singular_values[:rank],
        exact.singular_values[:rank],
        rtol=1e-4,
        atol=1e-6 * float(exact.singular_values[0]),
    )
    assert len(found.singular_values) == min(shape) or method == "subspace"


@pytest.mark.parametrize("method", ["mixed", "subspace"])
@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_size_does_not_matter(scale: float, method: str) -> None:
    """The square of 1e-20 is no float32 number."""
    w = normal(100, 140)
    plain, scaled = (factorize(one, 20, method=method) for one in (w, w * scale))
    assert (scaled.method, scaled.missed) == (method, ())
    assert scaled.error == pytest.approx(plain.error, rel=1e-9)
    found, expected = scaled.singular_values / scale, plain.singular_values
    torch.testing.assert_close(found[:20], expected[:20], rtol=1e-9, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)  # those beyond the rank come from float32


def layer() -> tuple[list[Tensor], list[int], list[Tensor | None]]:
    """q, k, v and o of a layer with grouped queries, then another one's."""
    shapes = [(120, 100), (63, 100), (63, 100), (100, 120), (120, 100), (100, 100)]
    weights = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    c = second_moment(100)
    metrics = [c, c, c, second_moment(120, seed=9).diagonal(), c, None]
    return weights, [30, 20, 10, 25, 12, 40], metrics


@pytest.mark.parametrize("budget", [None, 0, 2_500_000, 10**9], ids=["default", "nothing", "some", "plenty"])
@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_a_batch_equals_one_by_one(method: str, budget: int | None) -> None:
    weights, ranks, metrics = layer()
    together = factorize_batch(weights, ranks, metrics, method=method, memory_budget=budget)
    for w, rank, c, found in zip(weights, ranks, metrics, together, strict=True):
        alone = factorize(w, rank, c, method=method)
        assert (found.left.shape, found.right.shape) == ((w.shape[0], rank), (rank, w.shape[1]))
        tolerance = solvers.TOLERANCES[method]
        assert found.error == pytest.approx(alone.error, rel=2 * tolerance)
        assert found.solver == alone.solver
        if budget == 0:
            assert torch.equal(found.left, alone.left)


def tasks_of(shapes: list[tuple[int, int]], method: str = "subspace") -> list[Task]:
    return [Task(i, torch.zeros(shape), 10, None, None, method, CPU, CPU) for i, shape in enumerate(shapes)]


def test_groups_are_of_one_size_and_fit() -> None:
    tasks = tasks_of([(100, 63), (63, 100), (100, 100), (63, 63), (63, 80)])
    assert [[task.index for task in group] for group in grouped(tasks, None)] == [[0], [1], [3], [4], [2]]
    assert [[task.index for task in group] for group in grouped(tasks, 10**9)] == [[0, 1, 3, 4], [2]]
    two = working_bytes([tasks[0].footprint, tasks[1].footprint])
    assert [[task.index for task in group] for group in grouped(tasks, two)] == [[0, 1], [3, 4], [2]]
    assert [task.index for task in grouped(tasks, two - 1)[0]] == [0]


def test_a_shared_metric_travels_once() -> None:
    """From the CPU to the meta device, as to a GPU; one tensor in, one tensor out."""
    c = torch.ones(63)
    meta = torch.device("meta")
    tasks = [Task(i, torch.zeros(63, 63), 5, c, None, "eigh", meta, CPU) for i in range(3)]
    (first, second), (third,) = uploaded([tasks[:2], tasks[2:]])
    assert first.metric is second.metric
    assert first.metric is not third.metric
    assert {task.weight.device.type for task in (first, second, third)} == {"meta"}


@pytest.mark.parametrize("kind", ["none", "vector", "matrix"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "rank"), [((600, 600), 150), ((400, 1200), 100), ((1200, 400), 300)])
def test_memory_is_as_predicted(shape: tuple[int, int], rank: int, method: str, kind: str) -> None:
    w, c = normal(*shape).float(), metric_of(kind, shape[1])
    c = None if c is None else c.float()
    measured = peak_bytes(lambda: factorize(w, rank, c, method=method))
    footprint = Footprint(*shape, rank, method, 0 if c is None else c.ndim, output_metric=False, converted=True)
    assert working_bytes([footprint]) == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("count", [2, 4])
def test_memory_of_a_batch_is_as_predicted(count: int) -> None:
    weights = [normal(500, 700, seed=seed).float() for seed in range(count)]
    budget = working_bytes([Footprint(500, 700, 100, "subspace", 0, False, True)] * count)
    measured = peak_bytes(lambda: factorize_batch(weights, [100] * count, method="subspace", memory_budget=budget))
    assert budget == pytest.approx(measured, rel=0.2)


def test_a_method_that_misses_is_replaced_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    w, c = normal(100, 120), metric_of("vector", 120)
    exact = factorize(w, 20, c, method="eigh")
    monkeypatch.setattr(eigen, "subspace", lambda grams, ranks, tolerance: [None] * len(grams))
    found = factorize(w, 20, c, method="subspace")
    assert (found.method, found.missed) == ("mixed", ("subspace",))
    assert found.solver == "mixed after subspace"
    monkeypatch.setattr(eigen, "mixed", lambda gram, rank, tolerance: None)
    found = factorize(w, 20, c, method="subspace")
    assert (found.method, found.missed) == ("eigh", ("subspace", "mixed"))
    assert found.error == exact.error
    two = factorize_batch([w, w], [20, 10], [c, c], method="subspace", memory_budget=10**9)
    assert [one.solver for one in two] == ["eigh after subspace, mixed"] * 2


def test_what_misses_in_company_is_tried_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def subspace(grams: Tensor, ranks: list[int], tolerance: float) -> list[eigen.Eigen | None]:
        sizes.append(len(grams))
        return [None] * len(grams) if len(grams) > 1 else [eigen.eigh(grams[0], ranks[0])]

    monkeypatch.setattr(eigen, "subspace", subspace)
    found = factorize_batch([normal(63, 70)] * 3, [5, 6, 7], method="subspace", memory_budget=10**9)
    assert sizes == [3, 1, 1, 1]
    assert [(one.method, one.missed) for one in found] == [("subspace", ())] * 3


@pytest.mark.parametrize(
    ("size", "rank", "spectrum", "expected"),
    [
        (576, 172, False, "eigh"),
        (4096, 1024, False, "mixed"),
        (4096, 256, False, "subspace"),
        (4096, 256, True, "mixed"),
        (4096, 1600, False, "mixed"),
        (4096, 1700, False, "eigh"),
        (4096, 1700, True, "eigh"),
        (4096, 4090, False, "eigh"),
    ],
)
def test_auto_on_a_cpu(size: int, rank: int, spectrum: bool, expected: str) -> None:
    assert solvers.choose("auto", CPU, size, rank, spectrum=spectrum) == expected


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), "eigh"), ((8, 9), "subspace")])
def test_auto_on_a_gpu_asks_for_its_float64(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert solvers.choose("auto", torch.device("cuda"), 400, 100, spectrum=False) == expected
    assert solvers.choose("auto", torch.device("cuda"), 4096, 1024, spectrum=False) == "subspace"
    # With a fifth more vectors than wanted the basis is the whole space, and its float64 eigenproblem the whole matrix.
    assert solvers.choose("auto", torch.device("cuda"), 4096, 3600, spectrum=False) == "eigh"


def test_all_are_checked_before_any_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = normal(63, 70)
    bad[5, 5] = math.nan
    monkeypatch.setattr(lorap.algorithms.factorization.batch, "solve", lambda *args, **options: pytest.fail("computed"))
    with pytest.raises(FactorizationError, match=r"layers.1.q_proj contains NaN"):
        factorize_batch([normal(63, 70), bad], [5, 5], names=["layers.0.q_proj", "layers.1.q_proj"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": [5]}, "2 weights were given and 1 ranks"),
        ({"metrics": [None]}, "2 weights were given and 1 metrics"),
        ({"output_metrics": [None] * 3}, "2 weights were given and 3 output_metrics"),
        ({"names": ["one"]}, "2 weights were given and 1 names"),
        ({"method": "gesvd"}, "method 'gesvd' is not known; choose from auto, eigh, mixed, subspace, svd"),
    ],
)
def test_refuses_batches(options: dict[str, Any], words: str) -> None:
    with pytest.raises(FactorizationError, match=words):
        factorize_batch([normal(7, 5)] * 2, **({"ranks": [2, 2]} | options))


def test_nothing_in_nothing_out() -> None:
    assert factorize_batch([], []) == []
