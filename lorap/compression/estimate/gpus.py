"""GPUs that are not here: what their makers publish, and how much of that is assumed to be reached.

Nothing in this file has been measured by lorap. The figures are from NVIDIA's data sheets: dense (without sparsity), PCIe in
one direction, and float64 on the tensor cores where there are any, because cuBLAS uses them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from lorap.algorithms.factorization.solvers import GPU, GPU_SLOW_FLOAT64
from lorap.compression.estimate.rates import Machine
from lorap.errors import ConfigError

# Shares of the published rates. Assumptions.
PRODUCT_SHARE = 0.5
CHOLESKY_SHARE = 0.15
MOVED_SHARE = 0.7
LINK_SHARE = 0.8
# Half of the work of an eigensolver is products of a matrix with single vectors, which read the matrix once per column; the
# rest, some 6 n^3, are products of small blocks, and each column costs a few launches. Assumptions.
EIGEN_PRODUCTS, EIGEN_SHARE, EIGEN_COLUMN = 6, 0.1, 40e-6
# One decoder layer of transformers, launched from Python. Assumption.
LAYER_CALL = 0.8e-3
# What CUDA, its libraries and torch take on the GPU. Assumption.
BASE_BYTES = 10**9
# The computer around the GPU. Assumptions: an NVMe disk, and memory that keeps files of this size.
HOST_BYTES = 256 * 2**30
DISK_READ, DISK_WRITE, CACHED_READ, HASHED = 3e9, 1.5e9, 8e9, 1.5e9
# A random number is written and read a few times. Assumption.
DRAWN_BYTES = 16
SIZES = tuple(2**power for power in range(6, 17))


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Published figures.

    Args:
        memory: GB.
        bandwidth: GB/s of its memory.
        bf16, fp32, fp64: TFLOP/s of matrix products.
        pcie: GB/s from the host, one way.
        host: GB of memory that the computer around it has.
        disk: GB/s that its disk reads.
    """

    memory: float
    bandwidth: float
    bf16: float
    fp32: float
    fp64: float
    pcie: float
    host: float = HOST_BYTES / 1e9
    disk: float = DISK_READ / 1e9


# SXM versions of H100, H200 and A100 80 GB. L40S and RTX 4090 have float64 at a 64th of float32.
GPUS: Mapping[str, Gpu] = {
    "h100": Gpu(memory=80, bandwidth=3350, bf16=989, fp32=67, fp64=67, pcie=64),
    "h200": Gpu(memory=141, bandwidth=4800, bf16=989, fp32=67, fp64=67, pcie=64),
    "a100": Gpu(memory=80, bandwidth=2039, bf16=312, fp32=19.5, fp64=19.5, pcie=32),
    "l40s": Gpu(memory=48, bandwidth=864, bf16=362, fp32=91.6, fp64=1.43, pcie=32),
    "4090": Gpu(memory=24, bandwidth=1008, bf16=165, fp32=82.6, fp64=1.29, pcie=32),
}
REQUIRED = tuple(field.name for field in fields(Gpu))[:6]


def find_gpu(text: str, *, processes: int = 1) -> Machine:
    """A GPU by its name in the table, or by its figures, such as ``name=mine,memory=32,bandwidth=1792,bf16=210,fp32=105,...``.

    Raises:
        ConfigError: the name is not in the table, or a figure is missing or no number above 0.
    """
    if text.lower() in GPUS:
        return machine_of(text.upper(), GPUS[text.lower()], processes=processes)
    pairs: dict[str, str] = dict(part.partition("=")[::2] for part in text.split(","))
    name = pairs.pop("name", "")
    known = {field.name for field in fields(Gpu)}
    if not name or not set(REQUIRED) <= set(pairs) <= known:
        wanted = ",".join(f"{figure}=NUMBER" for figure in REQUIRED)
        raise ConfigError(
            f"no published figures for GPU {text!r}; choose from {', '.join(GPUS)}, or give them: name=NAME,{wanted} "
            "(GB, GB/s, TFLOP/s, TFLOP/s, TFLOP/s, GB/s; host=GB and disk=GB/s may follow)"
        )
    try:
        figures = {key: float(value) for key, value in pairs.items()}
    except ValueError as error:
        raise ConfigError(f"the figures of GPU {name} must be numbers: {error}") from None
    bad = [f"{key}={pairs[key]}" for key, value in figures.items() if not (math.isfinite(value) and value > 0)]
    if bad:
        raise ConfigError(f"the figures of GPU {name} must be above 0, and {bad[0]} is not")
    return machine_of(name, Gpu(**figures), processes=processes)


def machine_of(name: str, gpu: Gpu, *, processes: int = 1) -> Machine:
    """Rates of one of ``processes`` such GPUs, each with a link of its own.

    Args:
        name: of the GPU, for messages.
        gpu: its published figures.
        processes: one per GPU.
    """
    slow = gpu.fp64 < gpu.fp32 / 4
    products = {"bfloat16": gpu.bf16, "float16": gpu.bf16, "float32": gpu.fp32, "float64": gpu.fp64}
    rates = {dtype: PRODUCT_SHARE * tera * 1e12 for dtype, tera in products.items()}
    moved = MOVED_SHARE * gpu.bandwidth * 1e9
    return Machine(
        name=f"{processes} x {name}" if processes > 1 else name,
        kind="published",
        assumptions=(
            f"{PRODUCT_SHARE:.0%} of the published rate of matrix products, {CHOLESKY_SHARE:.0%} for Cholesky, "
            f"{MOVED_SHARE:.0%} of the memory bandwidth, {LINK_SHARE:.0%} of PCIe",
            f"eigensolver: the matrix is read once per column, {EIGEN_PRODUCTS} n^3 operations at {EIGEN_SHARE:.0%}, "
            f"{EIGEN_COLUMN * 1e6:.0f} us per column",
            f"{LAYER_CALL * 1e3:.1f} ms to launch a decoder layer; host memory {gpu.host:,.0f} GB",
            f"disk {gpu.disk:g} GB/s to read and {DISK_WRITE / 1e9:g} to write, {CACHED_READ / 1e9:g} from files in memory, "
            f"{HASHED / 1e9:g} through sha256",
        ),
        products=rates,
        cholesky={dtype: CHOLESKY_SHARE / PRODUCT_SHARE * rates[dtype] for dtype in ("float32", "float64")},
        eigen={
            "float64": {size: _eigen(size, 8, rates["float64"], moved, EIGEN_PRODUCTS) for size in SIZES},
            "float32": {size: _eigen(size, 4, rates["float32"], moved, EIGEN_PRODUCTS) for size in SIZES},
            "values": {size: _eigen(size, 8, rates["float64"], moved, 1) for size in SIZES},
        },
        moved=moved,
        layer_call=LAYER_CALL,
        memory_bytes=int(gpu.memory * 1e9),
        base_bytes=BASE_BYTES,
        host_bytes=int(gpu.host * 1e9),
        link=LINK_SHARE * gpu.pcie * 1e9,
        disk_read=gpu.disk * 1e9,
        disk_write=DISK_WRITE,
        cached_read=CACHED_READ,
        hashed=HASHED,
        drawn=moved / DRAWN_BYTES,
        rule=GPU_SLOW_FLOAT64 if slow else GPU,
        parallel=processes,
    )


def _eigen(size: int, itemsize: int, product_rate: float, moved: float, products: int) -> float:
    read = itemsize * size**3 / 3 / moved
    return read + products * size**3 / (EIGEN_SHARE / PRODUCT_SHARE * product_rate) + size * EIGEN_COLUMN
