"""The machine code of the Triton kernels, compiled here for GPUs that are not here: no spills, wide loads, tensor cores."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels have no machine code", allow_module_level=True)

from lorap.kernels import channel_sq_norm, linear, silu_gated_linear
from lorap.kernels.aot import ARCHITECTURES, SHARED_LIMIT, Compiled, Variant, compile

VARIANTS = {
    variant.name: variant
    for module in (channel_sq_norm, linear, silu_gated_linear)
    for variant in module.shipped_configs()
}
ONE_OF_EACH_KERNEL = {variant.kernel.__name__: variant for variant in VARIANTS.values()}
# One of each kernel, dtype and mask for one architecture; other tiles and architectures are slow.
FIRST = {
    (variant.kernel.__name__, variant.signature.get("x_ptr"), "mask_ptr" in variant.signature): name
    for name, variant in reversed(VARIANTS.items())
}.values()
CASES = [
    pytest.param(name, arch, marks=[] if arch == 90 and name in FIRST else [pytest.mark.slow])
    for name in VARIANTS
    for arch in ARCHITECTURES
]


@pytest.mark.parametrize(("name", "arch"), CASES)
def test_shipped_variant(name, arch):
    variant = VARIANTS[name]
    compiled = variant.compile(arch)
    assert compiled.shared_bytes <= SHARED_LIMIT[arch]
    # float32 runs on a GPU only when forced; compilers differ there by a register or two.
    assert compiled.spill_bytes <= (16 if "fp32" in name else 0)
    assert compiled.wide_loads > 0
    if "mask_ptr" not in variant.signature:  # a byte for each token
        assert compiled.narrow_loads == 0
    tensor_cores = "UPCAST" in variant.constexprs and variant.signature["x_ptr"] != "*fp32"
    warp_group = tensor_cores and arch >= 90 and variant.constexprs["BLOCK_N"] >= 64
    assert compiled.uses_hgmma == warp_group
    assert compiled.uses_hmma == (tensor_cores and not warp_group)


def test_shipped_variants_cover_both_forms_and_both_widths():
    """What the test above says of tensor cores must have been said of something."""
    tiles = {tuple(variant.constexprs.get(f"BLOCK_{axis}") for axis in "MN") for variant in VARIANTS.values()}
    assert {(None, 8), (None, 4), (16, 64), (32, 64), (16, 32), (32, 32)} <= tiles


@pytest.mark.parametrize("name", ["channel_sq_norm_kernel", "linear_kernel", "silu_gated_linear_row_kernel"])
def test_sizes_that_are_not_multiples_of_16_cost_the_wide_loads(name):
    """Why ranks and widths are rounded; also shows that narrow loads are seen where they are."""
    variant = next(variant for variant in VARIANTS.values() if variant.name.startswith(f"{name}-bf16"))
    pointers = [argument for argument in variant.divisible if argument.endswith("_ptr")]
    assert replace(variant, divisible=pointers).compile(90).narrow_loads > 0


@pytest.mark.parametrize("kernel", ONE_OF_EACH_KERNEL)
def test_sizes_of_one_compile(kernel):
    """Triton makes a constant of a size that is 1, which is then no tensor with methods; the interpreter does not."""
    variant = ONE_OF_EACH_KERNEL[kernel]
    sizes = {argument for argument, kind in variant.signature.items() if kind == "i32"} - {"M", "T", "K_PER_PROGRAM"}
    one = replace(
        variant,
        signature={argument: kind for argument, kind in variant.signature.items() if argument not in sizes},
        constexprs={**variant.constexprs, **dict.fromkeys(sizes, 1)},
        divisible=[argument for argument in variant.divisible if argument not in sizes],
    )
    assert one.compile(90).registers > 0


@pytest.mark.parametrize("kernel", [kernel for kernel in ONE_OF_EACH_KERNEL if "linear" in kernel])
def test_biases_cost_no_spill(kernel):
    variant = ONE_OF_EACH_KERNEL[kernel]
    biases = [argument for argument in variant.constexprs if argument.endswith("bias_ptr")]
    assert biases
    with_bias = replace(
        variant,
        signature={**variant.signature, **dict.fromkeys(biases, "*bf16")},
        constexprs={argument: value for argument, value in variant.constexprs.items() if argument not in biases},
    )
    assert with_bias.compile(90).spill_bytes == 0


def test_an_argument_without_type_or_value_is_named():
    variant = next(iter(VARIANTS.values()))
    options: dict[str, Any] = {"divisible": (), "arch": 90, "num_warps": 4, "num_stages": 3}
    with pytest.raises(ValueError, match="x_ptr"):
        compile(variant.kernel, signature={}, constexprs=variant.constexprs, **options)
    with pytest.raises(ValueError, match="nonsense"):
        compile(
            variant.kernel, signature={**variant.signature, "nonsense": "i32"}, constexprs=variant.constexprs, **options
        )


def test_numbers_are_those_of_the_machine_code():
    """A float32 copy by hand: 4 floats per thread are one wide load, 1 float per thread is neither wide nor narrow."""
    variant = VARIANTS["sum_partials_kernel-fp32-S4"]
    assert isinstance(variant, Variant)
    wide = variant.compile(80)
    plain = replace(variant, constexprs={**variant.constexprs, "BLOCK": 128}).compile(80)
    assert isinstance(wide, Compiled)
    assert (wide.wide_loads, wide.narrow_loads) == (4, 0)
    assert (plain.wide_loads, plain.narrow_loads) == (0, 0)
    assert ".target sm_80" in wide.ptx
    assert "LDG" in wide.sass
