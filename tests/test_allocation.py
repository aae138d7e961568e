"""Ranks and widths equal the published integer arithmetic, and never exceed the parameter budget.

The published formulas are written out here a second time; for grouped-query attention the budget is the reference.
"""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorap.compression.allocation import attention_ranks, break_even_rank, plan_layer, pruned_positions
from lorap.config import CompressionConfig
from lorap.errors import ConfigError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SMOLLM2 = {
    "q_proj": (576, 576),
    "k_proj": (192, 576),
    "v_proj": (192, 576),
    "o_proj": (576, 576),
    "gate_proj": (1536, 576),
    "up_proj": (1536, 576),
    "down_proj": (576, 1536),
}


def layer_shapes(hidden: int, queries: int, keys: int, inner: int = 100) -> dict[str, tuple[int, int]]:
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def published(h: int, sparsity: float, a: int) -> dict[str, int]:
    kept = 1 - sparsity
    k_att = int(kept * h / 2)
    k_max = int(k_att * 2 * a / (1 + a))
    if k_max >= h / 2:
        k_min = int(kept * h) - int(h / 2)
        return {"q_proj": k_min, "k_proj": k_min}
    k_min = int(k_att * 2 / (1 + a))
    return {"q_proj": k_min, "k_proj": k_min, "v_proj": k_max, "o_proj": k_max}


@pytest.mark.parametrize("a", [1, 2, 3, 4])
@pytest.mark.parametrize("sparsity", [0.2, 0.3, 0.5])
@pytest.mark.parametrize("h", [64, 100, 576, 768, 1000, 2048, 4096, 5120, 8192])
def test_square_attention_is_the_published_arithmetic(h: int, sparsity: float, a: int) -> None:
    shapes = layer_shapes(h, h, h)
    expected = published(h, sparsity, a)
    assert attention_ranks({role: shapes[role] for role in ATTENTION}, 1 - sparsity, a) == expected
    config = CompressionConfig(recipe="lorap", sparsity=sparsity, vo_to_qk_ratio=a, sublayers=("self_attn",))
    plan = plan_layer(shapes, config)
    assert plan.ranks == {role: rank for role, rank in expected.items() if rank < h / 2}
    assert plan.intermediate_size == 100


@pytest.mark.parametrize(
    ("shapes", "sparsity", "ranks", "width"),
    [
        (layer_shapes(4096, 4096, 4096, 11008), 0.2, {"q_proj": 1228, "k_proj": 1228}, 8807),
        (
            layer_shapes(4096, 4096, 4096, 11008),
            0.5,
            {"q_proj": 512, "k_proj": 512, "v_proj": 1536, "o_proj": 1536},
            5504,
        ),
        (SMOLLM2, 0.2, {"q_proj": 172, "k_proj": 86}, 1229),
        (SMOLLM2, 0.5, {"q_proj": 72, "k_proj": 36, "v_proj": 108, "o_proj": 216}, 768),
    ],
    ids=["llama-7b-0.2", "llama-7b-0.5", "smollm2-0.2", "smollm2-0.5"],
)
def test_known_models(shapes: dict, sparsity: float, ranks: dict[str, int], width: int) -> None:
    plan = plan_layer(shapes, CompressionConfig(recipe="lorap", sparsity=sparsity))
    assert plan.ranks == ranks
    assert plan.intermediate_size == width


def test_ratio_below_one_leaves_qk_dense() -> None:
    plan = plan_layer(
        layer_shapes(1000, 1000, 1000), CompressionConfig(recipe="lorap", sparsity=0.2, vo_to_qk_ratio=1 / 3)
    )
    assert plan.ranks == {"v_proj": 300, "o_proj": 300}


def test_factorized_mlp() -> None:
    config = CompressionConfig(recipe="lorap", sparsity=0.5, sublayers=("mlp",), mlp_method="factorize")
    plan = plan_layer(SMOLLM2, config)
    rank = int(0.5 * 1536 * 576 / (1536 + 576))
    assert rank == 209
    assert plan.ranks == {"gate_proj": rank, "up_proj": rank, "down_proj": rank}
    assert plan.intermediate_size == 1536


@pytest.mark.parametrize(
    ("width", "sparsity", "kept", "expected"),
    [
        (1, 0.2, 0.01, (0, 0)),
        (63, 0.2, 0.01, (0, 13)),
        (100, 0.2, 0.01, (1, 21)),
        (1536, 0.2, 0.01, (15, 322)),
        (1536, 0.2, 0.0, (0, 307)),
        (100, 0.995, 0.01, (1, 100)),
        (100, 0.0, 0.01, (1, 1)),
    ],
)
def test_pruned_positions(width: int, sparsity: float, kept: float, expected: tuple[int, int]) -> None:
    assert pruned_positions(width, sparsity, kept) == expected


@settings(max_examples=300, deadline=None)
@given(
    head=st.integers(1, 65),
    key_heads=st.integers(1, 5),
    group=st.integers(1, 4),
    hidden=st.integers(8, 700),
    sparsity=st.floats(0.01, 0.9),
    ratio=st.floats(0.25, 8),
)
def test_budget_holds_and_nothing_grows(
    head: int, key_heads: int, group: int, hidden: int, sparsity: float, ratio: float
) -> None:
    shapes = layer_shapes(hidden, head * key_heads * group, head * key_heads)
    config = CompressionConfig(recipe="lorap", sparsity=sparsity, vo_to_qk_ratio=ratio, sublayers=("self_attn",))
    dense = {role: shapes[role][0] * shapes[role][1] for role in ATTENTION}
    total = sum(dense.values())
    groups = (dense["q_proj"] + dense["k_proj"], dense["v_proj"] + dense["o_proj"])
    smallest_share = total * min(1 / groups[0], ratio / groups[1]) / (1 + ratio)
    # Otherwise a rank may round down to 0, which is refused.
    assume((1 - sparsity) * break_even_rank(shapes["k_proj"]) * min(smallest_share, 1) >= 3 + smallest_share)
    ranks = plan_layer(shapes, config).ranks
    assert set(ranks) <= set(ATTENTION)
    after = {role: ranks[role] * sum(shapes[role]) if role in ranks else dense[role] for role in ATTENTION}
    budget = (1 - sparsity) * total
    assert all(after[role] <= dense[role] for role in ATTENTION)
    assert sum(after.values()) <= budget * (1 + 1e-12)
    # Two roundings: int() of an even share, and int() of that times the group's share.
    lost_ranks = 1 + total / min(groups)
    assert sum(after.values()) >= budget - lost_ranks * sum(sum(shapes[role]) for role in ATTENTION)


@pytest.mark.parametrize(
    ("shapes", "options", "words"),
    [
        (layer_shapes(63, 63, 1), {"sparsity": 0.5}, ["sparsity 0.5", "rank 0", "k_proj", "(1, 63)"]),
        (SMOLLM2, {"sparsity": 0.999}, ["sparsity 0.999", "rank 0", "q_proj", "(576, 576)"]),
        (
            SMOLLM2,
            {"sparsity": 0.999, "sublayers": ("mlp",), "mlp_method": "factorize"},
            ["rank 0", "gate_proj", "(1536, 576)"],
        ),
        (
            layer_shapes(64, 64, 64, inner=63),
            {"sparsity": 0.999, "sublayers": ("mlp",)},
            ["sparsity 0.999", "0 of 63 FFN channels"],
        ),
    ],
    ids=["narrow-k", "attention", "mlp-rank", "mlp-width"],
)
def test_too_much_sparsity_is_refused(shapes: dict, options: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        plan_layer(shapes, CompressionConfig(**({"recipe": "lorap"} | options)))
    for word in [*words, "lower the sparsity"]:
        assert word in str(error.value)


@pytest.mark.parametrize("mlp_method", ["prune", "factorize"])
@pytest.mark.parametrize(
    "shapes",
    [
        layer_shapes(4096, 4096, 4096, 4096),
        layer_shapes(576, 576, 192, 576),
        layer_shapes(63, 63, 63, 101),
        layer_shapes(4096, 4096, 1024, 14336),
    ],
    ids=["square", "smollm2-attention", "odd", "llama-3-8b"],
)
def test_sparsity_zero_changes_nothing(shapes: dict, mlp_method: str) -> None:
    plan = plan_layer(shapes, CompressionConfig(recipe="lorap", sparsity=0.0, mlp_method=mlp_method))
    assert plan.ranks == {}
    assert plan.intermediate_size == shapes["gate_proj"][0]
