"""One projection in few bits as the plug-in for vLLM holds it: it computes what the numbers say, and names damage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorap.errors import CheckpointError
from lorap.integrations.vllm_packed import PackedProjection, merge_dense
from lorap.integrations.vllm_projection import Share
from lorap.kernels import trellis
from lorap.kernels.packing import pack
from lorap.nn.linear import LowRankLinear
from lorap.nn.low_rank_tensors import FACTORS
from lorap.nn.quantized import QuantizedLinear
from lorap.nn.trellis import TrellisLinear, layer_of
from lorap.weights import KINDS, TRELLIS

# out, in, rank; None for a dense projection
SIZES = [(1, 63, None), (100, 63, None), (100, 63, 1), (63, 100, 37)]
FORMATS = [("int4", 32), ("int8", 64), ("int8", None), *((TRELLIS.kind(bits), 32) for bits in TRELLIS.bits)]


def numbers(rows: int, columns: int, kind: str) -> tuple[Tensor, Tensor]:
    """Numbers, of whole ones the lowest and the highest among them, and what holds them."""
    coding, bits = KINDS[kind]
    if coding is TRELLIS:  # any bits lie on rings
        packed = torch.randint(-(2**31), 2**31, coding.packed_shape(rows, columns, bits)).to(torch.int32)
        return trellis.numbers()[trellis.unpack(packed, bits, rows).long()], packed
    found = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns))
    found.view(-1)[:2] = torch.tensor([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1])
    return found, pack(found, bits)


def stored(rows: int, columns: int, kind: str, group: int | None) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of one matrix, with scales of either sign, and the matrix in float64."""
    q, packed = numbers(rows, columns, kind)
    scales = torch.randn(rows, -(-columns // (group or columns))) / 2 ** KINDS[kind][1]
    weight = q.double() * scales.double().repeat_interleave(group or columns, dim=1)[:, :columns]
    if group is None:
        return {"_weight_qdata": q.to(torch.int8), "_weight_scale": scales, "weight": torch.ones(1)}, weight
    tensors = {"weight_packed": packed, "weight_scale": scales, "weight_shape": torch.tensor([rows, columns])}
    return tensors | {"weight": torch.ones(1)}, weight


def projection_tensors(
    sizes: tuple[int, int, int | None], pivoted: bool, form: tuple[str, int | None]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What the checkpoint holds of a projection with a bias, its weight in float64, and the bias."""
    rows, columns, rank = sizes
    torch.manual_seed(0)
    bias = torch.randn(rows)
    if rank is None:
        tensors, weight = stored(rows, columns, *form)
        return tensors | {"bias": bias}, weight, bias
    right, first = stored(rank, columns, *form)
    left, second = stored(rows - rank if pivoted else rows, rank, *form)
    tensors = {f"right.{key}": tensor for key, tensor in right.items()}
    tensors |= {f"left.{key}": tensor for key, tensor in left.items()}
    tensors |= {"weight": torch.ones(1), "needs_import_lorap": torch.ones(1)}
    if not pivoted:
        return tensors | {"left.bias": bias}, second @ first, bias
    pivots = torch.randperm(rows)[:rank].sort().values
    others = [row for row in range(rows) if row not in set(pivots.tolist())]
    weight = torch.empty(rows, columns, dtype=torch.float64)
    weight[pivots], weight[others] = first, second @ first
    return tensors | {"pivot_rows": pivots, "output_bias": bias}, weight, bias


def projection(
    sizes: tuple[int, int, int | None],
    pivoted: bool,
    form: tuple[str, int | None],
    tensors: dict[str, Tensor],
    name: str = "m.q",
) -> PackedProjection:
    rows, columns, rank = sizes
    whole = Share.of(rows, 0, 1), Share.of(columns, 0, 1)
    coding, bits = KINDS[form[0]]
    how: Any = {"kind": layer_of(coding), "bits": bits, "group_size": form[1]}
    part = PackedProjection(name, rank, pivoted, *whole, True, torch.float32, **how)
    for key, tensor in tensors.items():
        part.load(key, tensor)
    part.finish()
    return part


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("sizes", "pivoted"), [*((sizes, False) for sizes in SIZES), *((sizes, True) for sizes in SIZES[2:])], ids=str
)
def test_it_computes_what_the_numbers_say(sizes: Any, pivoted: bool, form: Any) -> None:
    tensors, weight, bias = projection_tensors(sizes, pivoted, form)
    part = projection(sizes, pivoted, form, tensors)
    assert torch.equal(part.bias, bias)
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, sizes[1])
        exact = x.double() @ weight.T
        error = (part(x).double() - exact).norm() / exact.norm()
        assert error < 1e-5, error


def test_dense_parts_of_the_same_bits_become_one() -> None:
    """q and k in 4 bits, then v in 8, and a pair."""
    check_merged(
        ["int4", "int4", "int8", "int8"],
        [(33, None), (7, None), (5, None), (40, 11)],
        [(QuantizedLinear, 40), (QuantizedLinear, 5), (LowRankLinear, 40)],
    )


def test_dense_parts_on_a_trellis_become_one_where_tiles_are_whole() -> None:
    """Whole tiles and what follows them; a part behind rows that are no tile; other bits; a pair."""
    check_merged(
        ["tcq3", "tcq3", "tcq3", "tcq2", "tcq2"],
        [(128, None), (64, None), (33, None), (64, None), (7, None)],
        [(TrellisLinear, 225), (TrellisLinear, 71)],
    )
    check_merged(
        ["tcq4", "tcq4", "tcq4", "tcq4"],
        [(64, None), (100, None), (64, None), (64, 11)],
        [(TrellisLinear, 164), (TrellisLinear, 64), (LowRankLinear, 64)],
    )


def check_merged(
    kinds: list[str], rows_and_ranks: list[tuple[int, int | None]], expected: list[tuple[type, int]]
) -> None:
    """What becomes of parts of 63 columns: layers and their outputs, which compute the same from words that are held once."""
    forms: list[Any] = [(kind, 32) for kind in kinds]
    sizes: list[Any] = [(rows, 63, rank) for rows, rank in rows_and_ranks]
    made = [projection_tensors(size, False, form) for size, form in zip(sizes, forms, strict=True)]
    parts = [
        projection(size, False, form, tensors, f"m.{index}")
        for index, (size, form, (tensors, *_)) in enumerate(zip(sizes, forms, made, strict=True))
    ]
    x = torch.randn(2, 63)
    alone = torch.cat([part(x) for part in parts], dim=-1)
    layers = merge_dense(parts)
    assert [(type(layer), layer.out_features) for layer in layers] == expected
    assert torch.equal(torch.cat([layer(x) for layer in layers], dim=-1), alone)
    assert torch.equal(torch.cat([part(x) for part in parts], dim=-1), alone)
    merged, first = layers[0].weight_packed, parts[0].layer.weight_packed
    assert first.data_ptr() == merged.data_ptr(), "the words are held twice"


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("sizes", "pivoted"), [((63, 100, None), False), ((63, 100, 37), False), ((63, 100, 37), True)], ids=str
)
def test_what_is_missing_or_damaged_is_named(sizes: Any, pivoted: bool, form: Any) -> None:
    tensors, *_ = projection_tensors(sizes, pivoted, form)
    guards = {"weight", "needs_import_lorap", *(f"{factor}.weight" for factor in FACTORS)}
    for key, tensor in tensors.items():
        shorter = tensors | {key: tensor[:0]}
        if key in guards:
            with pytest.raises(CheckpointError, match=rf"m\.q\.{key} has shape \(0,\), .* in {KINDS[form[0]][1]} bits"):
                projection(sizes, pivoted, form, shorter)
            continue
        with pytest.raises(CheckpointError, match=rf"m\.q\.{key} is missing"):
            projection(sizes, pivoted, form, {name: one for name, one in tensors.items() if name != key})
        with pytest.raises(CheckpointError, match=rf"m\.q\.{key} has shape \(0"):
            projection(sizes, pivoted, form, shorter)
        other = tensor.float() if not tensor.is_floating_point() else tensor.to(torch.int32)
        with pytest.raises(CheckpointError, match=rf"m\.q\.{key} is stored as (float32|int32); .* is needed"):
            projection(sizes, pivoted, form, tensors | {key: other})
        if key.endswith("weight_shape"):
            with pytest.raises(CheckpointError, match=rf"m\.q\.{key} says .*, but config.json makes it"):
                projection(sizes, pivoted, form, tensors | {key: tensor + 1})
        if key.endswith("weight_scale"):
            bad = tensor.clone()
            bad[-1, -1] = float("nan")
            with pytest.raises(CheckpointError, match=r"m\.q\..*weight_scale is nan in row"):
                projection(sizes, pivoted, form, tensors | {key: bad})
    with pytest.raises(CheckpointError, match=r"m\.q\.lora_A, which config\.json does not announce"):
        projection(sizes, pivoted, form, tensors | {"lora_A": torch.ones(1)})
    if pivoted:
        with pytest.raises(CheckpointError, match=r"m\.q\.pivot_rows must ascend"):
            projection(sizes, pivoted, form, tensors | {"pivot_rows": torch.zeros(37, dtype=torch.int64)})
