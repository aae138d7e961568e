"""The machine code of the kernels on weights of 4 and 8 bits, compiled here for GPUs that are not here."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels have no machine code", allow_module_level=True)

from lorap.kernels import quantized_linear, quantized_low_rank_linear, quantized_silu_gated_linear
from lorap.kernels.aot import ARCHITECTURES, SHARED_LIMIT, Variant
from lorap.kernels.hardware import NUM_SMS
from lorap.kernels.quantized_settings import parts, settings, steps_per_part
from lorap.nn import implementations

MODULES = (quantized_linear, quantized_low_rank_linear, quantized_silu_gated_linear)
VARIANTS = {variant.name: variant for module in MODULES for variant in module.shipped_configs()}


def form(variant: Variant) -> tuple[Any, ...]:
    """What differs in more than sizes."""
    told = variant.constexprs
    pivoted = "pivots_ptr" in variant.signature and told["BLOCK_M"] > 1
    return variant.kernel.__name__, told.get("BLOCK_M", 0) > 1, pivoted, told.get("BITS") if "BLOCK_M" in told else None


# One of each form in bf16 for one architecture; the others are slow, and gate and up beside each other.
FIRST = {form(variant): name for name, variant in reversed(VARIANTS.items()) if "bf16" in name or "pivoted" in name}
CASES = [
    pytest.param(name, arch, marks=[] if arch == 90 and name in FIRST.values() else [pytest.mark.slow])
    for name in VARIANTS
    for arch in ARCHITECTURES
]


@pytest.mark.parametrize(("name", "arch"), CASES)
def test_shipped_variant(name: str, arch: int) -> None:
    variant = VARIANTS[name]
    compiled = variant.compile(arch)
    single = "fp32" in name  # runs on a GPU only when forced
    assert compiled.shared_bytes <= SHARED_LIMIT[arch]
    assert compiled.spill_bytes <= (64 if single else 0)
    assert compiled.registers <= (255 if single else 224 if variant.constexprs.get("BLOCK_M") == 64 else 144)
    assert compiled.wide_loads > 0
    if variant.kernel.__name__ == "quantized_linear_kernel":
        one = variant.constexprs["BLOCK_M"] == 1
        of_weights = variant.constexprs["BLOCK_N"] if one else 2 * variant.constexprs["TILES"]
        pivots = 2 * ("pivots_ptr" in variant.signature)
        assert compiled.narrow_loads <= of_weights + pivots  # scales, one for a group
    tensor_cores = variant.constexprs.get("BLOCK_M", 1) > 1 and not single
    assert compiled.uses_hgmma == (tensor_cores and arch >= 90)
    assert compiled.uses_hmma == (tensor_cores and arch < 90)


def test_one_token_reads_words_16_bytes_at_a_time_and_all_rows_before_it_multiplies() -> None:
    variant = next(one for one in VARIANTS.values() if one.name == "quantized_linear-bf16-int4-m1-4096x4096")
    compiled = variant.compile(90)
    rows = variant.constexprs["BLOCK_N"]
    assert compiled.wide_loads == rows + 4  # a load for each row, and x
    assert compiled.loads_in_flight >= rows
    assert variant.constexprs["ALIGN"] == 4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 2, 16, 64])
def test_programs_outnumber_multiprocessors_where_the_weight_is_large_enough(m: int, bits: int) -> None:
    for n in (512, 1024, 4096):
        chosen = settings(m, 4096, n, bits, 64)
        count = parts(4096, chosen)
        step = chosen["BLOCK_K"] * chosen["TILES"]
        programs = -(-n // chosen["BLOCK_N"]) * count
        assert programs > NUM_SMS or steps_per_part(4096, chosen) == 1
        assert count * steps_per_part(4096, chosen) * step >= 4096 > (count - 1) * steps_per_part(4096, chosen) * step


@pytest.mark.parametrize("op", implementations.QUANTIZED_OPS)
def test_every_form_that_a_model_can_get_is_checked_on_first_use(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[Any, ...]] = set()

    def record(launches: Any, _x: Any) -> None:
        for kernel, _, arguments, options in launches:
            pivots = kernel.__name__ == "quantized_linear_kernel" and arguments[4] is not None
            told = ("BLOCK_M", "BITS", "ALIGN", "SPLIT_K")
            several = options.get("PARTS", 1) > 1
            seen.add(
                (
                    kernel.__name__,
                    *(options.get(key, 0) > 1 if key == "SPLIT_K" else options.get(key) for key in told),
                    several,
                    pivots,
                )
            )

    for module in MODULES:
        monkeypatch.setattr(module, "run", record)
    run = implementations.implementation(op, "triton")
    meta = torch.device("meta")
    for tokens, k, pivoted in implementations.examples_of(op):
        run(*implementations.example(op, meta, torch.bfloat16, tokens, k, pivoted))
    checked, wanted = set(seen), set()
    for tokens in (1, 2, 16, 24, 64, 2048):
        for bits in (4, 8):
            seen.clear()
            x = torch.empty(tokens, 4096, dtype=torch.bfloat16, device=meta)
            dense = quantized_linear.meta_weight(4096, 4096, bits, 64)[:2]
            right, left = (quantized_linear.meta_weight(*size, bits, 64)[:2] for size in ((1024, 4096), (3072, 1024)))
            if op == "quantized_linear":
                run(x, *dense, None, bits, 64)
            elif op == "quantized_silu_gated_linear":
                run(x, *dense, *dense, bits, 64)
            else:
                run(x, *left, *right, None, bits, 64)
                if bits == 8 and tokens <= 128:
                    run(x, *left, *right, None, bits, 64, torch.empty(1024, dtype=torch.int64, device=meta))
            wanted |= seen
    split_too = {(name, *rest, False, pivots) for name, *rest, _, pivots in checked}
    assert wanted
    assert wanted - checked - split_too == set()
