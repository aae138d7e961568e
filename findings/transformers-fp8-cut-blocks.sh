#!/usr/bin/env bash
# transformers 5.24.0 with FineGrainedFP8Config(dequantize=True), to which it also falls back without a GPU: where a side of a
# weight is no multiple of the block size, scales are spread over blocks of another size.
#
# Source: an fp8 checkpoint has one scale for each block of weight_block_size, 128 x 128, the last of them cut off:
# integrations/finegrained_fp8.py, FP8Linear makes room for ceil(out_features / 128) rows of them. Fp8Dequantize._dequantize_one
# takes rows // scale_rows for the height of a block, whatever weight_block_size says.
# Expected: element (i, j) is weight[i, j] * scale[i // 128, j // 128].
# Seen: 192 rows with 2 rows of scales are read in blocks of 96, so rows 96 to 127 get the scale of the next block, and no word
# about it; 576 rows with 5 are an error.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.24.0
"$work/venv/bin/python" - <<'PYTHON'
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

torch.manual_seed(0)
weight = torch.randn(192, 128).to(torch.float8_e4m3fn)
scales = torch.tensor([[1.0], [2.0]])
meant = weight.float() * scales[torch.arange(192) // 128]
found = Fp8Dequantize(None).convert({"weight": weight, "weight_scale_inv": scales})["weight"].float()
wrong = (found != meant).any(1).nonzero().flatten().tolist()
print("rows that differ:", wrong[0], "to", wrong[-1])
assert wrong == list(range(96, 128)), wrong
try:
    Fp8Dequantize(None).convert({"weight": torch.zeros(576, 128).to(weight.dtype), "weight_scale_inv": torch.ones(5, 1)})
    raise SystemExit("576 rows were read")
except ValueError as error:
    print(error)
PYTHON
