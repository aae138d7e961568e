#!/usr/bin/env bash
# torch 2.13.0 (oneDNN 3.12.0) on a processor with AMX, bfloat16: a product of a matrix whose rows lie apart in memory is NaN where
# what lies between its rows is NaN or infinite. Such a matrix is valid, x[:, :33] for one, and has no NaN itself.
#
# Source: torch.nn.functional.linear, torch.mm, torch.matmul and torch.addmm go to oneDNN's brg_matmul (avx10_1_512_amx). It reads
# rows of x up to a multiple of 32 numbers, beyond K, and multiplies what it read too much by zeros. Known to oneDNN, where it is
# mended in later versions: github.com/uxlfoundation/oneDNN, issue 5717, pull request 5723.
# Expected: the product of x.contiguous(), bit for bit; row i of x alone decides row i of the product.
# Seen: with more than 16 rows and K no multiple of 32, rows are NaN, whether a row continues in the gap (x[:, :33] of wider rows) or
# ends before one (every second row). Finite numbers there change nothing. Without a gap, too, one row of NaN makes NaN of the row
# before it. Most K above 32 are concerned, not all: 33, 80 and 100 are, 40 and 72 are not. Not seen: float16 (this needs other AMX),
# float32, torch.bmm, at most 16 rows, a second factor with gaps.
set -euo pipefail
if ! grep -qw amx_bf16 /proc/cpuinfo 2>/dev/null; then
    echo "this processor has no AMX for bfloat16, so it cannot be seen here"
    exit 0
fi
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0
OMP_NUM_THREADS=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
weight = torch.randn(40, 33).bfloat16()

def rows_of_nan(x):
    return F.linear(x, weight).isnan().any(1).nonzero().flatten().tolist()

def beside(x, filler):
    wide = torch.full((len(x), 36), filler, dtype=x.dtype)
    wide[:, :33] = x
    return wide[:, :33]

x = torch.randn(33, 33).bfloat16()
between = torch.full((66, 33), float("nan"), dtype=x.dtype)
between[::2] = x
nan, inf, finite = (beside(x, filler) for filler in (float("nan"), float("inf"), 3e38))
for name, case in (("NaN beside each row", nan), ("infinity beside each row", inf), ("NaN rows between", between[::2])):
    assert torch.equal(case, x) and not rows_of_nan(case.contiguous())
    print(f"{name}: {len(rows_of_nan(case))} of {len(x)} rows of the product are NaN")
    assert len(rows_of_nan(case)) > 15
assert torch.equal(F.linear(finite, weight), F.linear(x, weight))
assert not rows_of_nan(nan[:16]) and rows_of_nan(nan[:17])
for product in (torch.mm(nan, weight.T), nan @ weight.T, torch.addmm(weight.new_zeros(40), nan, weight.T)):
    assert product.isnan().any()
assert not torch.bmm(nan[None], weight.T[None]).isnan().any()
assert not F.linear(nan.float(), weight.float()).isnan().any()
whole = x.clone()
whole[16] = float("nan")
print("row 16 is NaN, without gaps: rows", rows_of_nan(whole), "of the product are")
assert rows_of_nan(whole) == [15, 16]
PYTHON
