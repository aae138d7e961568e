"""The machine code of the kernels on weights on a trellis, compiled here for GPUs that are not here."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels have no machine code", allow_module_level=True)

from lorap.kernels import cost, trellis, trellis_linear
from lorap.kernels.aot import ARCHITECTURES, SHARED_LIMIT
from lorap.kernels.hardware import NUM_SMS
from lorap.kernels.quantized_settings import parts, steps_per_part
from lorap.kernels.trellis_settings import settings
from lorap.nn import implementations

VARIANTS = {variant.name: variant for variant in trellis_linear.shipped_configs()}
# One of each number of bits in bf16, and what is written, for one architecture; the others are slow.
FIRST = {f"trellis_linear-bf16-tcq{bits}-m1-4096x4096" for bits in trellis.BITS} | {
    "trellis_linear-bf16-tcq3-m64-4096x4096",
    "dequantize_trellis-bf16-tcq3-m64-4096x4096",
}
CASES = [
    pytest.param(name, arch, marks=[] if arch == 90 and name in FIRST else [pytest.mark.slow])
    for name in VARIANTS
    for arch in ARCHITECTURES
]


def test_the_fast_cases_exist() -> None:
    assert set(VARIANTS) >= FIRST


@pytest.mark.parametrize(("name", "arch"), CASES)
def test_shipped_variant(name: str, arch: int) -> None:
    variant = VARIANTS[name]
    compiled = variant.compile(arch)
    single, block_m = "fp32" in name, variant.constexprs.get("BLOCK_M", 0)
    assert compiled.spill_bytes == 0
    assert compiled.shared_bytes <= SHARED_LIMIT[arch] // (2 if block_m == 64 else 4)  # so many programs share an SM
    # With tcgen05 the sums of 64 tokens are not in registers, and the compiler fills them with loads instead.
    assert compiled.registers <= (255 if arch == 100 and block_m == 64 else 168 if block_m == 64 else 128)
    if block_m:
        assert compiled.uses_hgmma == (arch >= 90 and block_m == 64)
        assert compiled.uses_hmma == (not single and not compiled.uses_hgmma)


@pytest.mark.parametrize("bits", trellis.BITS)
def test_decoding_a_weight_takes_the_instructions_that_the_model_counts(bits: int) -> None:
    """A multiplication and a dp4a for each of the 64 weights that a thread has in a step, and little more of them."""
    variant = VARIANTS[f"trellis_linear-bf16-tcq{bits}-m1-4096x4096"]
    body = loop(variant.compile(90).sass)
    weights = 64 * variant.constexprs["BLOCK_K"] // (32 * variant.num_warps)
    names = [re.sub(r"^@!?\w+ ", "", line).split(".")[0].split()[0] for line in body]
    assert names.count("IDP") == names.count("FADD") == weights == 64
    assert names.count("IMAD") < (1.6 if bits <= 4 else 1.9) * weights
    assert len(body) / weights == pytest.approx(cost.DECODING[bits][16], abs=0.3)


def loop(sass: str) -> list[str]:
    """The instructions of the longest loop."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass, re.MULTILINE)
    lines = {int(address, 16): text.strip() for address, text in found}
    jumps = [(int(to[1], 16), at) for at, text in lines.items() if (to := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text))]
    start, stop = max(((to, at) for to, at in jumps if to < at), key=lambda jump: jump[1] - jump[0])
    return [text for at, text in lines.items() if start <= at <= stop]


@pytest.mark.parametrize("m", [1, 16, 64])
def test_programs_outnumber_multiprocessors_where_the_weight_is_large_enough(m: int) -> None:
    for n in (512, 1024, 4096, 11008):
        chosen = settings(m, 4096, n, 256)
        count, steps = parts(4096, chosen), steps_per_part(4096, chosen)
        assert -(-n // 64) * count > 2 * NUM_SMS or steps == 1
        assert count * steps * chosen["BLOCK_K"] >= 4096 > (count - 1) * steps * chosen["BLOCK_K"]


def test_every_form_that_a_model_can_get_is_checked_on_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[Any, ...]] = set()

    def record(launches: Any, _x: Any) -> None:
        for kernel, grid, _, options in launches:
            split = kernel.__name__ == "trellis_linear_kernel" and grid[1] > 1
            seen.add((kernel.__name__, *(options.get(name) for name in ("BITS", "BLOCK_M", "BLOCK_K")), split))

    monkeypatch.setattr(trellis_linear, "run", record)
    run, meta = implementations.implementation("trellis_linear", "triton"), torch.device("meta")
    for tokens, k, pivoted in implementations.examples_of("trellis_linear"):
        run(*implementations.example("trellis_linear", meta, torch.bfloat16, tokens, k, pivoted))
    checked, wanted = set(seen), set()
    for tokens, bits, n in (
        (tokens, bits, n) for tokens in (1, 2, 16, 24, 64, 2048) for bits in trellis.BITS for n in (64, 4096)
    ):
        seen.clear()
        weight = trellis_linear.meta_weight(n, 4096, bits, 256)
        run(torch.empty(tokens, 4096, dtype=torch.bfloat16, device=meta), *weight[:2], None, bits, 256)
        wanted |= seen
    assert wanted
    assert wanted - checked == set()
    assert {split for name, *_, split in checked if name == "trellis_linear_kernel"} == {False, True}
