"""The self-check of a GPU runs every form of a kernel that the dispatch can choose for a model. Launches are made and not run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lorap.kernels import low_rank_fused, low_rank_linear, silu_gated_linear
from lorap.nn import graphs, implementations

META = torch.device("meta")
# hidden size; rows of q, k and v; width of the FFN
MODELS = {"llama-7b": (4096, (4096,) * 3, 11008), "llama-3-8b": (4096, (4096, 1024, 1024), 14336)}
TOKENS = (1, 2, 3, 4, 6, 8, 16, 17, 32)
Form = tuple[Any, ...]


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``forms(op, arguments)``: what tells the machine code of the launches apart, but for tile sizes within a kind."""
    found: set[Form] = set()

    def run(launches: list[Any], _x: Tensor) -> None:
        for kernel, _, _, options in launches:
            form = (options["GEMV"], options["BLOCK_M"], options.get("NUM_LAYERS"), options.get("PIVOTED", 0) > 0)
            whole = (options.get("PDL"), options.get("WHOLE"), options.get("PARTS", 1) > 1)
            found.add((kernel.__name__, *form, *whole, options["BLOCK_N"] >= 64))

    def gated(x: Tensor, gate: Tensor, up: Tensor, *_: Any) -> None:
        options = silu_gated_linear._config(len(x), *gate.shape, x.dtype, x.device)
        block_m = 1 if len(x) == 1 else silu_gated_linear.block_m(len(x))
        found.add(("silu", block_m, options["BLOCK_N"] >= 64))

    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(low_rank_linear, "run", run)
    monkeypatch.setattr(low_rank_fused, "run", run)
    monkeypatch.setattr(silu_gated_linear, "silu_gated_linear", gated)

    def of(op: str, arguments: tuple[Any, ...]) -> set[Form]:
        found.clear()
        implementations.implementation(op, "triton")(*arguments)
        return set(found)

    return of


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def model_calls(tokens: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """What models at half and at four fifths of their size run."""
    none = meta(0, dtype=torch.int64)
    for (hidden, rows, width), share in [(model, share) for model in MODELS.values() for share in (0.5, 0.8)]:
        x = meta(tokens, hidden)
        ranks = [int(share * hidden * n / (hidden + n)) // 16 * 16 for n in rows]
        for pivoted in (False, True):
            right = [meta(rank, hidden) for rank in ranks]
            left = [meta(n - rank * pivoted, rank) for n, rank in zip(rows, ranks, strict=True)]
            pivots = [meta(rank, dtype=torch.int64) for rank in ranks] if pivoted else []
            yield "low_rank_linear_group", (x, right, left, [], pivots)
            yield "low_rank_linear", (x, right[0], left[0], None, pivots[0] if pivoted else None)
            mixed = [meta(rows[0], hidden), *right[1:]], [meta(0, rows[0]), *left[1:]]
            all_rows = [meta(rows[0], dtype=torch.int64), *(pivots[1:] or [none, none])]
            yield "low_rank_linear_group", (x, *mixed, [], all_rows)
        small = int(share * width) // 16 * 16
        yield "silu_gated_linear", (x, meta(small, hidden), meta(small, hidden))
        both = [meta(1472, hidden)] * 2, [meta(width, 1472)] * 2
        yield "low_rank_silu_gated_linear", (x, *both, [])


def test_every_form_that_a_model_can_get_is_checked(forms: Any) -> None:
    wanted: dict[str, set[Form]] = {}
    for tokens in TOKENS:
        for op, arguments in model_calls(tokens):
            if graphs.worth(op, arguments[0], arguments[1:]):
                wanted.setdefault(op, set()).update(forms(op, arguments))
    assert set(wanted) == {
        "low_rank_linear",
        "low_rank_linear_group",
        "silu_gated_linear",
        "low_rank_silu_gated_linear",
    }
    for op, found in wanted.items():
        checked: set[Form] = set()
        for tokens, k, pivoted in implementations.examples_of(op):
            checked |= forms(op, implementations.example(op, META, torch.bfloat16, tokens, k, pivoted))
        # A sum over one part is that over several, cut short; the other way round it is not.
        split = {(*form[:-2], False, form[-1]) for form in checked if form[0] != "silu"}
        assert found - checked - split == set()
