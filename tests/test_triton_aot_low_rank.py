"""The machine code of the low-rank kernels, compiled here for GPUs that are not here, and the settings they get."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels have no machine code", allow_module_level=True)

from lorap.kernels import cost, hardware, low_rank_fused, low_rank_linear
from lorap.kernels.aot import ARCHITECTURES, SHARED_LIMIT, WIDE_LOAD, Variant
from lorap.kernels.low_rank_settings import expand_config, part_length, parts, shrink_config

VARIANTS = {
    variant.name: variant for module in (low_rank_linear, low_rank_fused) for variant in module.shipped_configs()
}
ONE_OF_EACH_KERNEL: dict[tuple[str, bool], Variant] = {}
for variant in VARIANTS.values():
    ONE_OF_EACH_KERNEL.setdefault((variant.kernel.__name__, variant.constexprs["GEMV"]), variant)
LAYERS = {
    "llama-7b-qk": (4096, (512,), (4096,)),
    "llama-7b-vo": (4096, (1536,), (4096,)),
    "llama-7b-qkv": (4096, (512, 512, 1536), (4096, 4096, 4096)),
    "llama-7b-down": (11008, (1472,), (4096,)),
    "llama-3-8b-kv": (4096, (512, 768), (1024, 1024)),
    "smollm2-qkv": (576, (64, 64, 128), (576, 192, 192)),
    "odd": (63, (1, 17), (1, 100)),
}


def waits(variant: Variant) -> bool:
    return bool(variant.constexprs.get("PDL"))


def dtype(variant: Variant) -> str:
    return variant.signature.get("x_ptr") or variant.signature["y_ptr"]


# One of each form and dtype for one architecture; other shapes and architectures are slow.
FIRST = {
    (variant.kernel.__name__, variant.constexprs["GEMV"], waits(variant), dtype(variant)): name
    for name, variant in reversed(VARIANTS.items())
}.values()
# Dependent launches need sm_90.
CASES = [
    pytest.param(name, arch, marks=[] if arch == 90 and name in FIRST else [pytest.mark.slow])
    for name, variant in VARIANTS.items()
    for arch in ARCHITECTURES
    if arch >= 90 or not waits(variant)
]


@pytest.mark.parametrize(("name", "arch"), CASES)
def test_shipped_variant(name, arch):
    variant = VARIANTS[name]
    compiled = variant.compile(arch)
    assert compiled.shared_bytes <= SHARED_LIMIT[arch]
    # float32 runs on a GPU only when forced; compilers differ there by a register or two.
    assert compiled.spill_bytes <= (16 if dtype(variant) == "*fp32" else 0)
    assert compiled.wide_loads > 0
    assert compiled.narrow_loads <= bool(variant.constexprs.get("BIASED"))  # a bias is read one by one
    tensor_cores = not variant.constexprs["GEMV"] and dtype(variant) != "*fp32"
    warp_group = tensor_cores and arch >= 90 and variant.constexprs["BLOCK_N"] >= 64
    assert compiled.uses_hgmma == warp_group
    assert compiled.uses_hmma == (tensor_cores and not warp_group)


GEMV = [
    pytest.param(name, marks=[] if name in FIRST else [pytest.mark.slow])
    for name, variant in VARIANTS.items()
    if variant.constexprs["GEMV"]
]


@pytest.mark.parametrize("name", GEMV)
def test_three_tiles_are_on_their_way_before_the_first_is_used(name):
    """A prefetch that ptxas moves behind the first use is none; loads that are wide do not show that.

    A kernel that waits for the one before it has all of its weights on their way: one tile, before the wait.
    """
    variant = VARIANTS[name]
    tile = variant.constexprs["BLOCK_N"] * variant.constexprs["BLOCK_K"] * (4 if dtype(variant) == "*fp32" else 2)
    loads_per_tile = tile // (16 * 32 * variant.num_warps)
    compiled = variant.compile(90)
    if variant.constexprs.get("WHOLE"):
        before = compiled.sass.rpartition("ACQBULK")[0]
        assert len(WIDE_LOAD.findall(before)) >= loads_per_tile >= 4
        assert "LDGSTS" not in compiled.sass
    else:
        assert compiled.loads_in_flight >= 3 * loads_per_tile > 0


def test_names_are_unique():
    assert len(VARIANTS) == sum(1 for module in (low_rank_linear, low_rank_fused) for _ in module.shipped_configs())


def test_shipped_variants_cover_every_form():
    """What the test above says of a form must have been said of something."""
    forms = {(variant.kernel.__name__, variant.constexprs["GEMV"], waits(variant)) for variant in VARIANTS.values()}
    pair = ("shrink_kernel", "expand_kernel")
    assert {(name, gemv, pdl) for name in pair for gemv in (True, False) for pdl in (True, False)} <= forms
    assert {
        (name, gemv, False) for name in ("silu_gated_expand_kernel", "low_rank_fused_kernel") for gemv in (True, False)
    } <= forms
    expands = [variant.constexprs for variant in VARIANTS.values() if variant.kernel.__name__ == "expand_kernel"]
    assert {options["PARTS"] for options in expands} >= {1, 2, 4}
    assert {options["NUM_LAYERS"] for options in expands} == {1, 3}
    assert {options["BLOCK_M"] for options in expands} == {1, 16, 32}


@pytest.mark.parametrize("gemv", [True, False])
def test_dependent_launch(gemv):
    """Shrink lets expand start; expand reads a tile of its weights, and then waits before it reads T."""
    found = [variant for variant in VARIANTS.values() if waits(variant) and variant.constexprs["GEMV"] == gemv]
    sass = {variant.kernel.__name__: variant.compile(90).sass for variant in found}
    assert "PREEXIT" in sass["shrink_kernel"]
    assert "ACQBULK" not in sass["shrink_kernel"]
    before, _, after = sass["expand_kernel"].rpartition("ACQBULK")
    assert ".128" in before
    assert ".128" in after
    plain = next(v for v in VARIANTS.values() if v.kernel.__name__ == "expand_kernel" and not waits(v))
    assert "ACQBULK" not in plain.compile(90).sass


@pytest.mark.parametrize("gemv", [True, False])
def test_ranks_that_are_not_multiples_of_16_cost_the_wide_loads(gemv):
    """Why ranks are rounded; also shows that narrow loads are seen where they are."""
    variant = ONE_OF_EACH_KERNEL["expand_kernel", gemv]
    aligned = [argument for argument in variant.divisible if not argument.startswith("rank")]
    assert replace(variant, divisible=aligned).compile(90).narrow_loads > 0


@pytest.mark.parametrize("kernel", ONE_OF_EACH_KERNEL, ids=str)
def test_sizes_of_one_compile(kernel):
    """Triton makes a constant of an integer argument that is 1, which is then no tensor with methods."""
    variant = ONE_OF_EACH_KERNEL[kernel]
    sizes = {argument for argument, kind in variant.signature.items() if kind == "i32"} - {"M", "k_per_part"}
    one = replace(
        variant,
        signature={argument: kind for argument, kind in variant.signature.items() if argument not in sizes},
        constexprs={**variant.constexprs, **dict.fromkeys(sizes, 1)},
        divisible=[argument for argument in variant.divisible if argument not in sizes],
    )
    assert one.compile(90).registers > 0


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("m", [1, 2, 16, 17, 32, 33, 2048])
@pytest.mark.parametrize("layers", LAYERS)
def test_settings_cover_k_and_fit(layers, m, itemsize):
    k, ranks, rows = LAYERS[layers]
    shrink = shrink_config(m, k, ranks, rows, itemsize=itemsize)
    expand = expand_config(m, k, ranks, rows, itemsize=itemsize)
    assert part_length(k, shrink) % shrink["BLOCK_K"] == 0
    assert (parts(k, shrink) - 1) * part_length(k, shrink) < k <= parts(k, shrink) * part_length(k, shrink)
    for settings in (shrink, expand):
        assert all(value & (value - 1) == 0 for name, value in settings.items() if name != "num_stages")
        least = (8 if settings is expand else 4) if m == 1 else 64
        assert settings["BLOCK_N"] >= least
    if m == 1:  # no more columns than threads, so that T is not passed around through shared memory
        assert expand["BLOCK_K"] < 32 * expand["num_warps"]
        assert shrink["BLOCK_K"] * itemsize == 16 * 32 * shrink["num_warps"]


@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize("layers", ["llama-7b-qk", "llama-7b-vo", "llama-7b-qkv", "llama-7b-down", "llama-3-8b-kv"])
def test_shrink_keeps_enough_reads_in_flight(layers, m):
    """11 KB per SM are what 3 TB/s need at a latency of 500 ns; a few rank rows alone would not keep them in flight."""
    k, ranks, rows = LAYERS[layers]
    shrink = shrink_config(m, k, ranks, rows)
    programs = parts(k, shrink) * sum(-(-rank // shrink["BLOCK_N"]) for rank in ranks)
    tile = shrink["BLOCK_N"] * shrink["BLOCK_K"] * 2 * max(1, shrink["num_stages"] - 1)
    assert programs * tile >= 132 * 11_000
    # An SM takes no more than its share of the bandwidth, whatever it asks for: what has too few programs is left to torch.
    enough = programs * hardware.SM_BANDWIDTH >= hardware.MEMORY_BANDWIDTH
    assert enough or not cost.worth("low_rank_linear_group", m, k, ranks, rows, (0,) * len(rows))


@pytest.mark.parametrize("rank", [1, 48, 512, 1472, 1632, 4000])
def test_a_kernel_that_starts_early_holds_whole_rows(rank):
    expand = expand_config(1, 4096, (32, rank), (4096, 4096), pdl=True)
    assert expand["BLOCK_K"] >= rank
    assert expand["BLOCK_N"] >= 4
    assert expand["BLOCK_N"] * expand["BLOCK_K"] * 2 <= 8 * 16 * 32 * expand["num_warps"] * (2 if rank > 2048 else 1)


def test_split_is_no_deeper_than_expand_can_afford():
    """Every expand program reads all parts of T, which more rows of x make larger."""
    layer = LAYERS["llama-7b-qk"]
    depths = [parts(layer[0], shrink_config(m, *layer)) for m in (8, 32, 2048)]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] > depths[-1] == 1
